"""The demo on one page: what went in, how the losses fell, how fast it was, what came out."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from kcache.demo.result import DemoResult, StageResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

__all__ = ["draw_result"]

CACHED, ONLINE, TEXT, FAINT = "#0b6e69", "#f2a65a", "#22262b", "#7a828c"
"""Colours of the cached runs, the online runs, the writing and the small print."""


def draw_result(result: DemoResult, path: Path) -> None:
    """Draw `result` as a PNG of 1800 x 1275 pixels at `path`."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 9, "text.color": TEXT, "axes.labelcolor": TEXT, "axes.edgecolor": FAINT}):
        figure = Figure(figsize=(12, 8.5), dpi=150, facecolor="white")
        panels = np.asarray(figure.subfigures(4, 1, height_ratios=(0.5, 1, 1.6, 1.1)))
        head, top, middle, bottom = panels
        _headline(head, result)
        _pictures(top, "What went in", result.inputs)
        _measurements(middle, result)
        _pictures(bottom, "What came out", result.outputs)
        bottom.text(
            0.035,
            0.04,
            "The networks are tiny and the frozen ones have random weights: these pictures show that the pipelines "
            "load and run what was trained; they are not meant to be recognisable.",
            color=FAINT,
            fontsize=8,
        )
        figure.savefig(path)


def _headline(panel: "SubFigure", result: DemoResult) -> None:
    panel.text(0.035, 0.62, "kcache: encode once, train many times", fontsize=17, fontweight="bold", va="center")
    built = (
        f"{result.images:,} pictures and {result.captions:,} captions encoded in {result.build_seconds:.1f} s, "
        f"{result.cache_bytes / 1e6:.1f} MB; building again: {result.rebuild_seconds:.1f} s"
    )
    panel.text(0.035, 0.26, built, fontsize=10, color=FAINT, va="center")


def _pictures(panel: "SubFigure", title: str, pictures: Sequence[tuple[Path, str]]) -> None:
    panel.text(0.035, 0.93, title, fontsize=10, fontweight="bold", va="center")
    axes = panel.subplots(1, len(pictures), gridspec_kw={"wspace": 0.25})
    panel.subplots_adjust(left=0.035, right=0.965, top=0.84, bottom=0.24)
    for ax, (path, caption) in zip(axes, pictures, strict=True):
        with Image.open(path) as picture:
            ax.imshow(np.asarray(picture.convert("RGB")), interpolation="nearest")
        ax.set_xlabel("\n".join(textwrap.wrap(caption, 18)), fontsize=8)
        ax.set_xticks([])
        ax.set_yticks([])


def _measurements(panel: "SubFigure", result: DemoResult) -> None:
    axes = panel.subplots(1, len(result.stages) + 1, gridspec_kw={"wspace": 0.28})
    panel.subplots_adjust(left=0.065, right=0.965, top=0.84, bottom=0.16)
    for ax, stage in zip(axes, result.stages, strict=False):
        _loss_curves(ax, stage)
    _throughput(axes[-1], result)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(colors=FAINT, labelsize=8)


def _loss_curves(ax: "Axes", stage: StageResult) -> None:
    steps = np.arange(1, len(stage.cached.losses) + 1)
    ax.plot(steps, stage.online.losses, color=ONLINE, linewidth=4, label="encoders in the loop", solid_capstyle="round")
    ax.plot(steps, stage.cached.losses, color=CACHED, linewidth=1.2, label="from the cache")
    difference = stage.largest_difference
    equal = "equal bit for bit" if difference == 0 else f"differ by at most {difference:.1e}"
    ax.set_title(f"Loss of the {stage.stage}: {equal}", loc="left", fontsize=10, fontweight="bold")
    ax.set_yscale("log")
    ax.set_xlabel("optimizer step")
    ax.legend(frameon=False, fontsize=8)


def _throughput(ax: "Axes", result: DemoResult) -> None:
    places = np.arange(len(result.stages))
    for shift, color, attribute in ((-0.2, ONLINE, "online"), (0.2, CACHED, "cached")):
        rates = [getattr(stage, attribute).samples_per_second for stage in result.stages]
        bars = ax.bar(places + shift, rates, width=0.36, color=color)
        ax.bar_label(bars, [f"{rate:,.0f}" for rate in rates], fontsize=8, padding=2)
    ax.set_xticks(places, [f"{stage.stage}\n{stage.speedup:.1f} × as fast" for stage in result.stages])
    ax.margins(y=0.12)
    ax.set_title("Training speed, images per second", loc="left", fontsize=10, fontweight="bold")
