"""Samples of a cache as pictures: originals of the source, and what their first latents decode to, as asked for."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from kcache.config import CountReport
from kcache.config.shapes import Shape, ShapeSet
from kcache.store.cache import Cache
from kcache.store.recipe import LATENTS

if TYPE_CHECKING:
    from kcache.report.cache import ReportConfig

SIDE = 152
"""Side of their pictures, in pixels: three pairs fit beside each other."""
CAPTIONS, CAPTION = 5, 300
"""Captions of a sample that are shown, and characters of a caption."""


def originals_and_decoded(
    cache: Cache, chosen: np.ndarray, config: "ReportConfig", report: CountReport
) -> tuple[Sequence[np.ndarray | str | None], Sequence[np.ndarray | None], list[Shape]]:
    """Of `chosen` samples (k,), which ascend, the originals, what their latents decode to, and their shapes.

    Pixels are (3, h, w) float32 in -1..1; None where that was not asked for or is not there, or why an original is not.
    """
    # Not at the top: only pictures need torch.
    from kcache.report.drawn.reconstructions import decoded, originals

    shapes: list[Shape] = [(SIDE, SIDE)] * len(chosen)
    latents: list[np.ndarray | None] = [None] * len(chosen)
    decoder = config.pretrained_decoder_model_name_or_path
    for part, samples, places in _parts_shown(cache, chosen) if cache.manifest.shape_sets else ():
        rows = part.read(samples, ["latents"])["latents"] if decoder is not None else [None] * len(samples)
        for place, row in zip(places.tolist(), rows, strict=True):
            shapes[place], latents[place] = part.shape or shapes[place], row
    given: Sequence[np.ndarray | str | None] = [None] * len(chosen)
    if config.source is not None:
        given = originals(cache, chosen, config.source, config.reading, shapes, report)
    made: Sequence[np.ndarray | None] = [None] * len(chosen)
    if decoder is not None:
        made = decoded(latents, decoder, config.device, report)
    return given, made, shapes


def shown_set(cache: Cache) -> ShapeSet:
    """The set of shapes that samples are shown in: the first one of several shapes, or else the first."""
    sets = cache.manifest.shape_sets
    return next((each for each in sets if not each.is_square), sets[0])


def _parts_shown(cache: Cache, chosen: np.ndarray) -> Iterator[tuple[Cache, np.ndarray, np.ndarray]]:
    """Parts of one shape, which of their samples (m,) are among the `chosen` (k,), and where there these are (m,)."""
    shown = shown_set(cache)
    opened = Cache.open(cache.path, shown.resolution, buckets=not shown.is_square, flip=False)
    for part in opened.by_shape(*LATENTS.fields):
        numbers = np.arange(len(part)) if part.held.selected is None else part.held.selected
        if len(here := np.flatnonzero(np.isin(chosen, numbers))):
            yield part, np.searchsorted(numbers, chosen[here]), here


def as_image(part: np.ndarray | str, shape: Shape) -> Image.Image:
    """Pixels (3, h, w) in -1..1 as a picture; grey of that shape for one that is not there."""
    if isinstance(part, str):
        return Image.new("RGB", shape[::-1], "#c5cad0")
    return Image.fromarray(np.rint((part.transpose(1, 2, 0) + 1) * 127.5).clip(0, 255).astype(np.uint8))


def caption_text(row: Mapping[str, Any]) -> str:
    """The captions of a sample, one a line: the first ones, long ones cut."""
    lines = [text if len(text) <= CAPTION else text[: CAPTION - 1] + "…" for text in row["captions"][:CAPTIONS]]
    left_out = len(row["captions"]) - len(lines)
    return "\n".join([*lines, f"and {left_out:,} more"] if left_out else lines)
