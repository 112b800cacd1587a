"""What holes were filled with, judged from the pixels: the digit, its ink, and whether the paper goes on.

No network of the demo judges. Digits are read by what is darker than any paper, so that what paper is around them does
not decide which they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from PIL import Image, ImageFilter

from kcache.demo.digits import INKS, PAPERS, SIDE, cover_of, read_scans
from kcache.demo.holes.exam import Repaint
from kcache.demo.holes.papers import PAPER, TINT, paper_of, tint_of
from kcache.demo.scoring import by_kernel

GOES_ON = 1 / 4
"""How far from paper that goes on a hole's may be, of what there is to tell: tint from bare paper, or two papers."""
_HOLE = slice((PAPER - SIDE) // 2, (PAPER + SIDE) // 2)
_PAPERS = min(float(np.linalg.norm(np.subtract(*pair, dtype=float))) for pair in combinations(PAPERS.values(), 2))


@dataclass(frozen=True, kw_only=True, slots=True)
class HoleScore:
    """How often holes show what was asked for, in per cent, judged by nothing but them."""

    digit: float
    ink: float
    paper: float
    """Of the right colour, where it is bare."""
    everything: float
    """All three right in one picture."""
    seamless: float
    """Paper that goes on in the hole as it is around."""
    repaint: float
    """Everything right and seamless."""
    off: float
    """Mean distance of a hole's paper from paper that goes on: of what there is to tell, in per cent."""

    @property
    def cells(self) -> tuple[str, ...]:
        """All as text with one decimal."""
        shares = (self.digit, self.ink, self.paper, self.everything, self.seamless, self.repaint, self.off)
        return tuple(f"{share:.1f}" for share in shares)


def score_holes(filled: Sequence[Image.Image], asked: Sequence[Repaint]) -> HoleScore:
    """Judge what is in the holes of `filled`, and whether their paper is that which goes on from around."""
    found = [_look(picture, one) for picture, one in zip(filled, asked, strict=True)]
    covers = np.stack([cover for cover, *_ in found])
    digits = np.zeros(len(asked), int)
    for tinted in (False, True):
        chosen = np.array([(one.edge is not None) == tinted for one in asked])
        if chosen.any():
            digits[chosen] = by_kernel(*_known(TINT if tinted else 0.0), covers[chosen])
    off = np.array([distance for *_, distance in found])
    right = np.array(
        [
            (digit == one.wanted.digit, ink == one.wanted.ink, paper == one.wanted.paper)
            for digit, (_, ink, paper, _), one in zip(digits, found, asked, strict=True)
        ]
    )
    everything, seamless = right.all(axis=1), off <= GOES_ON
    digit, ink, paper = (100 * right.mean(axis=0)).tolist()
    return HoleScore(
        digit=digit, ink=ink, paper=paper,
        everything=float(100 * everything.mean()),
        seamless=float(100 * seamless.mean()),
        repaint=float(100 * (everything & seamless).mean()),
        off=float(100 * off.mean()),
    )  # fmt: skip


def _look(picture: Image.Image, asked: Repaint) -> tuple[np.ndarray, str, str, float]:
    """A hole's digit as covers (64,), its ink and its paper, and how far its paper is from that which goes on."""
    pixels = np.asarray(picture.convert("RGB"), float)[_HOLE, _HOLE]
    tint = tint_of(asked.edge)[_HOLE, _HOLE]
    bare = np.array(PAPERS[asked.wanted.paper], float)
    distance = np.linalg.norm(pixels - bare, axis=2)
    furthest = np.argsort(distance, axis=None)[-distance.size // 20 :]
    ink = _nearest(pixels.reshape(-1, 3)[furthest].mean(axis=0), INKS)
    way = np.array(INKS[ink], float) - bare
    cover = np.clip((pixels - bare) @ way / (way @ way), 0.0, 1.0)
    least = 0.0 if asked.edge is None else TINT
    paper = ~_around(cover > least + 0.2)
    goes_on = paper_of(asked.wanted, asked.edge)[_HOLE, _HOLE]
    there_is = _PAPERS if asked.edge is None else TINT * float(np.linalg.norm(way))
    off = float(np.linalg.norm(pixels - goes_on, axis=2)[paper].mean()) / there_is if paper.any() else 1.0
    plain = pixels[paper & (tint == 0)]
    colour = _nearest(np.median(plain, axis=0), PAPERS) if len(plain) else ""
    return _blocks(cover, least), ink, colour, off


def _around(ink: np.ndarray) -> np.ndarray:
    """Pixels of ink and all within three of one: a digit's edge is that wide."""
    return np.asarray(Image.fromarray(np.where(ink, 255, 0).astype(np.uint8)).filter(ImageFilter.MaxFilter(7))) > 0


def _blocks(cover: np.ndarray, least: float) -> np.ndarray:
    """The ink beyond `least` for each pixel of the 8 x 8 scan: (64,) float64 from 0 to 1."""
    beyond = np.clip((cover - least) / (1.0 - least), 0.0, 1.0)
    return beyond.reshape(8, SIDE // 8, 8, SIDE // 8).mean(axis=(1, 3)).ravel()


def _known(least: float) -> tuple[np.ndarray, np.ndarray]:
    scans, digits = read_scans(test=False)
    return np.stack([_blocks(cover_of(scan), least) for scan in scans]), digits


def _nearest(colour: np.ndarray, names: dict[str, tuple[int, int, int]]) -> str:
    return min(names, key=lambda name: float(np.linalg.norm(colour - np.array(names[name], float))))
