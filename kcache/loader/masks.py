"""Masks to inpaint with: which latent pixels of a sample are kept, and which are the hole, drawn anew at each turn.

All arithmetic on pixels is +, −, ×, ÷ and square roots, which are rounded alike on every machine, so that masks are,
too. A shape is a level of each pixel, low inside of it: the hole is where the level is below a bound, and the bound is
what gives the hole its share of the picture. A hole grows where the level's minimum over the neighbours is taken.
"""

from collections.abc import Callable

import numpy as np

from kcache.loader.chance import mask_stream

_FULL = 0.1
"""Share of masks that are all hole: how a pipeline is asked for a whole picture."""
_HOLE = 0.05, 0.95
"""Shares that holes have of the picture, grown."""
_STROKE = 0.05, 0.5
"""Shares of a stroke: with more it is a blob."""
_WAVES = 4
"""How often a blob's edge may swing in and out, at most."""

Generator = np.random.Generator
Shape = Callable[[Generator, np.ndarray, np.ndarray], np.ndarray]
"""Draws the level of each pixel, (h, w), from their places (h, 1) and (w,)."""


def draw_masks(seed: int, turns: np.ndarray, height: int, width: int, *, growth: bool = True) -> np.ndarray:
    """Masks for the samples at `turns` (B,) int64 → (B, 1, height, width) float32: 1 is kept, 0 is the hole.

    Sides are in latent pixels. One in ten is all hole. The others are boxes, blobs, strokes and borders, each alike;
    half of them are turned inside out. Holes take 5 to 95 % of the picture, as near as its pixels allow, and never
    none. With `growth` they are what `grow` makes of those drawn without it: their shares are meant so.
    """
    masks = np.empty((len(turns), 1, height, width), np.float32)
    y, x = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)
    for mask, turn in zip(masks, turns.tolist(), strict=True):
        mask[0] = _draw(mask_stream(seed, turn), y, x, growth)
    return masks


def grow(masks: np.ndarray) -> np.ndarray:
    """Masks (…, h, w), 1 kept and 0 hole, with each hole larger by a latent pixel in six directions.

    That is what diffusers' inpainting pipelines do to every mask they are given (`prepare_mask`), which leave out two
    of the diagonals.
    """
    grown = masks.copy()
    for here, there in ((np.s_[:-1], np.s_[1:]), (np.s_[1:], np.s_[:-1])):
        for side in ((here, np.s_[:]), (np.s_[:], here), (here, here)):
            other = tuple(there if part == here else part for part in side)
            target = grown[..., *side]
            np.minimum(target, masks[..., *other], out=target)
    return grown


def _draw(generator: Generator, y: np.ndarray, x: np.ndarray, growth: bool) -> np.ndarray:
    """The mask (h, w) that `generator` draws; `y` (h, 1) and `x` (w,) are the pixels' places."""
    height, width = len(y), len(x)
    if generator.random() < _FULL:
        return np.zeros((height, width), np.float32)
    shape = _SHAPES[generator.integers(len(_SHAPES))]
    inverted = generator.random() < 0.5
    share = _between(generator, *(_STROKE if shape is _stroke else _HOLE))
    level = shape(generator, y, x)
    if inverted:
        level, share = -level, 1 - share
    grown = grow(level)
    # At most this share is below the bound; pixels of the lowest level are a hole, whatever share they have.
    rank = int(share * grown.size)
    bound = max(np.partition(grown, rank, axis=None)[rank], np.nextafter(level.min(), np.float32(np.inf)))
    return ((grown if growth else level) >= bound).astype(np.float32)


def _box(generator: Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The larger of the distances from a centre by height and by width, one of them stretched."""
    down, across = _centre(generator, y, x)
    return np.maximum(np.abs(down) * _between(generator, 0.5, 2), np.abs(across))


def _blob(generator: Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The distance from a centre, turned and stretched, over a radius that is a Fourier series of the angle."""
    down, across = _centre(generator, y, x)
    a, b = (_between(generator, -0.5, 0.5) for _ in range(2))
    stretch = _between(generator, 0.5, 2)
    down, across = (a * down + b * across) * stretch, a * across - b * down
    distance = np.sqrt(down * down + across * across)
    cosine, sine = (part / np.maximum(distance, np.float32(1e-6)) for part in (across, down))
    # Horner's rule in powers of the angle's cos + i sin. The coefficients' sum is below 1, so the radius is above 0.
    real, imaginary = np.zeros_like(distance), np.zeros_like(distance)
    for wave in range(_WAVES, 0, -1):
        p, q = (_between(generator, -0.45, 0.45) / (wave + 1) for _ in range(2))
        real, imaginary = real + p, imaginary + q
        real, imaginary = real * cosine - imaginary * sine, real * sine + imaginary * cosine
    return distance / np.maximum(1 + real, np.float32(0.05))


def _stroke(generator: Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The square of the distance from a line through two to five points."""
    points = generator.random((2 + generator.integers(4), 2)) * (len(y) - 1, len(x) - 1)
    level = np.full((len(y), len(x)), np.inf, np.float32)
    for (top, left), (bottom, right) in zip(points[:-1].tolist(), points[1:].tolist(), strict=True):
        rise, run = bottom - top, right - left
        down, across = y - top, x - left
        length = max(rise * rise + run * run, 1e-6)
        along = np.clip(down * (rise / length) + across * (run / length), 0, 1)
        down, across = down - along * rise, across - along * run
        np.minimum(level, down * down + across * across, out=level)
    return level


def _border(generator: Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The distance from the nearest of one to four sides, which are wide to different degrees."""
    height, width = len(y), len(x)
    sides = (y / height, (height - 1 - y) / height, x / width, (width - 1 - x) / width)
    chosen = int(generator.integers(1, 16))
    level = np.full((height, width), np.inf, np.float32)
    for number, side in enumerate(sides):
        weight = _between(generator, 0.5, 1)
        if chosen >> number & 1:
            level = np.minimum(level, side * weight)
    return level


_SHAPES: tuple[Shape, ...] = (_box, _blob, _stroke, _border)


def _centre(generator: Generator, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far pixels are below a point and to its right, as shares of the picture's sides."""
    down, across = generator.random(2).tolist()
    return y / len(y) - np.float32(down), x / len(x) - np.float32(across)


def _between(generator: Generator, least: float, most: float) -> float:
    return least + (most - least) * generator.random()
