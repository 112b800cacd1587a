"""Runs compared: what became of each, side by side as a table, and their losses on one pair of axes."""

import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kcache.config import TrainConfig
from kcache.curves import smoothed, thinned
from kcache.durable import write_bytes
from kcache.run_directory import read_metrics, read_validation

__all__ = ["SweptRun", "comparison_table", "plot_runs", "swept_run"]

_LAST_STEPS = 100
"""Steps over which a run's loss is averaged, as it is noisy from step to step."""


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
    samples_per_second: float | None = None
    """Mean over its last 100 steps."""
    error: str | None = None
    """Why it failed; None when it did not."""


def swept_run(name: str, settings: Mapping[str, Any], run_dir: Path, error: str | None = None) -> SweptRun:
    """What the run's directory says about it, which is nothing where it was not begun."""
    last, validations = read_metrics(run_dir)[-_LAST_STEPS:], read_validation(run_dir)

    def mean(value: str) -> float | None:
        return sum(entry[value] for entry in last) / len(last) if last else None

    return SweptRun(
        name=name,
        settings=settings,
        step=last[-1]["step"] if last else None,
        loss=mean("loss"),
        val_loss=validations[-1]["val_loss"] if validations else None,
        samples_per_second=mean("samples_per_second"),
        error=error,
    )


def comparison_table(runs: Sequence[SweptRun], config: TrainConfig) -> str:
    """Markdown: a line per run, with every setting that some run changes; where a run does not, `config`'s value."""
    changed = list(dict.fromkeys(name for run in runs for name in run.settings))
    validated = any(run.val_loss is not None for run in runs)
    header = ["run", *changed, "steps", f"loss (last {_LAST_STEPS})", *(["val_loss"] if validated else [])]
    rows = [[*header, "samples/s", "outcome"]]
    for run in runs:
        settings = [str(run.settings.get(name, getattr(config, name))) for name in changed]
        losses = [_number(run.loss, ".5f"), *([_number(run.val_loss, ".5f")] if validated else [])]
        numbers = [_number(run.step, ",d"), *losses, _number(run.samples_per_second, ",.1f")]
        rows.append([run.name, *settings, *numbers, _outcome(run)])
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)


def plot_runs(path: Path, run_dirs: Mapping[str, Path]) -> None:
    """Write a PNG to `path`: the smoothed training losses of all runs and, where there are any, those on held-out
    images. `run_dirs` maps the runs' names to their directories.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    training = {name: _curve(read_metrics(run_dir), "loss") for name, run_dir in run_dirs.items()}
    held_out = {name: _curve(read_validation(run_dir), "val_loss") for name, run_dir in run_dirs.items()}
    panels = 2 if any(len(steps) for steps, _ in held_out.values()) else 1
    figure = Figure(figsize=(7 * panels, 5), layout="constrained")
    axes = [figure.add_subplot(1, panels, number + 1) for number in range(panels)]
    colors = mpl.color_sequences["tab10" if len(run_dirs) <= 10 else "tab20"]
    for name, color in zip(run_dirs, itertools.cycle(colors), strict=False):
        style: dict[str, Any] = {"color": color, "linewidth": 1.6, "label": name}
        steps, losses = thinned(*training[name])
        axes[0].plot(steps, smoothed(losses), marker="o" if len(steps) == 1 else "", **style)
        if panels == 2:
            axes[1].plot(*held_out[name], marker="o", markersize=4, **style)
    for panel, title in zip(axes, ("Training loss, smoothed", "Held-out loss"), strict=False):
        panel.set_title(title, loc="left", fontweight="bold")
        panel.set_xlabel("optimizer step")
        panel.grid(color="#e6e8ea", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_bytes(path, picture.getvalue())


def _curve(entries: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of all entries, each (n,) float64."""
    return np.array([entry["step"] for entry in entries], np.float64), np.array([entry[name] for entry in entries])


def _outcome(run: SweptRun) -> str:
    """In a cell there is room for what was found, not for what to do about it."""
    return "finished" if run.error is None else "failed: " + run.error.partition(";")[0]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
