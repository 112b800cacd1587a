"""Figures of a report: curves, histograms, and pictures made small enough for the page."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from kcache.curves import Panel, draw_panel
from kcache.grid import png_bytes
from kcache.report.page import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["beside", "curve", "histogram", "picture"]

COLOUR, MEAN = "#0b6e69", "#d1495b"
"""A dark and a light one: told apart without colours, too."""
MOST_BINS = 40
GAP = 4
"""Pixels between pictures."""
MAX_SIDE = 960
"""Width in pixels that a picture gets on the page at most."""


def curve(title: str, panel: Panel, caption: str) -> Figure:
    """A panel of `kcache.curves` as a figure."""
    return Figure(png=draw_panel(title, panel), caption=caption, density=2)


def histogram(title: str, values: np.ndarray, across: str, caption: str) -> Figure:
    """How often which of `values` (n,) occurs, n > 0, and their mean; what is not finite is left out."""
    finite = np.asarray(values, np.float64)[np.isfinite(values)]
    return Figure(png=draw_panel(title, partial(_histogram, values=finite), across=across), caption=caption, density=2)


def picture(image: Image.Image, caption: str, most_bytes: int) -> Figure:
    """A picture as a figure of at most about `most_bytes`: shrunk as far as that takes."""
    image = image.convert("RGB")
    if image.width > MAX_SIDE:
        image = _shrunk(image, MAX_SIDE / image.width)
    png = png_bytes(image)
    while len(png) > most_bytes and min(image.size) > 16:
        image = _shrunk(image, 0.95 * (most_bytes / len(png)) ** 0.5)
        png = png_bytes(image)
    return Figure(png=png, caption=caption)


def beside(images: Sequence[Image.Image], side: int) -> Image.Image:
    """Square pictures (one or more) beside each other, each `side` × `side` pixels."""
    strip = Image.new("RGB", (len(images) * (side + GAP) - GAP, side), "white")
    for number, image in enumerate(images):
        strip.paste(_square(image, side), (number * (side + GAP), 0))
    return strip


def _square(image: Image.Image, side: int) -> Image.Image:
    """A square picture at `side` × `side` pixels: small ones enlarged by whole pixels, as far as they go."""
    times = side // image.width
    if times > 1:
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    return image if image.width == side else image.resize((side, side), Image.Resampling.LANCZOS)


def _shrunk(image: Image.Image, factor: float) -> Image.Image:
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _histogram(ax: "Axes", values: np.ndarray) -> None:
    from matplotlib.ticker import AutoLocator, MaxNLocator, StrMethodFormatter

    whole = bool((values == np.round(values)).all())
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1) if whole else AutoLocator())
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if not len(values):
        return
    ax.hist(values, _edges(values), color=COLOUR, edgecolor="white", linewidth=0.4)
    ax.axvline(float(values.mean()), color=MEAN, linewidth=1.4, linestyle="--", label=f"mean {values.mean():.4g}")
    ax.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1.01, 0.985), handlelength=1.6)


def _edges(values: np.ndarray) -> Sequence[float]:
    """Edges of the bins: around each of a few whole numbers, else equal ones, the more of them the more values."""
    low, high = float(values.min()), float(values.max())
    if (values == np.round(values)).all() and high - low < 2 * MOST_BINS:
        return (np.arange(low, high + 2) - 0.5).tolist()
    if high - low < 1e-9 * max(abs(high), 1.0):
        low, high = low - 0.5, high + 0.5
    bins = int(np.clip(2 * len(values) ** 0.5, 5, MOST_BINS))
    return np.linspace(low, high, bins + 1).tolist()
