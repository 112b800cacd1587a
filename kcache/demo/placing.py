"""Whether a digit stands whole and in the middle of its paper, whatever the paper's shape: judged from the pixels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from kcache.config.shapes import Shape
from kcache.demo.digits import SIDE, Drawing, middle_of
from kcache.demo.scoring import read

WHOLE = 0.95
"""Share of the ink that lies within the middle square of a whole digit."""
OFF = SIDE / 8
"""Pixels that the centre of the ink may be off the middle: one of a scan's. Of real scans 98 in 100 are within."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PaperScore:
    """How often pictures of one shape show what was asked for, in per cent."""

    shape: Shape
    digit: float
    ink: float
    paper: float
    whole: float
    centred: float
    everything: float
    """All five right in one picture."""

    @property
    def cells(self) -> tuple[str, ...]:
        """All six as text with one decimal."""
        shares = (self.digit, self.ink, self.paper, self.whole, self.centred, self.everything)
        return tuple(f"{share:.1f}" for share in shares)


def score_papers(pictures: Sequence[Image.Image], asked: Sequence[Drawing]) -> PaperScore:
    """Judge pictures of one shape: digit, ink and paper by their middle squares, the digit's place by all of it."""
    seen = read([middle_of(picture) for picture in pictures])
    right = np.array(
        [
            (found.digit == wanted.digit, found.ink == wanted.ink, found.paper == wanted.paper, *_placed(picture))
            for found, wanted, picture in zip(seen, asked, pictures, strict=True)
        ]
    )
    digit, ink, paper, whole, centred = (100 * right.mean(axis=0)).tolist()
    return PaperScore(
        shape=(pictures[0].height, pictures[0].width),
        digit=digit, ink=ink, paper=paper, whole=whole, centred=centred,
        everything=float(100 * right.all(axis=1).mean()),
    )  # fmt: skip


def _placed(picture: Image.Image) -> tuple[bool, bool]:
    """Whether the ink lies within the middle square, and whether its centre lies in the middle."""
    pixels = np.asarray(picture.convert("RGB"), float)
    # The paper is the larger part of every picture; ink is what differs from it about as much as what differs most.
    distance = np.linalg.norm(pixels - np.median(pixels.reshape(-1, 3), axis=0), axis=2)
    darkest = np.sort(distance, axis=None)[-SIDE * SIDE // 20 :].mean()
    ink = np.where(distance > darkest / 4, distance, 0.0)
    if not ink.any():
        return False, False
    height, width = ink.shape
    top, left = (height - SIDE) // 2, (width - SIDE) // 2
    whole = ink[top : top + SIDE, left : left + SIDE].sum() >= WHOLE * ink.sum()
    down = (ink.sum(axis=1) @ (np.arange(height) + 0.5)) / ink.sum() - height / 2
    across = (ink.sum(axis=0) @ (np.arange(width) + 0.5)) / ink.sum() - width / 2
    return bool(whole), bool(max(abs(down), abs(across)) <= OFF)
