"""The samples of several caches as those of one.

They are united by id. The same image with the same captions counts once, with other captions it gets them all, those of
the first cache first; its control images are the first cache's, and masks that it lacks there the others'. All else,
its weight and repeats too, is what the first cache says.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kcache.errors import ConfigError
from kcache.store.digests import NO_CONTROL, Keys, content_key, pack_keys
from kcache.store.formats.columns import Samples, sample_list, sample_schema, table_of
from kcache.store.samples import Sample, with_ids

if TYPE_CHECKING:
    import pyarrow

_MOST_REPEATS = (1 << 31) - 1
"""What the column of repeats holds."""
_MOST_WEIGHT = float(np.finfo(np.float32).max)


def multiplied(
    caches: Sequence[Samples], weights: Sequence[float] | None, repeats: Sequence[int] | None
) -> list[Samples]:
    """The samples of each cache, their weights and repeats multiplied by those of the cache, None being 1 for each.

    Raises ConfigError for numbers that are none, or lead to none that a cache can hold.
    """
    weights, repeats = weights or [1.0] * len(caches), repeats or [1] * len(caches)
    if not len(caches) == len(weights) == len(repeats):
        raise ConfigError(
            f"{len(weights)} weights and {len(repeats)} repeats were given for {len(caches)} caches; expected one of "
            "each for each"
        )
    for weight in weights:
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"the weight of a cache is {weight}; expected a number, 0 or more")
    for each in repeats:
        if type(each) is not int or not 1 <= each <= _MOST_REPEATS:
            raise ConfigError(f"the repeats of a cache are {each!r}; expected a whole number, 1 or more")
    return [_times(*each) for each in zip(caches, weights, repeats, strict=True)]


def _times(samples: Samples, weight: float, repeats: int) -> Samples:
    import pyarrow as pa

    factors: dict[str, tuple[Any, float]] = {
        "weight": (np.float64(weight), _MOST_WEIGHT), "repeats": (np.int64(repeats), _MOST_REPEATS)
    }  # fmt: skip
    factors = {name: each for name, each in factors.items() if each[0] != 1}

    def change(table: "pyarrow.Table", _: slice) -> "pyarrow.Table":
        for name, (factor, most) in factors.items():
            values, field = table[name].to_numpy() * factor, sample_schema().field(name)
            if values.max(initial=0) > most:
                raise ConfigError(
                    f"a sample would have {name} {values.max():,}; expected {most:,} at most; give its cache less"
                )
            column = pa.array(values.astype(field.type.to_pandas_dtype()), field.type)
            table = table.set_column(table.column_names.index(name), field, column)
        return table

    return samples.changed(change) if factors else samples


def united(caches: Sequence[Samples]) -> Samples:
    """All samples in the order of the caches, of each id one, with all its captions."""
    import pyarrow as pa

    starts = np.cumsum([0, *map(len, caches)])
    first = first_alike(Keys(np.concatenate([_id_keys(table) for samples in caches for table in samples.tables])))
    again = np.flatnonzero(first != np.arange(len(first)))
    again = again[np.argsort(first[again], kind="stable")]  # by what each is the same as, and then in their order

    def tables() -> "Iterator[pyarrow.Table]":
        end = 0
        for table in (table for samples in caches for table in samples.tables):
            start, end = end, end + len(table)
            lo, hi = np.searchsorted(first[again], (start, end))
            more = again[lo:hi]
            if len(more):
                table = _with_more(table, first[more] - start, _samples_at(caches, starts, more))
            yield table.filter(pa.array(first[start:end] == np.arange(start, end)))

    return with_ids(Samples(tables()))


def _id_keys(table: "pyarrow.Table") -> np.ndarray:
    """A key for the id of each sample, (n, 16) uint8."""
    return pack_keys(content_key(identity.encode()) for identity in table["id"].to_pylist())


def first_alike(keys: Keys) -> np.ndarray:
    """(n,) int64: the number of the first of `keys` that is equal to each."""
    order, new = keys.in_order()
    first = np.empty(len(keys), np.int64)
    first[order] = order[new][np.cumsum(new) - 1]
    return first


def _samples_at(caches: Sequence[Samples], starts: np.ndarray, numbers: np.ndarray) -> list[Sample]:
    """Of the samples of all `caches`, those with `numbers`, in that order."""
    found = dict[int, Sample]()
    for samples, start, end in zip(caches, starts[:-1], starts[1:], strict=True):
        inside = numbers[(numbers >= start) & (numbers < end)]
        found.update(zip(inside.tolist(), samples.at(inside - start), strict=True))
    return [found[number] for number in numbers.tolist()]


def _with_more(table: "pyarrow.Table", rows: np.ndarray, others: Sequence[Sample]) -> "pyarrow.Table":
    """The samples of a `table`, those in `rows` with what the `others` have beside theirs: captions, and masks."""
    samples = sample_list(table)
    for row, other in zip(rows.tolist(), others, strict=True):
        known = samples[row]
        captions = dict(zip(other.caption_keys, other.captions, strict=True))
        captions |= zip(known.caption_keys, known.captions, strict=True)
        keys = tuple(dict.fromkeys((*known.caption_keys, *other.caption_keys)))
        pairs = zip(known.control_keys, other.control_keys, strict=True)
        controls = tuple(theirs if own == NO_CONTROL else own for own, theirs in pairs)
        order = tuple(map(captions.__getitem__, keys))
        samples[row] = replace(known, captions=order, caption_keys=keys, control_keys=controls)
    return table_of(samples)
