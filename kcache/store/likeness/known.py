"""What was computed of all samples of a cache, kept in kcache's own folder until another manifest is written."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from kcache.disk.memo import DigestMemo
from kcache.store.likeness.cosines import Done, caption_cosines
from kcache.store.likeness.duplicates import COMPARED, FOUND, find_duplicates
from kcache.store.manifest import MANIFEST
from kcache.store.shaped.held import Held

if TYPE_CHECKING:
    from kcache.store.cache import Cache

logger = logging.getLogger(__name__)

_COSINE = np.dtype("<f4")
# The numbers change when what is computed does: what was kept before is then computed anew.
_CAPTIONS, _DUPLICATES = "caption_cosine 1", "duplicates 1"


def whole(cache: "Cache") -> "Cache":
    """The cache with all of its samples."""
    if cache.held.selected is None:
        return cache
    return type(cache)(cache.path, cache.manifest, Held.all_of(cache.held.reads))


def known_caption_cosines(cache: "Cache", done: Done = lambda done, total: None) -> np.ndarray:
    """`caption_cosines` of the cache's samples, from before where it is the same cache."""
    return _known(cache, _CAPTIONS, _COSINE, lambda all_of_it: caption_cosines(all_of_it, done))


def known_duplicates(cache: "Cache", done: Done = lambda done, total: None) -> np.ndarray:
    """`find_duplicates` of the whole cache, its entries of the samples that are here; from before where it is the same.

    The samples named in it are numbers in the whole cache.
    """

    def find(all_of_it: "Cache") -> np.ndarray:
        if len(all_of_it) > COMPARED:
            logger.warning(
                "near-duplicates of all %s samples of %s are looked for: a million take minutes; what is found is kept",
                f"{len(all_of_it):,}", all_of_it.path,
            )  # fmt: skip
        return find_duplicates(all_of_it, done)

    return _known(cache, _DUPLICATES, FOUND, find)


def _known(cache: "Cache", part: str, dtype: np.dtype, compute: "Callable[[Cache], np.ndarray]") -> np.ndarray:
    size = cache.manifest.samples * dtype.itemsize
    with DigestMemo() as memo:
        content = b""
        for again in (False, True):
            if not again or len(content) != size:
                content = memo.digest(cache.path / MANIFEST, part, lambda: compute(whole(cache)).tobytes(), again)
    values = np.frombuffer(content, dtype)
    return values if cache.held.selected is None else values[cache.held.selected]
