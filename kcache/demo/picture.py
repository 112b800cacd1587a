"""The demo in pictures: what went in, how the losses fell, how fast it was, where the time went, what came out."""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from kcache.demo.result import DemoResult, StageResult
from kcache.disk.durable import write_bytes
from kcache.report import page
from kcache.report.figures import FAINT, TEAL, TEXT, png_of

if TYPE_CHECKING:  # it is loaded where it is drawn with
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

CACHED, ONLINE = TEAL, "#f2a65a"
"""Colours of the cached and the online runs."""
PHASES = ("#e2dccc", "#a23b72", "#7fb3ae", ONLINE, CACHED, "#3b2f6b")
"""Colours of where the time went."""
COLUMNS = 10
"""Prompts that are shown with their pictures."""
SAMPLES = 3
"""Pictures of each that are shown on the page."""
WIDTH = 12.0
"""Inches, as all sizes here."""

Part = Callable[["SubFigure", DemoResult], None]
"""Draws one part of the page."""


def draw_result(result: DemoResult, path: Path) -> None:
    """Draw all of `result` on one page: a PNG at `path`, 1800 pixels wide.

    Raises CacheWriteError when it cannot be written.
    """
    samples = min(SAMPLES, result.size.samples)
    parts = (
        (_headline, 0.85),
        (show_inputs, 1.75),
        (show_measurements, 2.75),
        (show_time, 0.95),
        (_scores, 1.35),
        (lambda panel, result: show_drawn(panel, result, samples), samples + 0.6),
    )
    write_bytes(path, _draw(parts, result))


def draw_part(part: Part, height: float, result: DemoResult, caption: str) -> page.Figure:
    """One part alone for a page, 1800 pixels wide and `height` inches of 150 pixels high."""
    return page.Figure(png=_draw(((part, height),), result), caption=caption, density=2)


def _draw(parts: Sequence[tuple[Part, float]], result: DemoResult) -> bytes:
    heights = [height for _, height in parts]

    def draw(figure: "Figure") -> None:
        panels = figure.subfigures(len(parts), 1, height_ratios=heights, squeeze=False)[:, 0]
        for panel, (part, _) in zip(panels, parts, strict=True):
            part(panel, result)

    return png_of(draw, WIDTH, sum(heights), dpi=150, layout=None)


def _headline(panel: "SubFigure", result: DemoResult) -> None:
    panel.text(0.035, 0.62, "kcache: encode once, train many times", fontsize=17, fontweight="bold", va="center")
    built = (
        f"{result.images:,} pictures and {result.captions:,} captions encoded in {result.build_seconds:.1f} s, "
        f"{result.cache_bytes / 1e6:.1f} MB; building again: {result.rebuild_seconds:.1f} s"
    )
    panel.text(0.035, 0.26, built, fontsize=10, color=FAINT, va="center")


def show_inputs(panel: "SubFigure", result: DemoResult) -> None:
    """Some of the pictures that went in, with a caption each."""
    _title(panel, 0.93, "What went in")
    axes = panel.subplots(1, len(result.inputs), gridspec_kw={"wspace": 0.25}, squeeze=False)
    panel.subplots_adjust(left=0.035, right=0.965, top=0.84, bottom=0.3)
    for ax, (path, caption) in zip(axes[0], result.inputs, strict=True):
        _show(ax, path)
        ax.set_xlabel(_wrapped(caption), fontsize=8)


def _scores(panel: "SubFigure", result: DemoResult) -> None:
    exam = result.exam
    _title(panel, 0.86, "What came out")
    asked = (
        f"{exam.pictures} pictures of {len(exam.drawn)} prompts whose digit and ink never went together in training, "
        "drawn by the stock pipelines and judged from their pixels:"
    )
    panel.text(0.035, 0.62, asked, color=FAINT, va="center")
    for i, (name, score) in enumerate(exam.compared.items()):
        height, color = 0.44 - 0.16 * i, TEXT if i == 0 else FAINT
        panel.text(0.035, height, name, color=color, va="center")
        for column, (attribute, share) in enumerate(
            zip(("digit", "ink", "paper", "all three"), score.cells, strict=True)
        ):
            panel.text(0.26 + 0.13 * column, height, f"{attribute} {share} %", color=color, va="center")


def show_drawn(panel: "SubFigure", result: DemoResult, samples: int) -> None:
    """`samples` pictures of each of the first prompts, the prompt below."""
    shown = result.exam.drawn[:COLUMNS]
    axes = panel.subplots(samples, len(shown), gridspec_kw={"wspace": 0.25, "hspace": 0.08}, squeeze=False)
    panel.subplots_adjust(left=0.035, right=0.965, top=0.985, bottom=0.6 / (samples + 0.6))
    for column, (prompt, paths) in zip(axes.T, shown, strict=True):
        for ax, path in zip(column, paths[:samples], strict=True):
            _show(ax, path)
        column[-1].set_xlabel(_wrapped(prompt), fontsize=8)


def show_learning(panel: "SubFigure", result: DemoResult) -> None:
    """The same prompts from the same noise, one row for each look at the decoder while it learned."""
    looks, prompts = result.looks, [prompt for prompt, _ in result.exam.drawn]
    columns = min(len(prompts), len(looks[0][1]))
    axes = panel.subplots(len(looks), columns, gridspec_kw={"wspace": 0.25, "hspace": 0.08}, squeeze=False)
    panel.subplots_adjust(left=0.075, right=0.965, top=0.985, bottom=0.6 / (len(looks) + 0.6))
    for row, (step, paths) in zip(axes, looks, strict=True):
        for ax, path in zip(row, paths, strict=False):
            _show(ax, path)
        row[0].set_ylabel(f"{step:,} steps", rotation=0, ha="right", va="center", fontsize=8)
    for ax, prompt in zip(axes[-1], prompts, strict=False):
        ax.set_xlabel(_wrapped(prompt), fontsize=8)


def show_time(panel: "SubFigure", result: DemoResult) -> None:
    """Where the time went: one bar, as long as the demo took."""
    ax = panel.subplots()
    panel.subplots_adjust(left=0.035, right=0.965, top=0.62, bottom=0.34)
    _title(panel, 0.85, f"Where {result.total_seconds:,.0f} seconds went")
    start = 0.0
    for (name, seconds), color in zip(result.seconds.items(), PHASES, strict=False):
        ax.barh(0, seconds, left=start, color=color, label=f"{name} {seconds:,.1f} s")
        start += seconds
    ax.set_xlim(0, start)
    ax.axis("off")
    ax.legend(loc="upper left", bbox_to_anchor=(-0.005, -0.05), ncols=len(result.seconds))


def _title(panel: "SubFigure", height: float, text: str) -> None:
    panel.text(0.035, height, text, fontsize=10, fontweight="bold", va="center")


def _show(ax: "Axes", path: Path) -> None:
    with Image.open(path) as picture:
        ax.imshow(np.asarray(picture.convert("RGB")), interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(True)


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 17))


def show_measurements(panel: "SubFigure", result: DemoResult) -> None:
    """The losses of both stages, and how fast they trained, from the cache and with the encoders in the loop."""
    axes = panel.subplots(1, len(result.stages) + 1, gridspec_kw={"wspace": 0.28})
    panel.subplots_adjust(left=0.065, right=0.965, top=0.84, bottom=0.16)
    for ax, stage in zip(axes, result.stages, strict=False):
        _loss_curves(ax, stage)
    _throughput(axes[-1], result)


def _loss_curves(ax: "Axes", stage: StageResult) -> None:
    ways = [("encoders in the loop", stage.online, ONLINE), ("from the cache", stage.cached, CACHED)]
    # The shorter one lies below, wide enough to be seen.
    for name, measured, color in sorted(ways, key=lambda way: len(way[1].losses)):
        whole = len(measured.losses) == stage.steps
        width, label = (1.0, name) if whole else (4.0, f"{name}, first {len(measured.losses)} steps")
        steps = np.arange(1, len(measured.losses) + 1)
        ax.plot(steps, measured.losses, color=color, linewidth=width, label=label, solid_capstyle="round")
    ax.set(title=f"Loss of the {stage.stage}: {stage.equality}", xlabel="optimizer step", yscale="log")
    ax.legend()


def _throughput(ax: "Axes", result: DemoResult) -> None:
    places = np.arange(len(result.stages))
    for shift, color, attribute in ((-0.2, ONLINE, "online"), (0.2, CACHED, "cached")):
        rates = [getattr(stage, attribute).samples_per_second for stage in result.stages]
        bars = ax.bar(places + shift, rates, width=0.36, color=color)
        ax.bar_label(bars, [f"{rate:,.0f}" for rate in rates], fontsize=8, padding=2)
    ax.set_xticks(places, [f"{stage.stage}\n{stage.speedup:.1f} × as fast" for stage in result.stages])
    ax.margins(y=0.12)
    ax.set_title("Training speed, images per second")
