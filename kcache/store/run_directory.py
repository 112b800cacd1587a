"""A run directory: what a run was told, how it went, and the names of what it leaves.

config.json holds the settings, metrics.jsonl one line per optimizer step, validation.jsonl one per validation,
starts.jsonl one per start of the run. Checkpoints lie beside them (see `kcache.store.checkpoint`), and in the end the
result: a pipeline's folders or a LoRA, its card, its curves and the pictures that were drawn.

These files tell of a run, and decide nothing: what of them cannot be read is left out, and said.
"""

import json
import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

from kcache.config import TrainConfig
from kcache.decoration import decoration
from kcache.disk.durable import write_bytes, write_json
from kcache.errors import RunError
from kcache.hints import broken_link
from kcache.store.checkpoint import STATE_FILE

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
VALIDATION_FILE = "validation.jsonl"
STARTS_FILE = "starts.jsonl"
_NUMBERED = {METRICS_FILE: "loss", VALIDATION_FILE: "val_loss"}
"""The logs of numbers by optimizer step, and the number that every line of them has."""

CARD_FILE = "README.md"
CURVES_FILE = "loss.png"
PICTURES_FOLDER = "pictures"
RAW_FOLDER = "raw"
"""Where the weights as they were at the last step lie, when the result is their average."""
LORA_FILE = "pytorch_lora_weights.safetensors"
"""Adapters, by diffusers' name."""
PIPELINE_FILE = "model_index.json"
"""What makes the directory a pipeline: written last."""
RESULT = (CARD_FILE, CURVES_FILE, PICTURES_FOLDER, RAW_FOLDER, LORA_FILE, PIPELINE_FILE)
"""What a run leaves beside its settings, logs and checkpoints, but for the components of a pipeline."""
AVERAGE_FILE = "ema.safetensors"
"""The moving average of what learns, in a checkpoint."""
_HALVES = {"prior": "prior", "unet": "decoder"}
"""Which half of Kandinsky 2.2 a network's folder is of."""


@dataclass(frozen=True, kw_only=True)
class Log:
    """What can be read of a log, and what cannot."""

    entries: list[dict[str, Any]]
    """In the order of their steps; of several for one step the last, but for starts."""
    lost: str | None
    """What is left out, and of which file; None where that is nothing."""


def is_run(folder: Path) -> bool:
    """Whether `folder` is a run directory: one with settings and with a log, whatever of these can be read."""
    logs = (METRICS_FILE, VALIDATION_FILE, STARTS_FILE)
    return os.path.lexists(folder / CONFIG_FILE) and any(os.path.lexists(folder / name) for name in logs)


def start_run(
    config: TrainConfig, facts: Mapping[str, Any], first_step: int, told: Mapping[str, Any] | None = None
) -> None:
    """Make the run directory: write config.json, and keep of the lines of earlier starts those up to `first_step`.

    `told` is what starts.jsonl is to say of this start beside its step and time. A log with lines that cannot be read
    is set aside, and goes on with the others; what cannot be written stays as it is. Both are said.
    """
    run_dir = Path(config.output_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    for name in (METRICS_FILE, VALIDATION_FILE, STARTS_FILE):
        with decoration(f"{run_dir / name} could not be written"):
            log = read_log(run_dir, name)
            if log.lost is not None:
                logger.warning("%s; the run goes on, and they stay in %s", log.lost, set_aside(run_dir / name).name)
            kept = [entry for entry in log.entries if entry["step"] <= first_step]
            write_bytes(run_dir / name, _lines(kept).encode())
    # After metrics.jsonl, by which a run directory is told from another folder with a file of this name.
    with decoration(f"{run_dir / CONFIG_FILE} could not be written"):
        if os.path.lexists(run_dir / CONFIG_FILE) and not (run_dir / CONFIG_FILE).is_file():
            logger.warning("%s is no file: it is now %s", run_dir / CONFIG_FILE, set_aside(run_dir / CONFIG_FILE).name)
        write_json(run_dir / CONFIG_FILE, {**facts, "config": asdict(config)})
    with decoration(f"{run_dir / STARTS_FILE} could not be written"):
        began = datetime.now(UTC).isoformat(timespec="seconds")
        _append(run_dir / STARTS_FILE, [{"step": first_step, "time": began, **(told or {})}])


def set_aside(path: Path, word: str = "damaged") -> Path:
    """Rename what is at `path`, whatever it is, to a name beside it that nothing has: metrics.jsonl.damaged."""
    names = (f"{path.name}.{word}{'' if number == 1 else f'-{number}'}" for number in count(1))
    free = next(path.with_name(name) for name in names if not os.path.lexists(path.with_name(name)))
    path.rename(free)
    return free


def read_config(run_dir: Path) -> dict[str, Any]:
    """What config.json says: the settings under "config", and what the run found; RunError where there is none."""
    path = run_dir / CONFIG_FILE
    try:
        told = json.loads(path.read_bytes())
        if not isinstance(told, dict):
            raise TypeError(f"it is a {type(told).__name__}")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise RunError(
            f"{path} cannot be read ({error}); expected what a training run writes; give the directory of a run, or "
            "have this one write it again: --resume-from-checkpoint latest"
        ) from error
    return told


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says of each optimizer step, in order; what of it cannot be read is left out, and said."""
    return _heard(read_log(run_dir, METRICS_FILE))


def read_validation(run_dir: Path) -> list[dict[str, Any]]:
    """What validation.jsonl says of each validation, in order; as `read_metrics`."""
    return _heard(read_log(run_dir, VALIDATION_FILE))


def read_starts(run_dir: Path) -> list[dict[str, Any]]:
    """When the run was begun or resumed, and after which step, in order; as `read_metrics`."""
    return _heard(read_log(run_dir, STARTS_FILE))


def run_of(folder: Path) -> Path | None:
    """The run directory that `folder` is, or is a checkpoint or raw/ of; None where it is neither."""
    is_part = folder.name == RAW_FOLDER or folder.name.startswith("checkpoint-")
    run_dir = folder.absolute().parent if is_part else folder
    return run_dir if is_run(run_dir) else None


def base_of(folder: Path) -> tuple[str, str | None] | None:
    """Name and revision of the repository that a checkpoint, or the run that `folder` belongs to, was begun from.

    None where that is not told.
    """
    try:
        base = json.loads((folder / STATE_FILE).read_bytes())["state"]["base"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        run_dir = run_of(folder)
        try:
            base = {} if run_dir is None else read_config(run_dir)["base"]
        except RunError:
            base = {}
    name, revision = (base.get(key) for key in ("name", "revision")) if isinstance(base, dict) else (None, None)
    return (name, revision if isinstance(revision, str) else None) if isinstance(name, str) else None


def instead_of_pipeline(folder: Path, missing: Sequence[Path]) -> str | None:
    """What `folder`, which lacks the files `missing` of a pipeline, is or has instead, and what to type; else None."""
    for path in missing:
        if (broken := broken_link(path)) is not None:
            stage = "decoder" if (folder / "unet").exists() else "prior"
            link_anew = (
                "put that back where it was, or have the run link to where it is now, by its own command with "
                f"--resume-from-checkpoint latest --pretrained-{stage}-model-name-or-path FOLDER"
            )
            what = link_anew if is_run(folder) else "put that back, or fetch it again"
            return f"is not whole: {broken}; expected a whole pipeline; {what}"
    half = next((half for name, half in _HALVES.items() if (folder / name).is_dir()), None)
    step = folder.name.removeprefix("checkpoint-")
    if (folder / STATE_FILE).is_file():
        again = f"--resume-from-checkpoint {shlex.quote(str(folder))} --max-train-steps {step} --output-dir NEW"
        draw = f"--{half} {shlex.quote(str(folder))}" if half else f"--lora {shlex.quote(str(folder))}"
        return (
            f"is a checkpoint, which holds {f'the {half} alone' if half else 'adapters (LoRA)'}; expected a whole "
            f"pipeline; draw with it: kcache sample PROMPT {draw}; or make it the result of a run, by the run's own "
            f"command with {again}"
        )
    if folder.name == RAW_FOLDER and half and is_run(folder.parent):
        return (
            f"holds the {half} alone, as it was at the last step; expected a whole pipeline; draw with it: kcache "
            f"sample PROMPT --{half} {shlex.quote(str(folder))}; or give the run's result, {folder.parent}"
        )
    return None


def new_order_of(start: Mapping[str, Any]) -> str | None:
    """What an entry of starts.jsonl says of an order of samples that began with it, in words; None where none did."""
    told = start.get("new_order")
    if not isinstance(told, Mapping):
        return None
    return f"in a new order of {told.get('samples')} samples, where there were {told.get('before') or 'others'}"


def append_metrics(run_dir: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Add a line per entry to metrics.jsonl."""
    _append(run_dir / METRICS_FILE, entries)


def append_validation(run_dir: Path, entry: Mapping[str, Any]) -> None:
    """Add a line to validation.jsonl."""
    _append(run_dir / VALIDATION_FILE, [entry])


def read_log(run_dir: Path, name: str) -> Log:
    """What the log `name` of `run_dir` says; whatever the file is, nothing is raised.

    A last line that was cut off, as a kill leaves it, is no damage: the run does that step again. A line of metrics or
    of a validation has a step and finite or infinite numbers, one of a start a step.
    """
    path = run_dir / name
    if not os.path.lexists(path):
        return Log(entries=[], lost=None)
    if not path.is_file():  # a pipe would be waited for
        return Log(entries=[], lost=f"{path} is no file")
    try:
        *lines, last = path.read_bytes().split(b"\n")
    except OSError as error:
        return Log(entries=[], lost=f"{path} cannot be read ({error.strerror})")
    lines = [line for line in (*lines, last) if line.strip()]
    found = [_entry(line, _NUMBERED.get(name)) for line in lines]
    entries = [entry for entry in found if entry is not None]
    was_cut = bool(last.strip()) and found[-1] is None and last.startswith(b"{") and b"\0" not in last
    unread = len(lines) - len(entries) - was_cut
    lost = [f"{unread:,} of {len(lines):,} lines cannot be read"] if unread else []
    if name in _NUMBERED:
        by_step = {entry["step"]: entry for entry in entries}
        if len(by_step) < len(entries):
            lost.append(f"{len(entries) - len(by_step):,} of steps that come again")
        entries = sorted(by_step.values(), key=lambda entry: entry["step"])
    return Log(entries=entries, lost=f"{path}: {' and '.join(lost)}" if lost else None)


def _entry(line: bytes, number: str | None) -> dict[str, Any] | None:
    """What a line says; None where that is nothing, or not what a line of its log does."""
    try:
        said = json.loads(line.decode())
        step = said.pop("step")
        if type(step) is not int or not 0 <= step < 2**63:
            return None
        if number is not None:
            said = {name: _number(value) for name, value in said.items()}
            said[number]
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None
    return {"step": step, **said}


def _number(value: Any) -> int | float:
    """The number itself; raises TypeError for anything else, and OverflowError for one that no float can be."""
    if type(value) not in (int, float):
        raise TypeError
    float(value)
    return value


def _heard(log: Log) -> list[dict[str, Any]]:
    if log.lost is not None:
        _say(log.lost)
    return log.entries


@lru_cache
def _say(lost: str) -> None:
    """Warn once of what several readers find."""
    logger.warning("%s: left out", lost)


def _append(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    with path.open("ab", buffering=0) as file:
        before, rest = os.fstat(file.fileno()).st_size, _lines(entries).encode()
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            with suppress(OSError):  # the lines after it are not to go on in the middle of one
                file.truncate(before)
            raise


def _lines(entries: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)
