"""Samples in columns: `records`, with no Python object for every sample."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from operator import attrgetter
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from kcache.config.shapes import ShapeSet
from kcache.disk.scratch import release
from kcache.store.digests import KEY_BYTES, Keys, Positions
from kcache.store.formats.records import RECORDS_PER_TABLE, TABLES_IN_MEMORY, kept

if TYPE_CHECKING:
    import pyarrow

SAMPLES_PER_TABLE = RECORDS_PER_TABLE
_DIGITS = np.frombuffer(bytes(range(256)).hex().encode(), np.uint8).reshape(256, 2)
"""The hex digits of each byte."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One image with its captions, as a source offers it, and with id and size as a cache has it."""

    name: str
    """Where it came from: the source's name for it."""
    image_key: bytes
    captions: tuple[str, ...]
    caption_keys: tuple[bytes, ...]
    id: str = ""
    """"" until it is known which samples there are: see `sample_ids`."""
    width: int = 0
    """Pixels, as seen: after EXIF orientation; 0 until they are asked for."""
    height: int = 0
    weight: float = 1.0
    """What its loss counts, beside 1 of others."""
    repeats: int = 1
    """How often it comes in an epoch."""
    control_keys: tuple[bytes, ...] = ()
    """One for each kind of control image that the cache has, by name; `NO_CONTROL` where it has none of that."""


def sample_schema() -> "pyarrow.Schema":
    """The columns of samples."""
    import pyarrow as pa

    return pa.schema(
        {
            "id": pa.string(),
            "name": pa.string(),
            "image_key": pa.binary(16),
            "captions": pa.list_(pa.string()),
            "caption_keys": pa.list_(pa.binary(16)),
            "width": pa.int32(),
            "height": pa.int32(),
            "weight": pa.float32(),
            "repeats": pa.int32(),
            "control_keys": pa.list_(pa.binary(16)),
        }
    )


def table_of(samples: Sequence[Sample]) -> "pyarrow.Table":
    """Some samples in columns."""
    import pyarrow as pa

    schema = sample_schema()
    columns = [pa.array(list(map(attrgetter(field.name), samples)), field.type) for field in schema]
    return pa.table(columns, schema=schema)


def sample_list(table: "pyarrow.Table") -> list[Sample]:
    """The samples in such a table."""
    rows = zip(*(column.to_pylist() for column in table.columns), strict=True)
    return [
        Sample(
            id=identity, name=name, image_key=key, captions=tuple(captions), caption_keys=tuple(keys),
            width=width, height=height, weight=weight, repeats=repeats, control_keys=tuple(controls),
        )
        for identity, name, key, captions, keys, width, height, weight, repeats, controls in rows
    ]  # fmt: skip


class Samples(Sequence[Sample]):
    """Samples in columns, asked as a list of them is."""

    def __init__(self, tables: Iterable["pyarrow.Table"]) -> None:
        """`tables` have the columns of `sample_schema`, in one piece each."""
        self.tables, self._content = kept(iter(tables), sample_schema())
        self._starts = np.cumsum([0, *map(len, self.tables)])
        self._in_shapes: dict[ShapeSet, np.ndarray] = {}

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> "Samples":
        """The samples as they are, or in columns."""
        return samples if isinstance(samples, Samples) else cls(map(table_of, _runs(samples)))

    def __len__(self) -> int:
        return int(self._starts[-1])

    @classmethod
    def of_table(cls, table: "pyarrow.Table") -> "Samples":
        """The samples in a table of any length."""
        import pyarrow as pa

        return cls(pa.Table.from_batches([batch]) for batch in table.to_batches(SAMPLES_PER_TABLE))

    @overload
    def __getitem__(self, at: int) -> Sample: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Sample]: ...
    def __getitem__(self, at: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        number = range(len(self))[at]
        table = int(np.searchsorted(self._starts, number, "right")) - 1
        [sample] = sample_list(self.tables[table].slice(number - int(self._starts[table]), 1))
        return sample

    def __iter__(self) -> Iterator[Sample]:
        for table in self.each():
            yield from sample_list(table)

    def each(self) -> Iterator["pyarrow.Table"]:
        """The tables, one after the other; what reading those in a file took of memory is given back."""
        for number, table in enumerate(self.tables, 1):
            yield table
            if number % TABLES_IN_MEMORY == 0:
                release(self._content)

    def begin_with(self, others: "Samples") -> bool:
        """Whether `others` are the first of these, in the names and pictures of all of them."""
        import pyarrow as pa

        if len(others) > len(self):
            return False
        own, there = ((table.select(["name", "image_key"]) for table in samples.each()) for samples in (self, others))
        rest = sample_schema().empty_table().select(["name", "image_key"])
        for table in there:
            while len(rest) < len(table):
                rest = pa.concat_tables([rest, next(own)])
            if not rest.slice(0, len(table)).equals(table):
                return False
            rest = rest.slice(len(table))
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # they are as long as they are

    @cached_property
    def image_keys(self) -> Keys:
        """The key of each image."""
        return Keys.joined(packed(table["image_key"]) for table in self.each())

    @cached_property
    def caption_keys(self) -> Keys:
        """The keys of all captions, sample by sample."""
        return Keys.joined(caption_keys_of(table)[0] for table in self.each())

    def control_keys(self, number: int) -> Keys:
        """The key of the control image of each sample that has this number in all of their lists, which are alike."""
        lists = (_whole(table["control_keys"]) for table in self.each() if len(table))
        return Keys.joined(packed(each.flatten()).reshape(len(each), -1, KEY_BYTES)[:, number] for each in lists)

    @cached_property
    def caption_bounds(self) -> np.ndarray:
        """(N + 1,) int64: where in `caption_keys` those of each sample begin and end."""
        bounds, ends = np.zeros(len(self) + 1, np.int64), self._starts.tolist()
        for table, first, last in zip(self.each(), ends[:-1], ends[1:], strict=True):
            bounds[first + 1 : last + 1] = bounds[first] + caption_keys_of(table)[1][1:]
        return bounds

    def in_shapes(self, shapes: ShapeSet) -> np.ndarray:
        """(N,) int16: the number of each picture's shape in a set, as `ShapeSet.choose` gives it."""
        if shapes not in self._in_shapes:
            parts = [shapes.choose(table["width"].to_numpy(), table["height"].to_numpy()) for table in self.tables]
            self._in_shapes[shapes] = np.concatenate([np.empty(0, np.int16), *parts])
        return self._in_shapes[shapes]

    def count_captions(self, which: np.ndarray) -> np.ndarray:
        """(N,) int64: how many captions of each sample are those of all that `which` (n,) of bool is true of."""
        return np.diff(np.concatenate([[0], np.cumsum(which)])[self.caption_bounds])

    def captions(self, numbers: np.ndarray) -> list[str]:
        """Of all captions, sample by sample, those with these `numbers` (k,), which are as those of their keys."""
        first = self._first_captions
        tables = np.searchsorted(first, numbers, "right") - 1
        places = zip(tables.tolist(), (numbers - first[tables]).tolist(), strict=True)
        return [self._texts[table][number].as_py() for table, number in places]

    @cached_property
    def _first_captions(self) -> np.ndarray:
        return self.caption_bounds[self._starts]

    @cached_property
    def _texts(self) -> list[Any]:
        return [_whole(table["captions"]).flatten() for table in self.tables]

    def texts(self, keys: Iterable[bytes]) -> dict[bytes, str]:
        """The captions that have these `keys`, by key, as far as there are such."""
        if not (asked := Keys.of(keys)):
            return {}
        numbers = self._by_key.find(asked)
        found = numbers >= 0
        return dict(zip(asked[found], self.captions(numbers[found]), strict=True))

    @cached_property
    def _by_key(self) -> Positions:
        return Positions(self.caption_keys)

    def where(self, chosen: np.ndarray) -> "Samples":
        """Those that `chosen` (N,) of bool is true of."""
        import pyarrow as pa

        return self if chosen.all() else self.changed(lambda table, span: table.filter(pa.array(chosen[span])))

    def at(self, numbers: np.ndarray) -> "Samples":
        """Those with these `numbers` (k,) int64, in that order, and no others in memory."""
        import pyarrow as pa

        tables = np.searchsorted(self._starts, numbers, "right") - 1
        runs = np.split(np.stack([tables, numbers]), np.flatnonzero(np.diff(tables)) + 1, axis=1)
        parts = [self.tables[int(t[0])].take(n - self._starts[t[0]]) for t, n in runs if len(n)]
        return Samples.of_table(pa.concat_tables([sample_schema().empty_table(), *parts]).combine_chunks())

    def changed(self, change: Callable[["pyarrow.Table", slice], "pyarrow.Table"]) -> "Samples":
        """The samples, each table as `change` makes it, which is told which samples it has."""
        spans = zip(self._starts[:-1].tolist(), self._starts[1:].tolist(), strict=True)
        return Samples(change(table, slice(*span)) for table, span in zip(self.each(), spans, strict=True))

    def groups(self, rows: int) -> Iterator["pyarrow.Table"]:
        """All of it in tables of `rows` samples in one piece, the last one shorter; one that is empty where none is."""
        import pyarrow as pa

        tables = list[pa.Table]()
        for table in self.each():
            while sum(map(len, tables)) + len(table) > rows:
                head = rows - sum(map(len, tables))
                yield pa.concat_tables([*tables, table.slice(0, head)]).combine_chunks()
                tables, table = [], table.slice(head)
            tables.append(table)
        yield pa.concat_tables([sample_schema().empty_table(), *tables]).combine_chunks()


def sample_ids(image_keys: Sequence[bytes]) -> list[str]:
    """One id per sample, unique: the image's key in hex, then "-2", "-3", … where the same image comes again."""
    return [_id(key, count) for key, count in zip(image_keys, counts_so_far(Keys.of(image_keys)).tolist(), strict=True)]


def _id(key: bytes, count: int) -> str:
    return key.hex() if count == 1 else f"{key.hex()}-{count}"


def counts_so_far(keys: Keys) -> np.ndarray:
    """(n,) how many of the keys up to each one are equal to it."""
    order, new = keys.in_order()
    counts = np.ones(len(keys), np.int64)
    again = np.flatnonzero(~new)
    numbers = np.arange(len(again))
    firsts = np.maximum.accumulate(np.where(np.diff(again, prepend=-1) != 1, numbers, 0))
    counts[order[again]] = numbers - firsts + 2
    return counts


def with_ids(samples: Sequence[Sample]) -> Samples:
    """The samples of a cache with their ids."""
    import pyarrow as pa

    columns = Samples.of(samples)
    counts = counts_so_far(columns.image_keys)

    def named(table: "pyarrow.Table", span: slice) -> "pyarrow.Table":
        ids = _in_hex(packed(table["image_key"]))
        if (again := np.flatnonzero(counts[span] > 1)).size:
            known, numbers = ids.to_pylist(), counts[span][again].tolist()
            for at, number in zip(again.tolist(), numbers, strict=True):
                known[at] = f"{known[at]}-{number}"
            ids = pa.array(known, pa.string())
        return table.set_column(0, "id", ids)

    return columns.changed(named)


def _in_hex(keys: np.ndarray) -> "pyarrow.StringArray":
    """Keys (n, 16) as strings of hex digits."""
    import pyarrow as pa

    content = pa.py_buffer(_DIGITS[keys].tobytes())
    bounds = np.arange(len(keys) + 1, dtype=np.int32) * (2 * KEY_BYTES)
    return pa.StringArray.from_buffers(len(keys), pa.py_buffer(bounds), content)


def _runs(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    left = iter(samples)
    while run := list(islice(left, SAMPLES_PER_TABLE)):
        yield run


def packed(column: "pyarrow.ChunkedArray | pyarrow.Array") -> np.ndarray:
    """The keys in a column, (n, 16) uint8."""
    array = _whole(column)
    content = np.frombuffer(array.buffers()[1] or b"", np.uint8)
    return content[array.offset * KEY_BYTES : (array.offset + len(array)) * KEY_BYTES].reshape(-1, KEY_BYTES)


def caption_keys_of(table: "pyarrow.Table") -> tuple[np.ndarray, np.ndarray]:
    """The keys of all captions in a table, (n, 16) uint8, and where those of each sample begin and the last end."""
    column = _whole(table["caption_keys"])
    bounds = np.asarray(column.offsets)
    return packed(column.flatten()), bounds - bounds[0]


def _whole(column: "pyarrow.ChunkedArray | pyarrow.Array") -> Any:
    if not hasattr(column, "chunks"):
        return column
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # which would be a copy
