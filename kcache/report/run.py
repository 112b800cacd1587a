"""The report of a training run: what it was told, how it went, what it drew, how fast it was and on what machine."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from kcache.config import TrainConfig
from kcache.errors import RunError
from kcache.report import figures
from kcache.report.drawn.strips import drawn_blocks, spread
from kcache.report.page import Block, Section, Table, Text
from kcache.store.checkpoint import checkpoint_steps
from kcache.store.run_directory import (
    CONFIG_FILE,
    LORA_FILE,
    METRICS_FILE,
    PIPELINE_FILE,
    STARTS_FILE,
    VALIDATION_FILE,
    logger,
    new_order_of,
    read_config,
    read_log,
)

NOT_RECORDED = "not recorded"
LAST_STEPS = 100
"""Steps over which the loss, which is noisy from step to step, is averaged."""
ROWS = 20
"""Validations in the table, over all steps."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run directory says."""

    folder: Path
    told: Mapping[str, Any]
    """config.json."""
    config: Mapping[str, Any]
    """The settings in it."""
    metrics: Sequence[Mapping[str, Any]]
    validation: Sequence[Mapping[str, Any]]
    starts: Sequence[Mapping[str, Any]]
    lost: Sequence[str] = ()
    """What of its logs cannot be read."""


def read_run(folder: Path) -> Run:
    """Read a run directory, also that of a run that has just begun or has crashed, and what is readable of its logs.

    Raises RunError where config.json does not say what a run's does.
    """
    told = read_config(folder)
    try:
        config = dict(told["config"])
        str(config["stage"])
        for part in ("cache", "base", "versions"):
            dict(told[part])
        dict(told["cache"].get("tables", {})), int(told["cache"].get("samples", 0)), dict(told.get("machine", {}))
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{folder / CONFIG_FILE} does not say what this kcache writes of a run ({error!r}); expected its settings, "
            "cache, base and versions; use the kcache that wrote it, or have the run write it again: "
            "--resume-from-checkpoint latest"
        ) from error
    metrics, validation, starts = (read_log(folder, name) for name in (METRICS_FILE, VALIDATION_FILE, STARTS_FILE))
    lost = [log.lost for log in (metrics, validation, starts) if log.lost is not None]
    for what in lost:
        logger.warning("%s: left out", what)
    return Run(
        folder=folder,
        told=told,
        config=config,
        metrics=metrics.entries,
        validation=validation.entries,
        starts=starts.entries,
        lost=lost,
    )


def run_sections(run: Run) -> list[Section]:
    """All that the run directory alone tells."""
    return [
        Section(title="Overview", blocks=[_overview(run)]),
        Section(title="Course", blocks=_course(run)),
        Section(title="Validation", blocks=_validation(run)),
        Section(title="Pictures", blocks=drawn_blocks(run.folder, run.told)),
        Section(title="Speed and memory", blocks=_speed(run)),
        Section(title="Settings", blocks=_settings(run.config)),
        Section(title="Versions and machine", blocks=[_versions(run)]),
    ]


def _overview(run: Run) -> Table:
    cache, base = run.told["cache"], run.told["base"]
    tables = ", ".join(f"{name} {str(digest)[:12]}" for name, digest in sorted(dict(cache.get("tables", {})).items()))
    rows = [
        ["Folder", str(run.folder.resolve())],
        ["State", _state(run)],
        ["Trained", f"{'adapters (LoRA) for the' if run.config.get('lora_rank') else 'the'} {run.config['stage']}"],
        ["Begun from", f"{base.get('name')}" + (f" at {base['revision']}" if base.get("revision") else "")],
        ["Cache", f"{cache.get('path')}"],
        ["Samples trained on", f"{int(cache.get('samples', 0)):,}"],
        ["Tables", tables or NOT_RECORDED],
    ]
    losses = finite(run.metrics, "loss")[-LAST_STEPS:]
    if len(losses):
        rows.append(["Loss", f"{losses.mean():.5g}, mean of the last {len(losses)} of {len(run.metrics):,} steps"])
    if run.validation:
        held_out = [f"{name} {value:.5g}" for name, value in run.validation[-1].items() if name.startswith("val_")]
        rows.append([f"Held out, at step {run.validation[-1]['step']:,}", "\n".join(held_out)])
    rates = finite(run.metrics, "samples_per_second")
    if len(rates):
        rows.append(["Speed", f"{np.median(rates):,.1f} images/s, median over the steps"])
    rows += [["Left out", lost] for lost in run.lost]
    return Table(head=["What", "Value"], rows=rows)


def _state(run: Run) -> str:
    planned, checkpoints = run.told.get("max_steps"), checkpoint_steps(run.folder)
    step = run.metrics[-1]["step"] if run.metrics else 0
    done = f"{step:,} of {planned:,} steps" if isinstance(planned, int) else f"{step:,} steps"
    result = (run.folder / LORA_FILE).is_file() or (run.folder / PIPELINE_FILE).is_file()
    if result and not (isinstance(planned, int) and step < planned):
        return f"finished: {done}"
    if checkpoints:
        return f"no result yet: {done}; the newest checkpoint is of step {checkpoints[-1]:,}"
    return f"no result yet: {done}; no checkpoint" if run.metrics else "no step is recorded yet"


def _course(run: Run) -> list[Block]:
    if not run.metrics:
        return [Text(text="There is no step in metrics.jsonl: the run has just begun, or ended before its first step.")]
    holes = ", and over their holes alone" if run.config.get("inpaint") else ""
    held_out = f" Beside it the unweighted mean squared error on held-out images{holes}." if run.validation else ""
    captions = {
        figures.LOSS: f"What is trained on, as it is (faint) and smoothed.{held_out}",
        figures.LEARNING_RATE: "As the schedule gave it.",
        figures.GRADIENT_NORM: f"Clipped to {run.config.get('max_grad_norm')} before each optimizer step.",
    }
    panels = figures.run_panels(run.metrics, run.validation)
    blocks: list[Block] = [figures.curve(title, panels[title], text) for title, text in captions.items()]
    broken = [entry["step"] for entry in run.metrics if not math.isfinite(entry.get("loss", math.nan))]
    if broken:
        count = f"{len(broken):,} of {len(run.metrics):,} steps"
        blocks.append(Text(text=f"The loss of {count} is not finite, the first of step {broken[0]:,}: not drawn."))
    return blocks


def _validation(run: Run) -> list[Block]:
    if not run.validation:
        held_out = run.config.get("val_fraction")
        reason = "not come to a validation yet" if held_out else "held nothing out (--val-fraction 0)"
        return [Text(text=f"No losses on held-out images: the run has {reason}.")]
    captions = {
        figures.HELD_OUT_BANDS: "By quarters of the timesteps: from nearly clean samples (light) to nearly pure noise "
        "(dark).",
        figures.HELD_OUT_COSINE: "Mean cosine between the image embedding that the prior predicts and the true one.",
        figures.CLIP_SCORE: "Mean cosine between drawn pictures and their prompts, by the prior's CLIP.",
    }
    panels = figures.run_panels(run.metrics, run.validation)
    blocks: list[Block] = [
        figures.curve(title, panels[title], text) for title, text in captions.items() if title in panels
    ]
    names = [name for name in run.validation[-1] if name.startswith("val_")]
    shown = spread(run.validation, ROWS)
    rows = [[f"{entry['step']:,}", *(f"{entry.get(name, math.nan):.5f}" for name in names)] for entry in shown]
    heads = [name.removeprefix("val_loss_").replace("_", "–") if "_t" in name else name for name in names]
    blocks.append(Table(head=["Step", *heads], rows=rows))
    if len(shown) < len(run.validation):
        text = f"{len(shown)} of {len(run.validation):,} validations are shown, evenly spread over the steps."
        blocks.append(Text(text=text))
    return blocks


def _speed(run: Run) -> list[Block]:
    rates = finite(run.metrics, "samples_per_second")
    if not len(rates):
        return [Text(text="No step is recorded yet.")]
    text = "Of all processes together, over the steps; validations and checkpoints are left out."
    figure = figures.curve("Images per second", figures.curve_panel(run.metrics, "samples_per_second"), text)
    rows = [
        ["Images per second", f"{np.median(rates):,.1f} (median), {rates.min():,.1f} to {rates.max():,.1f}"],
        [
            "Images per optimizer step",
            f"{'up to ' if run.told.get('shapes') else ''}{run.told.get('global_batch', NOT_RECORDED)}",
        ],
        ["Where rows wait", str(run.told.get("residency", NOT_RECORDED))],
    ]
    waits, memory = finite(run.metrics, "loader_wait"), finite(run.metrics, "peak_memory_bytes")
    rows.append(["Share of time waiting for batches", f"{waits.mean():.1%}" if len(waits) else NOT_RECORDED])
    for what in ("store", "verification", "copying"):
        if len(shares := finite(run.metrics, f"wait_{what}")):
            rows.append([f"Of that, for {'the store' if what == 'store' else what}", f"{shares.mean():.1%}"])
    rows.append(["Memory at most", f"{memory.max() / 1e9:.2f} GB" if len(memory) else NOT_RECORDED])
    return [figure, Table(head=["What", "Value"], rows=rows), _starts(run)]


def _starts(run: Run) -> Block:
    if not run.starts:
        return Text(text="When the run was begun or resumed is not recorded.")
    rows = [
        [str(entry.get("time", NOT_RECORDED)), (f"{entry['step']:,}" if entry["step"] else "begun") + _order(entry)]
        for entry in run.starts
    ]
    return Table(head=["Started", "Resumed after step"], rows=rows)


def _order(start: Mapping[str, Any]) -> str:
    told = new_order_of(start)
    return "" if told is None else f", {told}"


def _settings(config: Mapping[str, Any]) -> list[Block]:
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    given, kept = [], []
    for name, value in config.items():
        default = defaults.get(name, MISSING)
        if default is not MISSING and shown_value(value) == shown_value(default):
            kept.append([name, shown_value(value)])
        else:
            given.append([name, shown_value(value), "" if default is MISSING else shown_value(default)])
    return [
        Text(text="What was set for this run:"),
        Table(head=["Setting", "Value", "Default"], rows=given),
        Text(text="What was left at its default:"),
        Table(head=["Setting", "Value"], rows=kept),
    ]


def shown_value(value: Any) -> str:
    """A setting as text: tuples and lists alike."""
    if isinstance(value, str):
        return value
    if value is None or value in ((), []):
        return "none"
    if isinstance(value, list | tuple):
        return "\n".join(map(str, value))
    return json.dumps(value)


def _versions(run: Run) -> Table:
    told = {**dict(run.told["versions"]), **dict(run.told.get("machine", {}))}
    return Table(head=["What", "Value"], rows=[[str(name), shown_value(value)] for name, value in told.items()])


def finite(entries: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """The finite values called `name`, (n,) float64."""
    values = np.array([entry[name] for entry in entries if name in entry], np.float64)
    return values[np.isfinite(values)]
