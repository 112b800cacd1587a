"""What an expression may name of some samples, as they are listed or by their rows; see `kcache.store.selection`."""

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from kcache.store.likeness.duplicates import DUPLICATE
from kcache.store.likeness.known import known_caption_cosines, known_duplicates
from kcache.store.recipe import TEXT
from kcache.store.rows import unit_bytes
from kcache.store.selection import Column, columns_of

if TYPE_CHECKING:
    import pyarrow

    from kcache.store.cache import Cache


class Columns:
    """The columns of a cache's samples. Those of rows are computed for all samples when the first one is asked for."""

    def __init__(self, cache: "Cache") -> None:
        self._cache = cache

    def of(self, numbers: np.ndarray, part: "pyarrow.Table") -> dict[str, Callable[[], Column]]:
        """Those of the samples with these `numbers` (n,), which are listed in `part`."""
        columns = columns_of(part)
        if TEXT.name in self._cache.recipes:
            columns["tokens"] = lambda: self._most_tokens(numbers)
        columns["caption_cosine"] = lambda: self._caption_cosines[numbers]
        columns["duplicate_cosine"] = lambda: self._duplicates["cosine"][numbers]
        columns["duplicate"] = lambda: self._duplicates["cosine"][numbers] >= np.float32(DUPLICATE)
        return columns

    def _most_tokens(self, samples: np.ndarray) -> np.ndarray:
        """Tokens of the longest caption of each of some samples, (n,) int64."""
        name = "text_encoder_hidden_states"
        cache = self._cache
        return cache.held.longest_texts(name, samples) // unit_bytes(cache.field(name), cache.dtype(name))

    @cached_property
    def _caption_cosines(self) -> np.ndarray:
        return known_caption_cosines(self._cache)

    @cached_property
    def _duplicates(self) -> np.ndarray:
        return known_duplicates(self._cache)
