"""Records in columns: Arrow tables of some ten thousand each, with no Python object for every record.

Many are kept in files that are mapped, so that what takes memory is what is looked at.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate, chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from kcache.disk.scratch import mapped_file, unnamed_file, writing_there

if TYPE_CHECKING:
    import pyarrow

RECORDS_PER_TABLE = 1 << 16
_WALKED = 1 << 9
"""Values that are taken out of a column at a time where records are asked for in turn."""
TABLES_IN_MEMORY = 16
"""Tables that are kept in memory; where there are more, all are in a file."""


class Records:
    """A fixed sequence of records with equal columns."""

    def __init__(self, schema: "pyarrow.Schema", tables: Iterable["pyarrow.Table"]) -> None:
        """The rows of `tables`, of any lengths, with the columns of `schema`; they are asked for once, in turn."""
        found, _ = kept(_joined(iter(tables)), schema)
        self._starts = [0, *accumulate(map(len, found))]
        self._tables = [{name: table[name].chunk(0) for name in schema.names} for table in found]
        self._taken = dict[str, tuple[int, list[Any]]]()
        """By column what was taken out of it last: the number of the first record, and the values from there on."""

    @classmethod
    def of(cls, schema: "pyarrow.Schema", rows: Iterable[tuple[Any, ...]]) -> "Records":
        """Records that are given one by one."""
        return cls(schema, _tables(schema, iter(rows)))

    def __len__(self) -> int:
        return self._starts[-1]

    def value(self, i: int, column: str) -> Any:
        """What record `i` has in a column, which is text, bytes, a number, a list of such, or None."""
        first, values = self._taken.get(column, (0, []))
        if not first <= i < first + len(values):
            # Whoever asks for one record after the other gets many at a time: each alone takes several times as long.
            values = self._values(i, column, _WALKED if i == first + len(values) else 1)
            first = i
            self._taken[column] = first, values
        return values[i - first]

    def _values(self, first: int, column: str, count: int) -> list[Any]:
        """What up to `count` records from `first` have in a column: those of one table."""
        table = bisect_right(self._starts, first) - 1
        found: list[Any] = self._tables[table][column].slice(first - self._starts[table], count).to_pylist()
        return found

    def numbers(self, column: str, first: int = 0, last: int | None = None) -> np.ndarray:
        """(last - first,) what the records from `first` to `last` have in a column of numbers."""
        last = len(self) if last is None else last
        parts = []
        for start, table in zip(self._starts, self._tables, strict=False):
            if first < start + len(table[column]) and start < last:
                parts.append(table[column].to_numpy()[max(first - start, 0) : last - start])
        return np.concatenate(parts) if parts else np.empty(0, np.int64)


def kept(tables: Iterator["pyarrow.Table"], schema: "pyarrow.Schema") -> tuple[list["pyarrow.Table"], np.ndarray]:
    """Tables in one piece each, in memory where they are few; else mapped from a file that is gone with them.

    Beside them the mapped content, (bytes,) uint8, which `release` gives back.
    """
    import pyarrow as pa

    few = list(islice(tables, TABLES_IN_MEMORY + 1))
    if len(few) <= TABLES_IN_MEMORY:
        return few, np.empty(0, np.uint8)
    with unnamed_file() as file:
        writer = pa.ipc.new_file(pa.PythonFile(file, "w"), schema)
        for table in chain(few, tables):
            with writing_there():
                for batch in table.combine_chunks().to_batches():
                    writer.write_batch(batch)
        with writing_there():
            writer.close()
        content = mapped_file(file)
    reader = pa.ipc.open_file(pa.py_buffer(content))
    batches = map(reader.get_batch, range(reader.num_record_batches))
    return [pa.Table.from_batches([batch]) for batch in batches], np.frombuffer(content, np.uint8)


def _joined(tables: Iterator["pyarrow.Table"]) -> Iterator["pyarrow.Table"]:
    """The rows of tables in fewer and larger ones, in one piece each; none is empty."""
    import pyarrow as pa

    waiting, rows = list[pa.Table](), 0
    for table in tables:
        if len(table):
            waiting.append(table)
            rows += len(table)
        if rows >= RECORDS_PER_TABLE:
            yield pa.concat_tables(waiting).combine_chunks()
            waiting, rows = [], 0
    if waiting:
        yield pa.concat_tables(waiting).combine_chunks()


def _tables(schema: "pyarrow.Schema", rows: Iterator[tuple[Any, ...]]) -> Iterator["pyarrow.Table"]:
    import pyarrow as pa

    while some := list(islice(rows, RECORDS_PER_TABLE)):
        columns = zip(schema, zip(*some, strict=True), strict=True)
        yield pa.table([pa.array(values, field.type) for field, values in columns], schema=schema)
