"""Holes in pictures, and what they were filled with, below each other."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from kcache.demo.holes.exam import EACH, PLAIN, TINTED, Repaint, hole
from kcache.demo.holes.judging import HoleScore
from kcache.report.figures import FAINT, TEXT, png_of

if TYPE_CHECKING:  # it is loaded where it is drawn with
    from matplotlib.figure import Figure

SHOWN = (TINTED, PLAIN[0])
"""Tasks, from the left."""
COLUMNS = 5
"""Pictures of each."""
_HOLE = (128, 128, 128)


def picture_of(
    scores: Mapping[str, Mapping[str, HoleScore]],
    asked: Sequence[Repaint],
    pictures: Sequence[Image.Image],
    filled: Mapping[str, Sequence[Image.Image]],
) -> bytes:
    """What was given, the hole in it and what each way of filling made of it: a PNG of the first pictures by number."""
    columns = [column for task in SHOWN for column in _of(task, asked)]
    pierced = [Image.composite(Image.new("RGB", each.size, _HOLE), each, hole()) for each in pictures]
    rows = {"given": pictures, "the hole": pierced, **filled}

    def draw(figure: "Figure") -> None:
        axes = figure.subplots(len(rows), len(columns), squeeze=False)
        figure.subplots_adjust(left=0.19, right=0.985, top=0.87, bottom=0.11, wspace=0.1, hspace=0.08)
        figure.text(0.02, 0.945, "Holes filled by their prompts and by what is around", fontsize=15, fontweight="bold")
        for task, ax in zip(SHOWN, axes[0][:: len(columns) // len(SHOWN)], strict=True):
            ax.text(0, 1.12, task, transform=ax.transAxes, fontsize=11, fontweight="bold")
        for number, (of_row, (name, shown)) in enumerate(zip(axes, rows.items(), strict=True)):
            is_filled = number in (2, 3)
            of_row[0].text(
                -0.15, 0.5, "\n".join([*textwrap.wrap(name, 26), *_told(name, scores)]),
                transform=of_row[0].transAxes, ha="right", va="center",
                color=TEXT if is_filled else FAINT, fontsize=9,
            )  # fmt: skip
            for ax, column in zip(of_row, columns, strict=True):
                ax.imshow(np.asarray(shown[column]), interpolation="nearest")
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set_visible(True)
        for ax, column in zip(axes[-1], columns, strict=True):
            ax.set_xlabel("\n".join(textwrap.wrap(asked[column].prompt, 17)), fontsize=8)

    return png_of(draw, 14.0, 7.4, dpi=110, layout=None)


def _of(task: str, asked: Sequence[Repaint]) -> list[int]:
    """One repaint of every other picture, of different digits."""
    chosen = [number for number, repaint in enumerate(asked) if repaint.task == task][:: 2 * EACH]
    return chosen[:COLUMNS]


def _told(name: str, scores: Mapping[str, Mapping[str, HoleScore]]) -> list[str]:
    return [f"{task}: {of_task[name].repaint:.0f} % right" for task, of_task in scores.items() if name in of_task]
