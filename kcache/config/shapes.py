"""Shapes that pictures are cropped to, and which of them a picture has: functions of its size and of a list alone.

A resolution R stands for an area of R² pixels. At each, pictures are cropped to one square, or to whichever of several
shapes keeps most of them. Heights stand before widths, as in arrays; sizes of pictures are upright, as decoded.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np

from kcache.errors import ConfigError

Shape = tuple[int, int]
"""Height and width in pixels."""

MAX_RATIO = Fraction(12, 5)
"""Long side to short side of the longest shapes of `auto_set`."""
MAX_SHAPES = 254
"""Of one set."""
NO_SHAPE = -1
"""Stands for the number of a shape where a picture has none."""
_SHAPES = re.compile(r"\s*[0-9]{1,5}\s*,\s*[0-9]{1,5}\s*(;\s*[0-9]{1,5}\s*,\s*[0-9]{1,5}\s*)*;?\s*")


@dataclass(frozen=True, slots=True)
class ShapeSet:
    """What pictures are cropped to at one resolution.

    Raises ValueError for shapes that no list has: unsorted, twice, too many.
    """

    resolution: int
    shapes: tuple[Shape, ...]
    """From the widest to the tallest, and from small to large."""
    max_upscale: float | None = None
    """A picture that would be enlarged more than this many times has no shape; None refuses none."""

    def __post_init__(self) -> None:
        sides = [self.resolution, *(side for shape in self.shapes for side in shape)]
        if not all(type(side) is int and 0 < side < 100_000 for side in sides):
            raise ValueError(f"{sides} are no sides of pictures in pixels")
        if not 0 < len(self.shapes) <= MAX_SHAPES or list(self.shapes) != sorted(set(self.shapes), key=_order):
            raise ValueError(f"{self.shapes} are not 1 to {MAX_SHAPES} shapes, sorted, each once")
        if self.max_upscale is not None and not 0 < self.max_upscale < 1e6:
            raise ValueError(f"{self.max_upscale} is no factor to enlarge pictures by")

    @property
    def is_square(self) -> bool:
        """Whether it is the plain square of its resolution, which every picture has."""
        return self.shapes == ((self.resolution, self.resolution),) and self.max_upscale is None

    @property
    def name(self) -> str:
        """What it is called for people: "768", or "768 in 15 shapes"."""
        shapes = "1 shape" if len(self.shapes) == 1 else f"{len(self.shapes)} shapes"
        return str(self.resolution) if self.is_square else f"{self.resolution} in {shapes}"

    @property
    def in_full(self) -> str:
        """The same with all that it says: "64 as 48,80;64,64, enlarged up to 2 times"."""
        limit = "" if self.max_upscale is None else f", enlarged up to {self.max_upscale:g} times"
        listed = ";".join(f"{tall},{wide}" for tall, wide in self.shapes)
        return self.name if self.is_square else f"{self.resolution} as {listed}{limit}"

    def choose(self, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
        """(n,) int16: the number of each picture's shape, `NO_SHAPE` for one that would be enlarged too much.

        `widths` and `heights` are (n,) integers. The shape that keeps most of a picture has it, of equals the first; a
        picture of unknown size, 0, has the shape nearest to a square.
        """
        widths, heights, known = _sizes(widths, heights)
        chosen, best = np.zeros(len(widths), np.int16), np.full(len(widths), -1.0)
        for number, shape in enumerate(self.shapes):
            share = _share(widths, heights, *shape)
            better = share > best
            chosen[better], best[better] = number, share[better]
        if self.max_upscale is not None:
            tall, wide = np.array(self.shapes).T[:, chosen]
            too_small = (tall > self.max_upscale * heights) | (wide > self.max_upscale * widths)
            chosen[known & too_small] = NO_SHAPE
        return chosen

    def kept(self, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
        """(n,) float64: the share of each picture's pixels that the crop to its shape keeps; 0 where it has none."""
        chosen = self.choose(widths, heights)
        widths, heights, _ = _sizes(widths, heights)
        tall, wide = np.array(self.shapes).T[:, chosen]
        return np.where(chosen == NO_SHAPE, 0.0, _share(widths, heights, tall, wide))


def square_set(resolution: int) -> ShapeSet:
    """The plain square: what a cache has at a resolution unless it was told otherwise."""
    return ShapeSet(resolution, ((resolution, resolution),))


def auto_set(resolution: int, step: int, max_upscale: float | None) -> ShapeSet:
    """The square, and for every longer side that is a multiple of `step` the short side that comes nearest to its area.

    As far as `MAX_RATIO`, lying and standing. Raises ConfigError for a resolution that is no multiple of `step`.
    """
    if resolution % step:
        below, above = resolution // step * step, (resolution // step + 1) * step
        raise ConfigError(
            f"--resolution is {resolution}; expected a multiple of {step}, as the sides of shapes are; "
            f"the nearest such values: {f'{below} and {above}' if below else above}"
        )
    shapes, long = set[Shape](), resolution
    while long <= MAX_RATIO * (short := (2 * resolution**2 + long * step) // (2 * long * step) * step):
        shapes |= {(long, short), (short, long)}
        long += step
    return ShapeSet(resolution, tuple(sorted(shapes, key=_order)), max_upscale)


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """The shapes of a list such as "640,896;768,768", height before width, sorted; raises ConfigError."""
    do = 'expected auto, square, or heights and widths in pixels, such as "640,896;768,768"'
    given = f"--aspect-ratio-buckets is {text[:100]!r}"
    if not _SHAPES.fullmatch(text):
        raise ConfigError(f"{given}; {do}")
    pairs = (each.split(",") for each in text.strip("; ").split(";"))
    found = [(int(tall), int(wide)) for tall, wide in pairs]
    if not all(map(min, found)):
        raise ConfigError(f"{given}, which has a side of 0 pixels; {do}")
    shapes = sorted(found, key=_order)
    if twice := [first for first, second in pairwise(shapes) if first == second]:
        raise ConfigError(f"{given} and lists {twice[0][0]},{twice[0][1]} twice; expected each shape once")
    if len(shapes) > MAX_SHAPES:
        raise ConfigError(f"--aspect-ratio-buckets lists {len(shapes)} shapes; expected {MAX_SHAPES} or fewer")
    return tuple(shapes)


def crop_box(width: int, height: int, shape: Shape) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the middle of a picture that has the proportions of `shape`, in pixels.

    Its sides are rounded to whole pixels. Where that leaves half a pixel on either side, both borders are rounded to
    the even number, as Pillow does it in the diffusers scripts: the box is then a pixel wider or narrower, or as wide.
    """
    tall, wide = shape
    box_width = max(1, min(width, (2 * height * wide + tall) // (2 * tall)))
    box_height = max(1, min(height, (2 * width * tall + wide) // (2 * wide)))
    left, top = (width - box_width) / 2, (height - box_height) / 2
    return round(left), round(top), round(left + box_width), round(top + box_height)


def resolutions_of(sets: Sequence[ShapeSet]) -> list[int]:
    """The resolutions of some sets, ascending, each once."""
    return sorted({each.resolution for each in sets})


def _order(shape: Shape) -> tuple[Fraction, int]:
    tall, wide = shape
    return Fraction(tall, wide), tall * wide


def _sizes(widths: np.ndarray, heights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sizes as int64, what is unknown as one pixel, and which are known."""
    known = (widths > 0) & (heights > 0)
    return np.where(known, widths, 1).astype(np.int64), np.where(known, heights, 1).astype(np.int64), known


def _share(widths: np.ndarray, heights: np.ndarray, tall: int | np.ndarray, wide: int | np.ndarray) -> np.ndarray:
    """The share of pictures that a crop to the proportions of a shape keeps: the quotient of exact products."""
    across, upright = widths * tall, heights * wide
    return np.minimum(across, upright) / np.maximum(across, upright)
