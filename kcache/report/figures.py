"""Figures: how a run went, curves, histograms, and pictures made small enough for a page.

Every figure that matplotlib draws here, for a sweep, the demo or a benchmark has one look and is made by `png_of`.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from kcache.decoration import drawing
from kcache.disk.durable import write_bytes
from kcache.errors import RunError
from kcache.report import page
from kcache.report.grid import own_font, png_bytes, writable
from kcache.store.run_directory import CURVES_FILE, read_metrics, read_validation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Entries = Sequence[Mapping[str, Any]]
"""Lines of metrics.jsonl or validation.jsonl."""
Panel = Callable[["Axes"], None]
"""Draws one thing into the axes it is given."""

TEAL, RED = "#0b6e69", "#d1495b"
"""A dark and a light one: told apart without colours, too."""
TEXT, FAINT, LINES = "#22262b", "#7a828c", "#e6e8ea"
"""Of the writing, the small print and the lines of a grid."""
HOLE = "#f2b134"
"""Of the loss over the hole, beside that over the whole picture."""
BANDS = ("#f2b134", "#e07a3f", "#a23b72", "#3b2f6b")
"""From the timesteps of nearly clean samples to those of nearly pure noise."""
LOOK: dict[str, Any] = {
    "font.size": 9, "text.color": TEXT, "lines.markersize": 4,
    "axes.axisbelow": True, "axes.edgecolor": FAINT, "axes.labelcolor": TEXT,
    "axes.spines.right": False, "axes.spines.top": False,
    "axes.titlelocation": "left", "axes.titlesize": 10, "axes.titleweight": "bold",
    "grid.color": LINES, "grid.linewidth": 0.6, "legend.fontsize": 8, "legend.frameon": False,
    "xtick.color": FAINT, "xtick.labelsize": 8, "ytick.color": FAINT, "ytick.labelsize": 8,
}  # fmt: skip
"""Matplotlib's settings for all figures."""

LOSS, LEARNING_RATE, GRADIENT_NORM = "Loss", "Learning rate", "Gradient norm before clipping"
HELD_OUT_BANDS, HELD_OUT_COSINE = "Held-out loss by timestep", "Held-out cosine to the true embedding"
CLIP_SCORE = "How well drawn pictures fit their prompts"
"""Titles of what there is to draw of a run."""
POINTS = 1000
"""Points of a curve: more than the picture has room for would only make it slower to draw."""
SMOOTHING = 0.02
"""Standard deviation of the smoothing kernel, as a share of the whole curve."""
MOST_BINS = 40
MAX_SIDE = 960
"""Width in pixels that a picture gets on the page at most."""


def png_of(
    draw: Callable[["Figure"], None],
    width: float,
    height: float,
    *,
    dpi: int,
    layout: Literal["constrained"] | None = "constrained",
    look: dict[str, Any] = LOOK,
) -> bytes:
    """The PNG file of a figure of `width` × `height` inches, each of `dpi` pixels, that `draw` has drawn into."""
    mpl = drawing()
    from matplotlib.figure import Figure

    with mpl.rc_context():
        mpl.rcdefaults()  # whatever a matplotlibrc says
        mpl.rcParams.update(look)
        figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white", layout=layout)
        draw(figure)
        return _rasterised(figure)


def _rasterised(figure: "Figure") -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def plot_run(run_dir: Path) -> Path:
    """Draw `run_dir`'s metrics.jsonl and validation.jsonl as loss.png in it, 1800 × 1200 pixels; returns its path.

    One step is enough, and validation need not be there. Raises RunError when there is no step yet, CacheWriteError
    when the picture cannot be written.
    """
    metrics, validation = read_metrics(run_dir), read_validation(run_dir)
    if not metrics:
        raise RunError(f"{run_dir} has no steps in its metrics.jsonl; expected the directory of a run that has begun")
    draw = partial(_draw_run, name=run_dir.resolve().name, metrics=metrics, validation=validation)
    write_bytes(run_dir / CURVES_FILE, png_of(draw, 12, 8, dpi=150))
    return run_dir / CURVES_FILE


def curve(title: str, panel: Panel, caption: str, *, across: str = "optimizer step") -> page.Figure:
    """A panel alone, of 968 × 600 pixels in the look of loss.png; `across` names what is on the x axis."""

    def draw(figure: "Figure") -> None:
        ax = _axes(figure, 111, title, across)
        ax.set_title(title, pad=20)  # above the legend: it is narrow
        panel(ax)

    return page.Figure(png=png_of(draw, 4.84, 3, dpi=200), caption=caption, density=2)


def histogram(title: str, values: np.ndarray, across: str, caption: str) -> page.Figure:
    """How often which of `values` (n,) occurs, n > 0, and their mean; what is not finite is left out."""
    finite = np.asarray(values, np.float64)[np.isfinite(values)]
    return curve(title, partial(_histogram, values=finite), caption, across=across)


def bars(title: str, names: Sequence[str], counts: Sequence[int], caption: str) -> page.Figure:
    """How many there are of each of `names`, from the first at the top to the last."""

    def panel(ax: "Axes") -> None:
        ax.barh(range(len(names)), counts, height=0.8)
        ax.set_yticks(range(len(names)), names, fontsize=min(7.0, 130 / len(names)))
        ax.invert_yaxis()

    return curve(title, panel, caption, across="samples")


def picture(image: Image.Image, caption: str, most_bytes: int) -> page.Figure:
    """A picture as a figure of at most about `most_bytes`: shrunk as far as that takes."""
    image = image.convert("RGB")
    if image.width > MAX_SIDE:
        image = _shrunk(image, MAX_SIDE / image.width)
    png = png_bytes(image)
    while len(png) > most_bytes and min(image.size) > 16:
        image = _shrunk(image, 0.95 * (most_bytes / len(png)) ** 0.5)
        png = png_bytes(image)
    return page.Figure(png=png, caption=caption)


def _shrunk(image: Image.Image, factor: float) -> Image.Image:
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.LANCZOS)


def run_panels(metrics: Entries, validation: Entries) -> dict[str, Panel]:
    """What there is to draw of a run, by title: what was not measured is not there."""
    names = validation[-1].keys() if validation else ()
    bands = [key for key in names if re.fullmatch(r"val_loss_t\d+_\d+", key)]
    panels: dict[str, Panel] = {LOSS: partial(_loss, metrics=metrics, validation=validation)}
    if bands:
        panels[HELD_OUT_BANDS] = partial(_bands, validation=validation, bands=bands)
    panels[LEARNING_RATE] = partial(_rate, metrics=metrics)
    panels[GRADIENT_NORM] = curve_panel(metrics, "grad_norm")
    if "val_cosine" in names:
        panels[HELD_OUT_COSINE] = partial(_held_out, entries=validation, name="val_cosine")
    if "val_clip_score" in names:
        panels[CLIP_SCORE] = partial(_held_out, entries=validation, name="val_clip_score")
    return panels


def curve_panel(entries: Entries, name: str) -> Panel:
    """What draws the value `name` of each entry over the steps, as it is and smoothed."""

    def panel(ax: "Axes") -> None:
        _noisy(ax, *column(entries, name), label="smoothed")
        _finish(ax)

    return panel


def thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A curve (n,) as at most `POINTS` points: means of equally many neighbours, without what is not finite."""
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    starts = np.arange(0, len(steps), max(1, -(-len(steps) // POINTS)))
    counts = np.diff(np.append(starts, len(steps)))
    return np.add.reduceat(steps, starts) / counts, np.add.reduceat(values, starts) / counts


def smoothed(values: np.ndarray) -> np.ndarray:
    """Each value (n,) as the mean of its neighbours, weighted by a Gaussian; at both ends of those that there are."""
    if not len(values):
        return values
    sigma = SMOOTHING * len(values)
    reach = int(3 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights = np.convolve(np.ones(len(values)), kernel, "same")
    return np.convolve(values, kernel, "same") / weights


def _draw_run(figure: "Figure", name: str, metrics: Entries, validation: Entries) -> None:
    panels = run_panels(metrics, validation)
    grid = figure.add_gridspec(2, 12, height_ratios=(1.7, 1))
    title, font = writable(f"{name}, step {metrics[-1]['step']:,}", f"step {metrics[-1]['step']:,}", joined=False)
    # A name is no formula, whatever dollar signs it has.
    family: dict[str, Any] = {"fontweight": "bold"} if font == own_font() else {"font": font}
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, parse_math=False, **family)
    below = [title for title in panels if title not in (LOSS, HELD_OUT_BANDS)]
    width = 12 // len(below)
    places = {title: grid[1, i * width : (i + 1) * width] for i, title in enumerate(below)}
    places |= {LOSS: grid[0, : 6 if HELD_OUT_BANDS in panels else 12], HELD_OUT_BANDS: grid[0, 6:]}
    for title, panel in panels.items():
        panel(_axes(figure, places[title], title, "optimizer step"))


def _axes(figure: "Figure", place: Any, title: str, across: str) -> "Axes":
    from matplotlib.ticker import MaxNLocator

    ax = figure.add_subplot(place, title=title, xlabel=across)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.yaxis.set_major_formatter(_tick)
    ax.grid(visible=True)
    return ax


def _loss(ax: "Axes", metrics: Entries, validation: Entries) -> None:
    _noisy(ax, *column(metrics, "loss"), label="training, smoothed")
    if validation:
        _held_out(ax, validation, "val_loss", label="held out")
    if any("val_hole" in entry for entry in validation):
        _held_out(ax, validation, "val_hole", color=HOLE, label="held out, the hole")
    _finish(ax)


def _bands(ax: "Axes", validation: Entries, bands: Sequence[str]) -> None:
    for key, color in zip(bands, BANDS, strict=False):
        first, last = map(int, key.removeprefix("val_loss_t").split("_"))
        _held_out(ax, validation, key, color=color, label=f"{first}–{last}")
    _finish(ax)


def _rate(ax: "Axes", metrics: Entries) -> None:
    steps, rates = thinned(*column(metrics, "lr"))
    ax.plot(steps, rates, color=TEAL, linewidth=1.5, marker=_marker(steps))
    ax.set_ylim(bottom=0)


def _held_out(ax: "Axes", entries: Entries, name: str, color: str = RED, label: str | None = None) -> None:
    ax.plot(*column(entries, name), "o-", color=color, linewidth=1.2, label=label)


def _noisy(ax: "Axes", steps: np.ndarray, values: np.ndarray, label: str) -> None:
    steps, values = thinned(steps, values)
    ax.plot(steps, values, color=TEAL, alpha=0.25, linewidth=0.8)
    ax.plot(steps, smoothed(values), color=TEAL, linewidth=1.8, marker=_marker(steps), label=label)


def column(entries: Entries, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the entries that have `name`, each (n,) float64."""
    pairs = [(entry["step"], entry[name]) for entry in entries if name in entry]
    steps, values = np.array(pairs, np.float64).reshape(-1, 2).T
    return steps, values


def _tick(value: float, position: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _marker(steps: np.ndarray) -> str:
    """A dot where there is no line to see."""
    return "o" if len(steps) == 1 else ""


def _legend(ax: "Axes", **settings: Any) -> None:
    """Beside the title."""
    ax.legend(loc="lower right", bbox_to_anchor=(1.01, 0.985), **settings)


def _finish(ax: "Axes") -> None:
    """A legend, and a logarithmic axis where the values are positive and far apart."""
    from matplotlib.ticker import LogLocator, NullLocator

    _legend(ax, ncols=4, handlelength=1.2, columnspacing=1.2)
    values = np.concatenate([np.asarray(line.get_ydata(), np.float64) for line in ax.lines])
    values = values[np.isfinite(values)]
    if values.size and values.min() > 0 and values.max() > 5 * values.min():
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(_tick)
        ax.yaxis.set_minor_locator(NullLocator())


def _histogram(ax: "Axes", values: np.ndarray) -> None:
    from matplotlib.ticker import AutoLocator, MaxNLocator

    if not (values == np.round(values)).all():
        ax.xaxis.set_major_locator(AutoLocator())
    ax.xaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    ax.yaxis.set_major_formatter("{x:,.0f}")
    if not len(values):
        return
    ax.hist(values, _edges(values), color=TEAL, edgecolor="white", linewidth=0.4)
    ax.axvline(float(values.mean()), color=RED, linewidth=1.4, linestyle="--", label=f"mean {values.mean():.4g}")
    _legend(ax, handlelength=1.6)


def _edges(values: np.ndarray) -> Sequence[float]:
    """Edges of the bins: around each of a few whole numbers, else equal ones, the more of them the more values."""
    low, high = float(values.min()), float(values.max())
    if (values == np.round(values)).all() and high - low < 2 * MOST_BINS:
        return (np.arange(low, high + 2) - 0.5).tolist()
    if high - low < 1e-9 * max(abs(high), 1.0):
        low, high = low - 0.5, high + 0.5
    bins = int(np.clip(2 * len(values) ** 0.5, 5, MOST_BINS))
    return np.linspace(low, high, bins + 1).tolist()
