"""`kcache train-prior --dry-run` and `train-decoder --dry-run`: what a run will take, said before it begins."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from kcache.config import TrainConfig
from kcache.errors import ConfigError
from kcache.tally import counted
from kcache_cli.progress import bytes_text, duration_text

if TYPE_CHECKING:
    from kcache.forecast import Forecast

DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Say what learns, the memory it takes, whether that is there, steps and checkpoints; load and write "
        "nothing.",
    ),
]
DeviceMemoryOption = Annotated[
    str | None,
    typer.Option(
        "--device-memory",
        metavar="SIZE",
        help="Ask a dry run for a GPU with so much memory, such as 24GB, instead of this device.",
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print a dry run as JSON; what a run comes to is printed so in any case.")
]
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def size_of(text: str) -> int:
    """Bytes that a size such as "24GB", "24 G", "23.5GiB" or "24000000000" says; raises ConfigError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", text.strip().upper())
    if found is None or not float(found[1]) or (found[3] and not found[2]):
        raise ConfigError(
            f"--device-memory is {text!r}; expected a size such as 24GB, 80G or 23.5GiB; give what the card has"
        )
    unit = _UNITS[found[2]] if not found[3] else 1 << (10 * "KMGT".index(found[2]) + 10)
    return int(float(found[1]) * unit)


class Asked(NamedTuple):
    """What the flags of a dry run say."""

    dry_run: bool
    device_memory: str | None
    as_json: bool

    def check(self, sweep: Path | None) -> bool:
        """Whether there is to be one; raises ConfigError for what does not go with it, or is nothing without it."""
        if self.device_memory is not None and not self.dry_run:
            raise ConfigError(
                "--device-memory changes nothing without --dry-run; expected that beside it; add that, or leave "
                "--device-memory out"
            )
        if self.dry_run and sweep is not None:
            raise ConfigError(
                f"--dry-run with --sweep {sweep}: it is of one run; expected one of the two; give the flags of the "
                "run that takes most"
            )
        return self.dry_run


def dry_run_text(cache: str, config: TrainConfig, asked: Asked) -> str:
    """What to print of a run that is not begun; raises the KcacheError for which it would not begin."""
    memory = None if asked.device_memory is None else size_of(asked.device_memory)
    from kcache.forecast import forecast_run

    forecast = forecast_run(cache, config, device_memory=memory)
    return json.dumps(dataclasses.asdict(forecast), indent=2) if asked.as_json else "\n".join(_lines(forecast))


def _lines(forecast: "Forecast") -> Iterator[str]:
    share = forecast.learning / forecast.parameters
    yield f"{forecast.learning:,} of {forecast.parameters:,} parameters learn ({share:.2%})"
    yield f"memory{' of each process' if forecast.processes > 1 else ''} at its fullest, {_batch_text(forecast)}:"
    for kind, size in forecast.memory.items():
        if size:
            yield f"  {kind:<12}{bytes_text(size):>10}"
    yield f"  {'in all':<12}{bytes_text(forecast.peak):>10}"
    yield f"{bytes_text(forecast.loading)} of the host's memory while the weights are loaded"
    yield _verdict(forecast)
    yield from (f"not counted: {note}" for note in forecast.notes)
    yield (
        f"rows: {bytes_text(forecast.row_bytes)}, residency {forecast.residency}; "
        f"{counted(forecast.steps, 'step')} of {counted(forecast.global_batch, 'sample')}, {forecast.epochs:.3g} epochs"
    )
    each = bytes_text(forecast.checkpoint_bytes)
    yield f"{counted(forecast.checkpoints, 'checkpoint')} in the end, of {each} each"
    if forecast.step_seconds is None:
        yield "time: not known, as no step of this run was measured yet"
    else:
        total = duration_text(forecast.steps * forecast.step_seconds)
        yield f"time: {total}, at {duration_text(forecast.step_seconds)} a step, as before"


def _batch_text(forecast: "Forecast") -> str:
    text = f"in a batch of {counted(forecast.samples, 'sample')}"
    if forecast.shape is not None:
        text += f" of {forecast.shape[0]}×{forecast.shape[1]} pixels"
    return text if forecast.tokens is None else f"{text} with {counted(forecast.tokens, 'token')}"


def _verdict(forecast: "Forecast") -> str:
    if forecast.available is None:
        return f"{forecast.device}: nobody says how much memory is free there"
    has = f"{forecast.device} has {bytes_text(forecast.available)}"
    if forecast.fits:
        return f"{has}: it fits"
    if forecast.advice is None:
        return f"{has}: it does not fit, and no flags were found by which it would"
    flags = " ".join(forecast.advice.flags)
    return f"{has}: it does not fit; with {flags} it would: {bytes_text(forecast.advice.peak)}"
