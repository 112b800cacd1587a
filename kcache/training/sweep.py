"""A sweep: several runs that differ in some settings, one after another over one opened cache, and their comparison.

The runs are [[run]] tables of a TOML file. Each goes into a folder of the sweep's output directory, where sweep.json,
sweep.md and sweep.png compare them after every run. A run that is finished is not run again, one that was interrupted
goes on, and one that fails is reported while the others go on.
"""

import gc
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kcache.config import TrainConfig
from kcache.config.sweep import PlannedRun, plan_sweep
from kcache.decoration import decoration, drawing
from kcache.disk.durable import write_bytes, write_json
from kcache.errors import KcacheError, RunError
from kcache.foreign import is_fault, reason
from kcache.report.figures import column, png_of, smoothed, thinned
from kcache.store.cache import Cache
from kcache.store.run_directory import LORA_FILE, PIPELINE_FILE, logger, read_config, read_metrics, read_validation
from kcache.training.log import Progress
from kcache.training.resume import check_place
from kcache.training.trainer import train

SWEEP_FILE = "sweep.json"
_LAST_STEPS = 100
"""Steps over which a run's loss is averaged, as it is noisy from step to step."""
_HELD_OUT = {"val_loss": "Held-out loss", "val_hole": "Held-out loss, over the hole"}
"""What is compared of validations, as far as they have it."""


@dataclass(frozen=True, kw_only=True)
class SweptRun:
    """What became of one run of a sweep."""

    name: str
    settings: Mapping[str, Any]
    """Those that its table gives."""
    step: int | None = None
    """Optimizer steps done."""
    loss: float | None = None
    """Mean over its last 100 steps."""
    val_loss: float | None = None
    """On held-out images, at the end."""
    val_hole: float | None = None
    """Over their holes alone, of a decoder that fills some."""
    samples_per_second: float | None = None
    """Mean over its last 100 steps."""
    error: str | None = None
    """Why it failed; None when it did not."""


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """What a sweep came to."""

    runs: tuple[SweptRun, ...]
    table: str = field(repr=False)
    """The comparison, in Markdown."""


def comparison_table(runs: Sequence[SweptRun], config: TrainConfig) -> str:
    """Markdown: a line per run, with every setting that some run changes; where a run does not, `config`'s value."""
    changed = list(dict.fromkeys(name for run in runs for name in run.settings))
    validated = [name for name in _HELD_OUT if any(getattr(run, name) is not None for run in runs)]
    header = ["run", *changed, "steps", f"loss (last {_LAST_STEPS})", *validated]
    rows = [[*header, "samples/s", "outcome"]]
    for run in runs:
        settings = [str(run.settings.get(name, getattr(config, name))) for name in changed]
        losses = [_number(getattr(run, name), ".5f") for name in ("loss", *validated)]
        numbers = [_number(run.step, ",d"), *losses, _number(run.samples_per_second, ",.1f")]
        # In a cell there is room for what was found, not for what to do about it.
        outcome = "finished" if run.error is None else "failed: " + run.error.partition(";")[0]
        rows.append([run.name, *settings, *numbers, outcome])
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)


def plot_runs(path: Path, run_dirs: Mapping[str, Path]) -> None:
    """Write a PNG to `path`: the smoothed training losses of all runs and, where there are any, those on held-out
    images, over their holes, too. `run_dirs` maps the runs' names to their directories.
    """
    metrics, validations = (
        {name: read(run_dir) for name, run_dir in run_dirs.items()} for read in (read_metrics, read_validation)
    )
    measured = {
        title: name for name, title in _HELD_OUT.items() if any(name in e for v in validations.values() for e in v)
    }
    colors = drawing().color_sequences["tab10" if len(run_dirs) <= 10 else "tab20"]

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, 1 + len(measured), squeeze=False)[0]
        for run, color in zip(run_dirs, itertools.cycle(colors), strict=False):
            style: dict[str, Any] = {"color": color, "linewidth": 1.6, "label": run}
            steps, losses = thinned(*column(metrics[run], "loss"))
            axes[0].plot(steps, smoothed(losses), marker="o" if len(steps) == 1 else "", **style)
            for panel, name in zip(axes[1:], measured.values(), strict=True):
                panel.plot(*column(validations[run], name), marker="o", **style)
        for panel, title in zip(axes, ("Training loss, smoothed", *measured), strict=True):
            panel.set(title=title, xlabel="optimizer step")
            panel.grid(visible=True)
        axes[0].legend()

    write_bytes(path, png_of(draw, 7 * (1 + len(measured)), 5, dpi=120))


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def run_sweep(
    cache: str | Path,
    config: TrainConfig,
    sweep: Path,
    *,
    report: Callable[[str, Progress], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> SweepResult:
    """Train every run of the TOML file `sweep` that is not finished, and compare them all.

    `config` holds what the runs share, and in `output_dir` the sweep's directory. `report` is called with a run's name
    and progress, `say` with a line whenever a run is begun, left out or has failed. A run fails by a KcacheError or by
    what the system or torch raises, such as a lack of memory; on several processes, which cannot be brought back into
    step, that ends the sweep. Raises ConfigError for a plan that cannot be, see `plan_sweep`, and RunError when a
    finished run was trained otherwise than it is planned now, both before anything is trained.
    """
    planned = plan_sweep(sweep, config)
    folder = Path(config.output_dir)
    check_place(folder, ours=(folder / SWEEP_FILE).exists())
    opened = Cache.open(cache, config.resolution, config.aspect_ratio_buckets, config.mirrored)
    records = _read_records(folder / SWEEP_FILE, [run.name for run in planned])
    finished = {run.name for run in planned if _is_finished(run, records.get(run.name), opened.fingerprint)}
    # By what launchers set, as processes know nothing of each other before the first run.
    first = int(os.environ.get("RANK", "0")) == 0
    tell = say if say is not None and first else lambda text: None
    runs: list[SweptRun] = []
    for run in planned:
        if run.name in finished:
            tell(f"{run.name}: finished before, not run again")
            runs.append(_swept(run))
        else:
            tell(f"{run.name}: {', '.join(f'{name} {value}' for name, value in run.settings.items()) or 'as given'}")
            runs.append(_train(run, opened, report, tell))
        records[run.name] = {"cache": opened.fingerprint, "config": asdict(run.config), "run": asdict(runs[-1])}
        result = SweepResult(runs=tuple(runs), table=comparison_table(runs, config))
        if first:
            _write(folder, records, result)
    return result


def _train(
    run: PlannedRun, cache: Cache, report: Callable[[str, Progress], None] | None, tell: Callable[[str], None]
) -> SweptRun:
    # What was not begun has no checkpoint, which is no surprise here.
    config = run.config if Path(run.config.output_dir).exists() else replace(run.config, resume_from_checkpoint=None)
    try:
        train(cache, config, report=None if report is None else partial(report, run.name))
        return _swept(run)
    except Exception as error:  # the other runs go on, and this one's line says what happened
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise
        if is_fault(error) and not isinstance(error, KcacheError | RuntimeError):  # every run would have it
            raise
        why = reason(error)
        tell(f"{run.name} failed: {why}")
        return _swept(run, error=why)
    finally:
        # Networks and optimizers refer to themselves: without this the next run's would stand beside them in memory.
        gc.collect()


def _swept(run: PlannedRun, error: str | None = None) -> SweptRun:
    """What the run's directory says about it, which is nothing where it was not begun."""
    run_dir = Path(run.config.output_dir)
    last, validations = read_metrics(run_dir)[-_LAST_STEPS:], read_validation(run_dir)

    def mean(value: str) -> float | None:
        known = [entry[value] for entry in last if value in entry]
        return sum(known) / len(known) if known else None

    return SweptRun(
        name=run.name,
        settings=run.settings,
        step=last[-1]["step"] if last else None,
        loss=mean("loss"),
        **{name: validations[-1].get(name) for name in _HELD_OUT if validations},
        samples_per_second=mean("samples_per_second"),
        error=error,
    )


def _is_finished(run: PlannedRun, record: Mapping[str, Any] | None, fingerprint: str) -> bool:
    """Whether the run was trained to its end; raises RunError when that was with other settings or rows."""
    run_dir = Path(run.config.output_dir)
    if record is None or record["run"]["error"] is not None or not run_dir.is_dir():
        return False
    begun, asked = record["config"], json.loads(json.dumps(asdict(run.config)))
    # A sweep's directory may be moved, and may be older than a setting; every run that is begun may go on.
    compared = [name for name in asked if name in begun and name not in ("output_dir", "resume_from_checkpoint")]
    changed = [f"{name}: {begun[name]} → {asked[name]}" for name in compared if begun[name] != asked[name]]
    if record["cache"] not in (None, fingerprint):
        changed.append(f"cache: {record['cache'][:16]} → {fingerprint[:16]}")
    if changed:
        raise RunError(
            f"{run_dir} was trained with other settings than the sweep gives now ({', '.join(changed)}); expected the "
            "same, to compare it without training it again; give the run another name, or remove the folder"
        )
    return True


def _read_records(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """What sweep.json says of each run by its name, runs included that the sweep no longer has.

    Where it cannot be read it is written anew, which is said, from what each of the runs `names` says of itself.
    """
    if not path.exists():
        return {}
    try:
        runs = dict(json.loads(path.read_bytes())["runs"])
        [(str(run["cache"]), dict(run["config"]), run["run"]["error"]) for run in runs.values()]
        return runs
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        logger.warning("%s cannot be read (%r): it is written anew, from what the runs say of themselves", path, error)
    return {name: record for name in names if (record := _recorded_in(path.parent / name)) is not None}


def _recorded_in(run_dir: Path) -> dict[str, Any] | None:
    """What a finished run says of itself: all but the whole of its cache; None where it is not finished."""
    try:
        told = read_config(run_dir)
    except RunError:
        return None
    ended = [entry["step"] for entry in read_metrics(run_dir)[-1:]] == [told.get("max_steps")]
    if not ended or not any((run_dir / name).is_file() for name in (LORA_FILE, PIPELINE_FILE)):
        return None
    return {"cache": None, "config": told["config"], "run": {"error": None}}


def _write(folder: Path, records: Mapping[str, Any], result: SweepResult) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SWEEP_FILE, {"runs": records})
    write_bytes(folder / "sweep.md", (result.table + "\n").encode())
    with decoration(f"{folder / 'sweep.png'} could not be drawn"):
        plot_runs(folder / "sweep.png", {run.name: folder / run.name for run in result.runs})
