"""Some samples of an index: where their rows stand is looked up in the whole one when it is asked for.

What takes memory is one number per sample, and where its captions begin: never a copy of the entries.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from kcache.store.recipe import kind_of

CAPTION_BOUNDS = "captions"

_TOGETHER = 1 << 20
"""Samples or entries that are looked at together where all are."""


class Chosen:
    """The entries of one table that some samples use, then the reserved one: as an array of them is asked."""

    def __init__(
        self, entries: np.ndarray, in_use: int, samples: np.ndarray, bounds: tuple[np.ndarray, np.ndarray] | None = None
    ) -> None:
        """`entries` are those of all samples, the first `in_use` of them of samples; `samples` (n,) are chosen.

        Of a table of captions, `bounds` say where those of each sample begin: in `entries`, and here.
        """
        self._entries = entries
        self._in_use = in_use
        self._samples = samples
        self._bounds = bounds
        self._count = len(samples) if bounds is None else int(bounds[1][-1])

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._entries.dtype

    @property
    def unread(self) -> int:
        """Bytes of those of all samples that nobody has asked for yet."""
        return getattr(self._entries, "unread", 0)

    def __len__(self) -> int:
        return self._count + len(self._entries) - self._in_use

    def __getitem__(self, rows: Any) -> Any:
        if isinstance(rows, str):
            return np.concatenate([self[part][rows] for part in _runs(len(self))])
        numbers = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else np.asarray(rows)
        return self._entries[self._places(numbers % len(self) if len(self) else numbers)]

    def lengths(self, field: str) -> int:
        """Bytes of all rows of a field together."""
        return sum(int(self[part][field]["length"].sum(dtype=np.int64)) for part in _runs(len(self)))

    def _places(self, numbers: np.ndarray) -> np.ndarray:
        """Where the entries with these numbers stand among all."""
        last = max(self._count - 1, 0)
        own = np.minimum(numbers, last)
        if not self._count:
            places = own
        elif self._bounds is None:
            places = self._samples[own].astype(np.int64)
        else:
            of_all, bounds = self._bounds
            samples = np.searchsorted(bounds, own, "right") - 1
            places = of_all[self._samples[samples]] + own - bounds[samples]
        return np.where(numbers >= self._count, numbers - self._count + self._in_use, places)


def chosen_index(index: Mapping[str, np.ndarray], samples: np.ndarray) -> dict[str, np.ndarray]:
    """The index of the chosen `samples` (n,), in that order, of those that `index` is of."""
    before = index[CAPTION_BOUNDS]
    bounds = chosen_bounds(before, samples)
    chosen: dict[str, Any] = {CAPTION_BOUNDS: bounds}
    for name in index.keys() - chosen.keys():
        if kind_of(name).per == "caption":
            chosen[name] = Chosen(index[name], int(before[-1]), samples, (before, bounds))
        else:
            chosen[name] = Chosen(index[name], len(before) - 1, samples)
    return chosen


def chosen_bounds(bounds: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Where the captions of the chosen `samples` (n,) begin and end, (n + 1,) int64, as `bounds` has it of all."""
    chosen = np.zeros(len(samples) + 1, np.int64)
    for part in _runs(len(samples)):
        some = samples[part]
        chosen[1:][part] = bounds[some + 1] - bounds[some]
    return np.cumsum(chosen, out=chosen)


def _runs(count: int) -> list[slice]:
    return [slice(first, min(first + _TOGETHER, count)) for first in range(0, count, _TOGETHER)]
