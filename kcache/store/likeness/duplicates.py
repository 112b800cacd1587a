"""Which pictures are nearly the same as one before them, by the cosine of their `image_embeds`.

The largest picture comes first. As in SemDeDup (Abbas et al. 2023, https://arxiv.org/abs/2303.09540) rows are compared
within cells that k-means makes, and here with those that have the cell as one of their next, too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kcache.disk.scratch import kept, spans
from kcache.store.likeness.clusters import moved
from kcache.store.likeness.cosines import IMAGE, ROWS_PER_READ, Done, unit

if TYPE_CHECKING:
    from kcache.store.cache import Cache

DUPLICATE = 0.97
"""The cosine from which on a picture is a duplicate, where nothing else is said."""
FOUND = np.dtype([("cosine", "<f4"), ("sample", "<i8")])
"""Of each sample the largest cosine to one before it, and which that is; -1 and itself where none was compared."""
COMPARED = 32_768
"""Samples up to which every pair is compared."""
CELLS_TRIED = 6
"""Cells that each row is compared in: those that it is nearest to."""
_SAMPLED, _ROUNDS = 32_768, 3
"""Rows that decide the cells, and how often those are moved."""
_TOGETHER = 2048
"""Rows that are compared with as many others at a time."""


@dataclass(frozen=True, slots=True)
class Group:
    """Pictures that are nearly the same: the sample that is kept, and its duplicates (n,) with their cosines (n,)."""

    kept: int
    duplicates: np.ndarray
    cosines: np.ndarray


def find_duplicates(cache: "Cache", done: Done = lambda done, total: None) -> np.ndarray:
    """Of each sample the nearest one before it, (N,) of `FOUND`; no threshold has a part in it.

    Rows wait in a file in the temporary folder. Raises CacheIncompleteError, CacheCorruptError and CacheWriteError.
    """
    cache.table_of(IMAGE)
    total = 2 * len(cache)

    def read() -> Iterator[np.ndarray]:
        for span in spans(len(cache), ROWS_PER_READ):
            yield cache.table_rows(IMAGE, span.start, span.stop)[0]
            done(span.stop, total)

    empty = np.empty((0, *cache.field(IMAGE).shape), cache.dtype(IMAGE))
    order = _order(cache)
    return nearest_before(kept(read(), empty), order, lambda part, whole: done(len(cache) + part, total))


def _order(cache: "Cache") -> np.ndarray:
    """The samples (N,) int64, the largest pictures first, and of equal ones the first."""
    pixels = np.zeros(len(cache), np.int64)
    for numbers, part in cache.parts({"width", "height"}):
        pixels[numbers] = part["width"].to_numpy().astype(np.int64) * part["height"].to_numpy()
    return np.argsort(-pixels, kind="stable")


def nearest_before(
    rows: np.ndarray,
    order: np.ndarray,
    done: Done = lambda done, total: None,
    *,
    compared: int = COMPARED,
    together: int = _TOGETHER,
) -> np.ndarray:
    """For each of `rows` (N, D) the one with the largest cosine of those before it in `order` (N,): (N,) of `FOUND`.

    Up to `compared` rows, all pairs are compared; of more, those within the cells. `together` bounds the memory.
    """
    found = np.zeros(len(rows), FOUND)
    found["cosine"], found["sample"] = -1, np.arange(len(rows))
    rank = np.empty(len(rows), np.int64)
    rank[order] = np.arange(len(rows))
    cells = [(order, order[:0])] if len(rows) <= compared else _cells(rows, rank)
    finished = 0
    for homes, visitors in cells:
        _compare_home(rows, homes, found, together)
        _compare_visitors(rows, homes, visitors, rank, found, together)
        finished += len(homes)
        done(finished, len(rows))
    return found


def _cells(rows: np.ndarray, rank: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The rows that are nearest to each cell's middle, in order, and those that have it among their next."""
    rng = np.random.default_rng(0)
    sampled = unit(rows[np.sort(rng.choice(len(rows), min(_SAMPLED, len(rows)), replace=False))])
    # So many that finding the cells takes about as long as comparing within them.
    count = min(round((2 * len(rows)) ** 0.5), len(sampled))
    middles = moved(sampled, sampled[rng.choice(len(sampled), count, replace=False)], _ROUNDS)
    tried = np.empty((len(rows), min(CELLS_TRIED, count)), np.int32)
    for span in spans(len(rows), _TOGETHER):
        cosines = unit(rows[span]) @ middles.T
        best = np.argpartition(-cosines, tried.shape[1] - 1, axis=1)[:, : tried.shape[1]]
        by_cosine = np.argsort(-np.take_along_axis(cosines, best, 1), axis=1, kind="stable")
        tried[span] = np.take_along_axis(best, by_cosine, 1)
    # The cell of each entry of `tried`, in order of cells, and those of rows that are at home first.
    places = np.argsort(tried, axis=None, kind="stable")
    bounds = np.searchsorted(tried.reshape(-1)[places], np.arange(count + 1))
    for first, last in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        members, choice = np.divmod(places[first:last], tried.shape[1])
        homes = members[choice == 0]
        yield homes[np.argsort(rank[homes])], members[choice > 0]


def _compare_home(rows: np.ndarray, homes: np.ndarray, found: np.ndarray, together: int) -> None:
    """Compare rows of a cell, which are in order, with those before them."""
    for later in spans(len(homes), together):
        second = unit(rows[homes[later]])
        for earlier in spans(later.stop, together):
            first = second if earlier.start == later.start else unit(rows[homes[earlier]])
            cosines = second @ first.T
            if earlier.start == later.start:
                cosines[np.triu_indices(len(cosines))] = -np.inf
            _note(found, homes[later], homes[earlier], cosines)


def _compare_visitors(
    rows: np.ndarray, homes: np.ndarray, visitors: np.ndarray, rank: np.ndarray, found: np.ndarray, together: int
) -> None:
    """Compare rows of a cell with those at home in others, either of which may be before the other."""
    for here in spans(len(homes), together):
        own = unit(rows[homes[here]])
        for there in spans(len(visitors), together):
            cosines = own @ unit(rows[visitors[there]]).T
            comes_first = rank[visitors[there]] < rank[homes[here], None]
            _note(found, homes[here], visitors[there], np.where(comes_first, cosines, -np.inf))
            _note(found, visitors[there], homes[here], np.where(comes_first, -np.inf, cosines).T)


def _note(found: np.ndarray, later: np.ndarray, earlier: np.ndarray, cosines: np.ndarray) -> None:
    """Take over the largest of `cosines` (n, m) of `later` rows (n,) to `earlier` ones (m,), where it is larger."""
    best = cosines.argmax(1)
    largest = np.take_along_axis(cosines, best[:, None], 1)[:, 0]
    better = largest > found["cosine"][later]
    found["cosine"][later[better]] = largest[better]
    found["sample"][later[better]] = earlier[best[better]]


def groups_of(found: np.ndarray, cosine: float) -> list[Group]:
    """The groups of near-duplicates from `cosine` on, the largest first; samples without any are in none."""
    is_duplicate = found["cosine"] >= np.float32(cosine)
    kept_one = np.where(is_duplicate, found["sample"], np.arange(len(found)))
    while not np.array_equal(further := kept_one[kept_one], kept_one):
        kept_one = further  # twice as far along the chain each time; what is kept names itself
    duplicates = np.flatnonzero(is_duplicate)
    duplicates = duplicates[np.argsort(kept_one[duplicates], kind="stable")]
    numbers, starts = np.unique(kept_one[duplicates], return_index=True)
    groups = [
        Group(number, members, found["cosine"][members])
        for number, members in zip(numbers.tolist(), np.split(duplicates, starts[1:]), strict=True)
    ] if len(duplicates) else []  # fmt: skip
    return sorted(groups, key=lambda group: -len(group.duplicates))
