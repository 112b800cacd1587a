"""How fitting captions are: the cosine of `text_embeds` and `image_embeds`, which one CLIP has made.

That is the caption's CLIP score (Hessel et al. 2021, https://arxiv.org/abs/2104.08718) without its factor, and not cut
off at 0.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from kcache.disk.scratch import spans

if TYPE_CHECKING:
    from kcache.store.cache import Cache

Done = Callable[[int, int], None]
"""Is told how much is done, and of how much."""
ROWS_PER_READ = 4096
IMAGE, TEXT = "image_embeds", "text_embeds"


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows (n, D) at length 1, float32; a row of zeros stays one."""
    rows = rows.astype(np.float32)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)


def unit_rows(cache: "Cache", field: str, first: int, last: int) -> np.ndarray:
    """Rows of a field from one to another in the order of `Cache.positions`, (n, D) float32 of length 1."""
    return unit(cache.table_rows(field, first, last)[0])


def caption_cosines(cache: "Cache", done: Done = lambda done, total: None) -> np.ndarray:
    """The cosine of each sample's picture and the caption that fits it least, (N,) float32.

    The rows are read once, some thousand at a time. Where there are texts, every sample has a caption. Raises
    CacheIncompleteError where a table is lacking, and CacheCorruptError.
    """
    cache.table_of(TEXT), cache.table_of(IMAGE)  # both, before any row is read
    least = np.full(len(cache), np.inf, np.float32)
    for span in spans(len(cache), ROWS_PER_READ):
        pictures = unit_rows(cache, IMAGE, span.start, span.stop)
        bounds = np.asarray(cache.caption_bounds[span.start : span.stop + 1])
        owners = np.repeat(np.arange(len(pictures)), np.diff(bounds))
        for part in spans(len(owners), ROWS_PER_READ):
            texts = unit_rows(cache, TEXT, *(bounds[0] + [part.start, part.stop]).tolist())
            cosines = np.einsum("nd,nd->n", texts, pictures[owners[part]])
            np.minimum.at(least[span], owners[part], cosines)
        done(span.stop, len(cache))
    return least


def spread_of(cosines: np.ndarray) -> dict[str, float] | None:
    """How cosines (n,) are spread: the least, the mean, percentiles and the largest; None where there are none."""
    if not len(cosines):
        return None
    known = cosines.astype(np.float64)
    percentiles = {f"p{q}": float(np.percentile(known, q)) for q in (1, 10, 50, 90, 99)}
    return {"min": float(known.min()), "mean": float(known.mean()), **percentiles, "max": float(known.max())}
