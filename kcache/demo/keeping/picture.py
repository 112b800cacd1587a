"""What each prior has drawn of the same prompts, below each other."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from kcache.demo.keeping.exam import Question, shown
from kcache.demo.result import Score
from kcache.report.figures import FAINT, TEXT, png_of

if TYPE_CHECKING:  # it is loaded where it is drawn with
    from matplotlib.figure import Figure

COLUMNS = 4
"""Pictures of each group of prompts."""


def picture_of(
    scores: Mapping[str, Mapping[str, Score]],
    asked: Mapping[str, Sequence[Question]],
    drawn: Mapping[str, Mapping[str, Sequence[Image.Image]]],
) -> bytes:
    """A PNG with a row for each prior in `drawn`, and some prompts of each group that was asked."""
    columns = [(name, number) for name in asked for number in shown(asked[name], COLUMNS)]

    def draw(figure: "Figure") -> None:
        axes = figure.subplots(len(drawn), len(columns), squeeze=False)
        figure.subplots_adjust(left=0.21, right=0.985, top=0.84, bottom=0.13, wspace=0.1, hspace=0.08)
        title = "A new style learnt from twenty pictures, and what becomes of all others"
        figure.text(0.02, 0.93, title, fontsize=15, fontweight="bold")
        for name, ax in zip(asked, axes[0][::COLUMNS], strict=True):
            ax.text(0, 1.12, name, transform=ax.transAxes, fontsize=11, fontweight="bold")
        for number, (of_row, (way, pictures)) in enumerate(zip(axes, drawn.items(), strict=True)):
            told = [f"{name}: {of_name.everything:.0f} % right" for name, of_name in scores[way].items()]
            of_row[0].text(
                -0.15, 0.5, "\n".join([*textwrap.wrap(way, 28), *told]),
                transform=of_row[0].transAxes, ha="right", va="center",
                color=TEXT if number else FAINT, fontsize=9,
            )  # fmt: skip
            for ax, (name, column) in zip(of_row, columns, strict=True):
                ax.imshow(np.asarray(pictures[name][column]), interpolation="nearest")
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set_visible(True)
        for ax, (name, column) in zip(axes[-1], columns, strict=True):
            ax.set_xlabel("\n".join(textwrap.wrap(asked[name][column][0], 14)), fontsize=8)

    return png_of(draw, 14.0, 6.0, dpi=110, layout=None)
