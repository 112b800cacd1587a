"""Whether pictures show what was asked for: judged from their pixels, by no network of the demo.

Colours are the nearest of those there are. Digits are read by three judges that have little in common; all of them
know nothing but the real scans that are not kept for tests.
"""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import combinations

import numpy as np
from PIL import Image

from kcache.demo.digits import INKS, PAPERS, SIDE, Drawing, coloured, read_scans
from kcache.demo.result import Score

CHANCE = Score(digit=100 / 10, ink=100 / len(INKS), paper=100 / len(PAPERS), everything=100 / 240)
"""What guessing comes to."""

_NAMED = {name: np.array(colour, float) for name, colour in (INKS | PAPERS).items()}

DigitJudge = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Known covers (n, 64), their digits (n,) and unknown covers (m, 64) → the digits of those, (m,) int64."""


def by_kernel(known: np.ndarray, digits: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Kernel ridge regression on the ten digits, with a Gaussian kernel (Saunders et al. 1998)."""
    width, ridge = 0.256, 0.1
    weights = np.linalg.solve(np.exp(-width * _squared(known, known)) + ridge * np.eye(len(known)), np.eye(10)[digits])
    return (np.exp(-width * _squared(asked, known)) @ weights).argmax(axis=1)


def by_neighbours(known: np.ndarray, digits: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """What most of the three nearest are."""
    nearest = np.argsort(_squared(asked, known), axis=1, kind="stable")[:, :3]
    return np.eye(10)[digits[nearest]].sum(axis=1).argmax(axis=1)


def by_subspace(known: np.ndarray, digits: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The digit whose mean and first twelve principal components come nearest (CLAFIC, Watanabe et al. 1967)."""
    errors = []
    for digit in range(10):
        of_digit = known[digits == digit]
        mean = of_digit.mean(axis=0)
        components = np.linalg.svd(of_digit - mean, full_matrices=False)[2][:12]
        rest = asked - mean
        errors.append(((rest - rest @ components.T @ components) ** 2).sum(axis=1))
    return np.argmin(errors, axis=0)


JUDGES: dict[str, DigitJudge] = {
    "kernel regression": by_kernel,
    "3 nearest neighbours": by_neighbours,
    "nearest subspace": by_subspace,
}
"""By name; the first decides."""


def read(pictures: Sequence[Image.Image], judge: DigitJudge = by_kernel) -> list[Drawing]:
    """What each picture of SIDE x SIDE pixels shows."""
    colours = [_colours(_pixels(picture)) for picture in pictures]
    digits = judge(*_known(), _covers(pictures))
    return [
        Drawing(digit=int(digit), ink=ink, paper=paper) for digit, (ink, paper) in zip(digits, colours, strict=True)
    ]


def score(seen: Sequence[Drawing], asked: Sequence[Drawing]) -> Score:
    """How many of the drawings that were `seen` are those `asked` for, in per cent."""
    pairs = list(zip(seen, asked, strict=True))

    def share(hits: list[bool]) -> float:
        return 100 * sum(hits) / len(hits)

    return Score(
        digit=share([one.digit == other.digit for one, other in pairs]),
        ink=share([one.ink == other.ink for one, other in pairs]),
        paper=share([one.paper == other.paper for one, other in pairs]),
        everything=share([one == other for one, other in pairs]),
    )


def spread(pictures: Sequence[Image.Image], asked: Sequence[Drawing]) -> float:
    """How different pictures of the same drawing are, two by two: root mean square of the cover, from 0 to 1."""
    covers = _covers(pictures)
    pairs = [(i, j) for i, j in combinations(range(len(asked)), 2) if asked[i] == asked[j]]
    return float(np.mean([np.sqrt(np.mean((covers[i] - covers[j]) ** 2)) for i, j in pairs]))


def distance_to_known(pictures: Sequence[Image.Image]) -> float:
    """How far pictures are from the nearest scan that was there to learn from: root mean square of the cover."""
    known, _ = _known()
    return float(np.mean(np.sqrt(_squared(_covers(pictures), known).min(axis=1) / known.shape[1])))


@cache
def _known() -> tuple[np.ndarray, np.ndarray]:
    """The covers of the scans not kept for tests, (n, 64), and their digits (n,)."""
    scans, digits = read_scans(test=False)
    return np.stack([_cover(_pixels(coloured(scan, "black", "white")), "black", "white") for scan in scans]), digits


def _covers(pictures: Sequence[Image.Image]) -> np.ndarray:
    pixels = [_pixels(picture) for picture in pictures]
    return np.stack([_cover(values, *_colours(values)) for values in pixels])


def _pixels(picture: Image.Image) -> np.ndarray:
    """(SIDE * SIDE, 3) float64, 0 to 255."""
    return np.asarray(picture.convert("RGB"), float).reshape(-1, 3)


def _colours(pixels: np.ndarray) -> tuple[str, str]:
    """Ink and paper: paper is the middle of the brighter half, ink the mean of the twentieth that is furthest off."""
    brightness = pixels.sum(axis=1)
    paper = np.median(pixels[brightness >= np.median(brightness)], axis=0)
    distance = np.linalg.norm(pixels - paper, axis=1)
    ink = pixels[np.argsort(distance)[-len(pixels) // 20 :]].mean(axis=0)
    return _nearest(ink, list(INKS)), _nearest(paper, list(PAPERS))


def _nearest(colour: np.ndarray, names: list[str]) -> str:
    return min(names, key=lambda name: float(np.linalg.norm(colour - _NAMED[name])))


def _cover(pixels: np.ndarray, ink: str, paper: str) -> np.ndarray:
    """How much ink covers each pixel of the 8 x 8 scan: (64,) float64 from 0 to 1."""
    way = _NAMED[ink] - _NAMED[paper]
    cover = np.clip((pixels - _NAMED[paper]) @ way / (way @ way), 0.0, 1.0)
    return cover.reshape(8, SIDE // 8, 8, SIDE // 8).mean(axis=(1, 3)).ravel()


def _squared(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Squared distances of the rows of `one` (m, d) and `other` (n, d): (m, n)."""
    return np.maximum(0.0, (one**2).sum(axis=1)[:, None] + (other**2).sum(axis=1) - 2 * one @ other.T)
