"""How large pictures are drawn: as asked for, or as what was trained on."""

import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from kcache.config.shapes import Shape
from kcache.encoders.repositories import Repository
from kcache.errors import ConfigError, RunError
from kcache.store.recipe import TABLE_NAME, shape_of
from kcache.store.run_directory import logger, read_config, run_of

SIDE = 768
"""Height and width in pixels where nothing says what the decoder was trained at: what the published one is for."""
UNIT = 64
"""What both are multiples of with the published decoder."""
_RATIO = re.compile(r"([1-9][0-9]{0,4}):([1-9][0-9]{0,4})")


def trained_shapes(told: Mapping[str, Any]) -> dict[Shape, int]:
    """Samples of each shape that a run trains on, by what its config.json says; empty where it has no latents.

    Runs of earlier versions named their tables only, and have 0 of each.
    """
    cache = told.get("cache")
    rows, tables = (cache.get(name) if isinstance(cache, dict) else None for name in ("rows", "tables"))
    counts = rows if isinstance(rows, dict) else dict.fromkeys(tables if isinstance(tables, dict) else (), 0)
    found = {shape_of(name): count for name, count in counts.items() if TABLE_NAME.fullmatch(name)}
    return {shape: count for shape, count in found.items() if shape is not None and isinstance(count, int)}


def most_used(counts: Mapping[Shape, int]) -> Shape:
    """The shape that most samples have; of equals the one nearest to a square, then the largest."""
    return max(counts, key=lambda shape: (counts[shape], _likeness(Fraction(*shape), Fraction(1)), math.prod(shape)))


def shown_shapes(counts: Mapping[Shape, int]) -> list[Shape]:
    """Of lying, square and standing shapes the most used one each, as far as there are some with samples."""
    used = {shape: count for shape, count in counts.items() if count} or counts
    kinds = (
        {shape: used[shape] for shape in used if shape[0] < shape[1]},
        {shape: used[shape] for shape in used if shape[0] == shape[1]},
        {shape: used[shape] for shape in used if shape[0] > shape[1]},
    )
    return [most_used(kind) for kind in kinds if kind]


def unit_of(decoder: Repository) -> int:
    """What heights and widths of a decoder's pictures are multiples of, in pixels: 64 for the published one."""
    # MoVQ halves the sides once between two blocks, and the pipeline rounds those of latents to that factor, too.
    return 4 ** (len(decoder.read("movq").values.get("block_out_channels", [64])) - 1)


def picture_size(
    height: int | None,
    width: int | None,
    ratio: str | None,
    counts: Mapping[Shape, int],
    decoder: Repository,
    *,
    like: Shape | None = None,
) -> Shape:
    """Height and width in pixels: those asked for, or by what was trained on, `counts` of `trained_shapes`.

    `ratio` is a width to a height, such as "3:2". Where buckets were trained on it is the one nearest to it, else the
    size that has the area trained at. Where nothing is asked for the ratio is that of a picture with the shape `like`,
    if there is one. Raises ConfigError for what cannot be drawn.
    """
    unit, counts = unit_of(decoder), counts or {(SIDE, SIDE): 0}
    for flag, side in (("--height", height), ("--width", width)):
        if side is not None and (side < unit or side % unit):
            near = max(unit, side // unit * unit)
            raise ConfigError(
                f"{flag} is {side}; expected a multiple of {unit}, which the decoder {decoder.name} draws in; type "
                f"{flag} {near}" + (f" or {flag} {near + unit}" if near < side else "")
            )
    if ratio is not None:
        tall, wide = _nearest(_parsed(ratio, height, width), counts, unit)
    elif like is not None and height is None and width is None:
        tall, wide = _nearest(Fraction(*like), counts, unit)
    else:
        tall, wide = most_used(counts)
    return height or math.ceil(tall / unit) * unit, width or math.ceil(wide / unit) * unit


def _parsed(ratio: str, height: int | None, width: int | None) -> Fraction:
    """A height to a width, of a width to a height as text."""
    given = _RATIO.fullmatch(ratio.strip())
    if given is None:
        raise ConfigError(
            f"--aspect-ratio is {ratio[:100]!r}; expected a width and a height; type --aspect-ratio 3:2 for a lying "
            "picture, --aspect-ratio 2:3 for a standing one"
        )
    if height is not None or width is not None:
        sides = " and ".join(
            f"{flag} {side}" for flag, side in (("--height", height), ("--width", width)) if side is not None
        )
        raise ConfigError(
            f"--aspect-ratio {ratio} and {sides} were given; expected the one or the others; leave {sides} out"
        )
    return Fraction(int(given[2]), int(given[1]))


def _nearest(wanted: Fraction, counts: Mapping[Shape, int], unit: int) -> Shape:
    """The shape for a ratio of height to width."""
    if any(tall != wide for tall, wide in counts):
        used = [shape for shape, count in counts.items() if count] or [*counts]
        return max(used, key=lambda shape: (_likeness(Fraction(*shape), wanted), math.prod(shape)))
    side = most_used(counts)[0]
    tall, wide = (max(1, round(side * root / unit)) for root in (math.sqrt(wanted), math.sqrt(1 / wanted)))
    return tall * unit, wide * unit


def _likeness(one: Fraction, other: Fraction) -> Fraction:
    """The share that a crop of a picture with one ratio of height to width to the other keeps."""
    return min(one / other, other / one)


def shapes_in(folders: Sequence[Path]) -> dict[Shape, int]:
    """`trained_shapes` of the first of some folders that is a run, or a checkpoint or raw/ of one, and has latents."""
    return next((counts for folder in folders if (counts := trained_shapes(_told(folder)))), {})


def _told(folder: Path) -> Mapping[str, Any]:
    """What the run that `folder` is, or is of, says of itself; nothing where there is none, or none to read."""
    run_dir = run_of(folder)
    try:
        return {} if run_dir is None else read_config(run_dir)
    except RunError as error:
        logger.warning("%s: pictures are drawn as large as no run says", error)
        return {}
