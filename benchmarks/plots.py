"""The pictures of `report.py`: bars of training steps and readers, curves of growth."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["draw_growth", "draw_loader", "draw_train_steps"]

Report = Mapping[str, Any]
TEXT, FAINT = "#22262b", "#7a828c"
COLORS = {"cached": "#0b6e69", "online": "#d1495b", "compute only": "#b8bec5", "encoders only": "#f2b134"}
"""Of the ways of a training step, by how their names begin."""
OURS, BASELINE, OTHERS = "#0b6e69", "#b8bec5", "#e07a3f"
"""Of the loader, of gathers from memory and sequential reads, and of other readers."""
RESIDENCIES = {"mmap": "#0b6e69", "ram": "#e07a3f"}
STYLE = {"font.size": 9, "text.color": TEXT, "axes.labelcolor": TEXT, "axes.edgecolor": FAINT}
QUANTITIES = {
    "bytes": ("Size on disk", "MB", 1e6),
    "open_seconds": ("Opening", "ms", 1e-3),
    "first_batch_seconds": ("First batch", "ms", 1e-3),
    "memory_bytes": ("Memory of its own", "MB", 1e6),
    "batch_milliseconds": ("Any later batch", "ms", 1.0),
}


def draw_train_steps(reports: Sequence[Report], path: Path) -> None:
    """Images per second of every way, one panel per case that fitted into memory."""
    cases = [case for report in reports for case in report["results"] if "ways" in case]
    if not cases:
        return
    with mpl.rc_context(STYLE):
        rows = -(-len(cases) // 2)
        tallest = max(len(case["ways"]) + ("upstream" in case) for case in cases)
        figure = _figure(12, rows * (0.28 * tallest + 1.1), "A training step, images per second", reports)
        grid = figure.subplots(rows, 2, squeeze=False).flatten()
        for ax, case in zip(grid, cases, strict=False):
            size = f" @{case['resolution']}" if case["resolution"] else ""
            learns = f"LoRA {case['lora_rank']}" if case["lora_rank"] else "whole network"
            _title(ax, f"{case['model_size']} {case['stage']}{size}, batch {case['batch_size']}, {learns}")
            rates = {name: row["images_per_second"] for name, row in case["ways"].items()}
            if "images_per_second" in case.get("upstream", {}):
                rates["upstream's script"] = case["upstream"]["images_per_second"]
            colors = [
                next((color for start, color in COLORS.items() if name.startswith(start)), OTHERS) for name in rates
            ]
            _bars(ax, rates, colors)
        for ax in grid[len(cases) :]:
            ax.set_visible(False)
        figure.savefig(path, format="png")


def draw_loader(reports: Sequence[Report], path: Path) -> None:
    """Rows per second of every reader, one panel per form of a cache."""
    forms = [(form, ways) for report in reports for form, ways in report["results"].items()]
    with mpl.rc_context(STYLE):
        height = 0.3 * max(len(ways) for _, ways in forms) + 1.3
        figure = _figure(12, height, "The loader beside other readers, rows per second (logarithmic)", reports)
        for ax, (form, ways) in zip(figure.subplots(1, len(forms), squeeze=False)[0], forms, strict=True):
            _title(ax, form)
            ax.set_xscale("log")
            colors = [_reader_color(name) for name in ways]
            _bars(ax, {name: row["rows_per_second"] for name, row in ways.items()}, colors)
            low, high = ax.get_xlim()
            ax.set_xlim(low / 2, high * 2)  # room for the numbers
        figure.savefig(path, format="png")


def draw_growth(reports: Sequence[Report], path: Path) -> None:
    """Every quantity over the number of rows, both axes logarithmic, with the slope at the end."""
    with mpl.rc_context(STYLE):
        figure = _figure(15, 3.6, "What grows with a cache", reports)
        axes = figure.subplots(1, len(QUANTITIES))
        for ax, (name, (title, unit, scale)) in zip(axes, QUANTITIES.items(), strict=True):
            _title(ax, f"{title}, {unit}")
            for residency, color in RESIDENCIES.items():
                sizes = reports[0]["results"]["sizes"]
                values = [size[name] if name in size else size["residencies"][residency][name] for size in sizes]
                growth = reports[0]["results"]["growth"]
                found = growth[name] if name in growth else growth[f"{residency}, {name}"]
                label = found["grows"] if name in growth else f"{residency}: {found['grows']}"
                samples = [size["samples"] for size in sizes]
                ax.plot(samples, [value / scale for value in values], "o-", color=color, markersize=4, label=label)
                if name in growth:
                    break
            ax.set_xscale("log")
            ax.set_yscale("log")
            ax.set_xlabel("rows")
            ax.margins(y=0.3)
            ax.grid(color="#e6e8ea", linewidth=0.6)
            ax.legend(frameon=False, fontsize=8)
        figure.savefig(path, format="png")


def _figure(width: float, height: float, title: str, reports: Sequence[Report]) -> Figure:
    figure = Figure(figsize=(width, height), dpi=120, facecolor="white", layout="constrained")
    machine = reports[0]["machine"]
    where = f"{machine.get('gpu') or machine['cpu']}, {machine['date']}, commit {machine['commit']}"
    figure.suptitle(f"{title}: {where}", x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def _title(ax: Axes, title: str) -> None:
    ax.set_title(title, loc="left", fontsize=9, fontweight="bold")
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(colors=FAINT, labelsize=8)
    ax.set_axisbelow(True)


def _bars(ax: Axes, values: Mapping[str, float], colors: Sequence[str]) -> None:
    """One horizontal bar per value, the first on top, with its number behind it."""
    bars = ax.barh(list(values), list(values.values()), color=colors)
    ax.bar_label(bars, [f"{value:,.4g}" if value < 1000 else f"{value:,.0f}" for value in values.values()], padding=3)
    ax.invert_yaxis()
    ax.margins(x=0.15)
    ax.tick_params(axis="y", length=0, labelcolor=TEXT)


def _reader_color(name: str) -> str:
    if name.startswith("loader"):
        return OURS
    return BASELINE if name.startswith(("gather", "files")) else OTHERS
