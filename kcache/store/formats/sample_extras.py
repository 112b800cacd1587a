"""Columns of samples that few say anything by: a file lacks them where no sample does, as all did at first.

Weights and repeats are arrays of the index as well, on the same condition: `weight.npy` and `repeats.npy`, (N,) each.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kcache.store.formats.columns import Samples, sample_schema
from kcache.store.formats.parts import Rows

if TYPE_CHECKING:
    import pyarrow

_EXTRAS: Mapping[str, Any] = {"weight": 1.0, "repeats": 1, "control_keys": []}
"""What a sample that has nothing there means."""
COUNTS: Mapping[str, np.dtype[Any]] = {"weight": np.dtype("<f4"), "repeats": np.dtype("<i4")}
"""The columns that are arrays of the index."""


class Counts(NamedTuple):
    """What samples count; None where the index has no such array, so that it is 1 of all of them."""

    weights: np.ndarray | None = None
    """(N,) float32: what the loss of each counts."""
    repeats: np.ndarray | None = None
    """(N,) int32: how often each comes in an epoch."""


def file_schema(samples: "Samples") -> "pyarrow.Schema":
    """The columns that a file of these samples has: those that any of them says something by."""
    import pyarrow as pa

    said = _said(samples, _EXTRAS)
    return pa.schema([field for field in sample_schema() if field.name not in _EXTRAS or field.name in said])


def count_arrays(samples: "Samples") -> dict[str, Rows]:
    """The arrays of the index of what samples count: those that any of them says something by."""
    said = sorted(_said(samples, COUNTS))
    return {name: Rows(COUNTS[name], len(samples), _column(samples, name)) for name in said}


def _column(samples: "Samples", name: str) -> Iterator[np.ndarray]:
    yield from (table[name].to_numpy() for table in samples.each())


def check_counts(name: str, _: int, part: np.ndarray) -> None:
    """Raise ValueError for a part of such an array that cannot be one."""
    fits = np.isfinite(part) & (part >= 0) if name == "weight" else part >= 1
    if not fits.all():
        raise ValueError(f"{name}.npy has {part[~fits][0]}")


def _said(samples: "Samples", names: Collection[str]) -> set[str]:
    return {name for table in samples.each() for name in names if extra_rows(table, name).any()}


def is_file_schema(schema: "pyarrow.Schema") -> bool:
    """Whether a file with these columns is one of samples."""
    import pyarrow as pa

    names = set(schema.names)
    expected = [field for field in sample_schema() if field.name not in _EXTRAS or field.name in names]
    return schema.equals(pa.schema(expected))


def with_extras(table: "pyarrow.Table", columns: Collection[str]) -> "pyarrow.Table":
    """The table of a file with those of `columns` that the file lacks, as nothing is said by them."""
    import pyarrow as pa

    for number, field in enumerate(sample_schema()):
        if field.name in columns and field.name not in table.column_names:
            value = pa.scalar(_EXTRAS[field.name], field.type)
            table = table.add_column(min(number, table.num_columns), field, pa.repeat(value, len(table)))
    return table


def extra_rows(table: "pyarrow.Table", name: str) -> np.ndarray:
    """(n,) bool: which samples of a table say something by such a column."""
    column = table[name].combine_chunks()
    if name == "control_keys":
        return np.diff(np.asarray(column.offsets)) > 0
    return column.to_numpy(zero_copy_only=False) != _EXTRAS[name]


def with_controls(samples: Samples, numbers: Sequence[int]) -> Samples:
    """The samples with those of their control images only that have these `numbers`, ascending, in their lists."""
    import pyarrow as pa

    def kept(table: "pyarrow.Table", _: slice) -> "pyarrow.Table":
        field = table.schema.field("control_keys")
        lists = [[keys[number] for number in numbers] for keys in table["control_keys"].to_pylist()]
        return table.set_column(table.schema.get_field_index(field.name), field, pa.array(lists, field.type))

    return samples.changed(kept)


def extras_of(table: "pyarrow.Table") -> list[dict[str, Any]]:
    """What each sample of a table says by such columns, as plain JSON values: {} for most."""
    told: list[dict[str, Any]] = [{} for _ in range(len(table))]
    for name in _EXTRAS:
        for number in np.flatnonzero(extra_rows(table, name)).tolist():
            value = table[name][number].as_py()
            told[number][name] = [key.hex() for key in value] if name == "control_keys" else value
    return told
