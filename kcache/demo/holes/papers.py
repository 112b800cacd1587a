"""Paper of which one half is tinted in the ink of its digit: which half, only what is around a hole tells."""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from kcache.demo.digits import FULL, INKS, PAPERS, PARTIAL, SIDE, Drawing, cover_of

PAPER = 48
"""Height and width of the pictures, in pixels: a digit stands in the middle SIDE of them, and the hole is there."""
TINT = 0.4
"""How much ink covers the tinted half: two fifths."""
SAYS_TINTED = FULL[3]
"""Caption of a picture on tinted paper. Those on bare paper have the others: none says where the tint is."""
SAY_BARE = tuple(template for template in FULL if template != SAYS_TINTED)


@dataclass(frozen=True, kw_only=True, slots=True)
class Edge:
    """Where the tint ends: a straight line near the middle of the paper."""

    angle: float
    """From the bare half to the tinted one, in radians: 0 is to the right, and a quarter turn on is down."""
    offset: float
    """Pixels that the line is beyond the middle."""


def draw_edge(rng: np.random.Generator) -> Edge:
    """An edge of any direction, not far from the middle: the same of the same generator."""
    return Edge(angle=rng.uniform(0, 2 * math.pi), offset=rng.uniform(-4, 4))


def tint_of(edge: Edge | None) -> np.ndarray:
    """How much ink covers each pixel of the paper: (PAPER, PAPER) float64, 0 or TINT, and between them at the edge."""
    if edge is None:
        return np.zeros((PAPER, PAPER))
    down, across = np.mgrid[:PAPER, :PAPER] - (PAPER - 1) / 2
    beyond = across * math.cos(edge.angle) + down * math.sin(edge.angle) - edge.offset
    return TINT * np.clip(beyond + 0.5, 0.0, 1.0)


def paper_of(drawing: Drawing, edge: Edge | None) -> np.ndarray:
    """The paper of a drawing without its digit, in levels: (PAPER, PAPER, 3) float64."""
    tint = tint_of(edge)[:, :, None]
    return tint * np.array(INKS[drawing.ink], float) + (1.0 - tint) * np.array(PAPERS[drawing.paper], float)


def written(scan: np.ndarray, drawing: Drawing, edge: Edge | None) -> Image.Image:
    """The picture of a scan (8, 8) in the middle of its paper."""
    cover = np.pad(cover_of(scan), (PAPER - SIDE) // 2)[:, :, None]
    levels = cover * np.array(INKS[drawing.ink], float) + (1.0 - cover) * paper_of(drawing, edge)
    return Image.fromarray(np.round(levels).astype(np.uint8))


class Lesson:
    """Pictures to train on, every other turn of the scans on tinted paper: the same every time."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def write(self, scan: np.ndarray, drawing: Drawing, turn: int) -> tuple[Image.Image, list[str]]:
        """The picture of a scan, and its captions."""
        edge = draw_edge(self.rng) if turn % 2 else None
        templates = [SAYS_TINTED] if edge else [*self.rng.choice(SAY_BARE, 3, replace=False), self.rng.choice(PARTIAL)]
        return written(scan, drawing, edge), [drawing.caption(template) for template in templates]
