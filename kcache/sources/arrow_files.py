"""Files of rows, parquet and Arrow streams, read piece by piece.

A chunk is a parquet row group or an Arrow record batch, and how much it holds was decided by whoever wrote the file; a
piece is as much of it as is held at once.
"""

import os
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kcache.disk.memo import DigestMemo
from kcache.errors import InputRejected, StoreError
from kcache.foreign import reason
from kcache.places import Place
from kcache.places.opened import opened
from kcache.store.digests import KEY_BYTES, content_key

_PIECE_BYTES = 1 << 24
"""About what a piece of a column holds, decoded."""
_PIECE_ROWS = 1 << 16
"""Most rows of a piece: parquet writes equal values once, so that few bytes may become many."""
_HELD_BYTES = 1 << 26
"""Image bytes of recently read pieces that are kept in memory, so that nearby rows do not read them again."""
_RUN_ROWS = 10_000
"""Rows, at least, that are looked through together; whole chunks."""
NO_BYTES = bytes(KEY_BYTES)
"""Stands for the key of a row that holds no image bytes, in the memo; no content has this key."""


class RowFile(Protocol):
    """One file of rows; opening and reading raise pa.ArrowException or OSError when the file is broken."""

    path: Place
    schema: Any
    """The file's pyarrow.Schema."""
    starts: Sequence[int]
    """First row of each chunk, and the number of rows at the end."""

    def pieces(self, chunk: int, column: str) -> Iterator[Any]:
        """The rows of one chunk of one column, in order, as pyarrow arrays of a bounded size each."""


class ParquetFile:
    """A parquet file; a chunk is a row group, of which the smallest part that can be decompressed is a page."""

    def __init__(self, path: Place) -> None:
        self.path = path
        try:
            with _for_arrow(path) as file:
                self._metadata = pq.read_metadata(file)
        except UnicodeDecodeError as error:  # from the names of columns, and no error of Arrow's
            raise pa.ArrowInvalid(f"the name of a column is not UTF-8: {error}") from error
        self.schema = self._metadata.schema.to_arrow_schema()
        self.starts: Sequence[int] = _starts(
            self._metadata.row_group(k).num_rows for k in range(self._metadata.num_row_groups)
        )

    def pieces(self, chunk: int, column: str) -> Iterator[Any]:
        # Of all columns: pyarrow aborts the process when it is asked about one column of a damaged file.
        size, rows = self._metadata.row_group(chunk).total_byte_size, self.starts[chunk + 1] - self.starts[chunk]
        whole = size <= _PIECE_BYTES and rows <= _PIECE_ROWS
        most = rows if whole else min(rows * _PIECE_BYTES // max(size, 1), _PIECE_ROWS)
        # With a buffer only pages are read at a time; without one, all of the column at once, which is faster.
        buffered = {"pre_buffer": whole, "buffer_size": 0 if whole else 1 << 20}
        with _for_arrow(self.path) as it, pq.ParquetFile(it, metadata=self._metadata, **buffered) as file:
            for batch in file.iter_batches(max(most, 1), row_groups=[chunk], columns=[column], use_threads=False):
                yield batch.column(column)


def _for_arrow(path: Place) -> AbstractContextManager[Any]:
    """What Arrow is given for a file: of one in a bucket, something that reads it by ranges."""
    return nullcontext(path) if isinstance(path, Path) else opened(path)


class ArrowStream:
    """A file in Arrow's stream format, as `datasets` keeps its rows, memory-mapped; a chunk is a record batch."""

    def __init__(self, path: Path) -> None:
        self.path: Place = path
        with pa.ipc.open_stream(pa.memory_map(str(path))) as reader:
            self.schema = reader.schema
            self._batches = [batch for batch in reader if batch.num_rows]
        self.starts: Sequence[int] = _starts(batch.num_rows for batch in self._batches)

    def pieces(self, chunk: int, column: str) -> Iterator[Any]:
        cells = self._batches[chunk].column(column)
        for first in range(0, len(cells), _PIECE_ROWS):
            yield cells.slice(first, _PIECE_ROWS)


def _starts(counts: Iterable[int]) -> list[int]:
    return list(accumulate(counts, initial=0))


@dataclass(frozen=True, slots=True)
class Images:
    """Some images of one chunk: their bytes, or the paths of files that hold them."""

    contents: Any
    """pyarrow.Array of binary."""
    paths: Any
    """pyarrow.Array of binary (text not yet checked), or None where the column holds no paths."""

    def __len__(self) -> int:
        return len(self.contents)

    def content(self, row: int) -> bytes | None:
        """The bytes of the image of a row of these, or None."""
        content: bytes | None = self.contents[row].as_py()
        return content

    def path(self, row: int) -> str | None:
        """The path of the image of a row of these, or None."""
        path = None if self.paths is None else self.paths[row].as_py()
        return None if path is None else os.fsdecode(path)


@dataclass(slots=True)
class _Reading:
    """A chunk that has been read up to a row."""

    place: tuple[Place, int]
    pieces: Iterator[Any]
    row: int = 0


class HeldImages:
    """Reads the image column piece by piece and keeps the last ones; may be called from several threads."""

    def __init__(self, column: str) -> None:
        self.column = column
        self._held: OrderedDict[tuple[Place, int, int], Images] = OrderedDict()
        """By file, chunk and first row."""
        self._starts: dict[tuple[Place, int], list[int]] = {}
        """Where the pieces of a chunk begin, as far as it has been read."""
        self._reading: _Reading | None = None
        """One at most: it may hold a page, which may be as large as its chunk."""
        self._bytes = 0
        self._lock = Lock()

    def read(self, file: RowFile, chunk: int, row: int) -> tuple[Images, int]:
        """Images of which one is that of `row` of a chunk, and its number among them.

        Raises pa.ArrowException or OSError when the file is broken.
        """
        place = (file.path, chunk)
        # Reading under the lock: threads that want rows of the same piece shall not each read it.
        with self._lock:
            starts = self._starts.setdefault(place, [0])
            start = starts[bisect_right(starts, row) - 1]
            images = self._held.get((*place, start))
            if images is None or row >= start + len(images):
                start, images = self._read_on(file, chunk, row)
            self._held.move_to_end((*place, start))
            return images, row - start

    def _read_on(self, file: RowFile, chunk: int, row: int) -> tuple[int, Images]:
        place, reading = (file.path, chunk), self._reading
        self._reading = None  # what fails is not read on
        if reading is None or reading.place != place or reading.row > row:
            reading = _Reading(place, file.pieces(chunk, self.column))
        for piece in reading.pieces:
            images, start = decode_images(piece), reading.row
            reading.row += len(images)
            self._hold((*place, start), images)
            if row < reading.row:
                self._reading = reading
                return start, images
        raise pa.ArrowInvalid(f"row group {chunk} ends after {reading.row:,} rows, before its row {row:,}")

    def _hold(self, key: tuple[Place, int, int], images: Images) -> None:
        starts = self._starts[key[:2]]
        if key[2] > starts[-1]:
            starts.append(key[2])
        before = self._held.pop(key, None)
        self._bytes += images.contents.nbytes - (before.contents.nbytes if before else 0)
        self._held[key] = images
        # Two at least: threads at the border of two pieces shall not read both again and again.
        while len(self._held) > 2 and self._bytes > _HELD_BYTES:
            self._bytes -= self._held.popitem(last=False)[1].contents.nbytes


def chunk_keys(file: RowFile, label: str, chunk: int, column: str, memo: DigestMemo, rehash: bool) -> bytes:
    """The keys of the images of a chunk behind each other, `NO_BYTES` for a row without any, as `memo` knows them.

    Raises InputRejected when the file, called `label`, is broken, OSError when it is gone, StoreError.
    """

    def digested() -> bytes:
        with readable_as(label):
            pieces = map(decode_images, file.pieces(chunk, column))
            contents = (images.content(row) for images in pieces for row in range(len(images)))
            return b"".join(NO_BYTES if content is None else content_key(content) for content in contents)

    return memo.digest(file.path, _keys_part(chunk, column), digested, rehash)


@contextmanager
def readable_as(label: str) -> Iterator[None]:
    """Raise InputRejected in the block where the file that is called so is broken."""
    try:
        yield
    except StoreError:  # which says nothing of the rows
        raise
    except (pa.ArrowException, OSError) as error:
        raise InputRejected("source", f"{label} cannot be read: {reason(error)}") from error


def _keys_part(chunk: int, column: str) -> str:
    return f"content_key of each row of column {column!a}, chunk {chunk}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsPiece:
    """The chunks `first` to `last` of a file, to be looked through; a `Piece`."""

    reader: Callable[[Any], RowFile]
    path: Place
    column: str
    first: int
    last: int

    @property
    def name(self) -> str:
        return f"{self.path}, row groups {self.first} to {self.last}"

    def is_known(self, memo: DigestMemo) -> bool:
        chunks = range(self.first, self.last + 1)
        return all(memo.remembered(self.path, _keys_part(chunk, self.column)) for chunk in chunks)

    def look(self, memo: DigestMemo) -> None:
        with readable_as(str(self.path)):
            file = self.reader(self.path)
        for chunk in range(self.first, self.last + 1):
            chunk_keys(file, str(self.path), chunk, self.column, memo, rehash=False)


def pieces_of(reader: Callable[[Any], RowFile], file: RowFile, column: str, rows: int) -> Iterator[RowsPiece]:
    """The first `rows` of a file, in pieces."""
    first, chunks = 0, bisect_left(file.starts, rows)
    for last in range(chunks):
        if file.starts[last + 1] - file.starts[first] >= _RUN_ROWS or last == chunks - 1:
            yield RowsPiece(reader=reader, path=file.path.absolute(), column=column, first=first, last=last)
            first = last + 1


def decode_images(column: Any) -> Images:
    """The cells of an image column; raises pa.ArrowInvalid when their offsets lead out of the data."""
    column.validate()
    paths = None
    if pa.types.is_struct(column.type):
        names = [field.name for field in column.type]
        if "path" in names:
            paths = pc.struct_field(column, "path").cast(pa.large_binary())
            paths.validate(full=True)
        column = pc.struct_field(column, "bytes") if "bytes" in names else pa.nulls(len(column), pa.binary())
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    contents = column.cast(pa.binary()) if pa.types.is_null(column.type) else column
    contents.validate(full=True)
    return Images(contents, paths)


def decode_captions(column: Any) -> list[str | list[str | None] | None]:
    """The cells of a caption column; bytes that are not UTF-8 become lone surrogates, so only their cells suffer.

    Raises pa.ArrowInvalid when their offsets lead out of the data.
    """
    column.validate()
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    several = _item_type(column.type) is not None
    cells = column.cast(pa.large_list(pa.large_binary()) if several else pa.large_binary())
    cells.validate(full=True)
    if several:
        return [None if cell is None else [_text(item) for item in cell] for cell in cells.to_pylist()]
    return [_text(cell) for cell in cells.to_pylist()]


def _text(cell: bytes | None) -> str | None:
    return None if cell is None else cell.decode("utf-8", "surrogateescape")


def is_image_type(kind: Any) -> bool:
    """Whether a pyarrow type may hold images: the bytes, or `datasets`' struct of bytes and path, or one of the two."""
    if not pa.types.is_struct(kind):
        return _is_binary(kind.value_type if pa.types.is_dictionary(kind) else kind)
    types = {field.name: field.type for field in kind}
    bytes_fit = _is_binary(types["bytes"]) or pa.types.is_null(types["bytes"]) if "bytes" in types else True
    return bytes_fit and (_is_text(types["path"]) if "path" in types else "bytes" in types)


def is_caption_type(kind: Any) -> bool:
    """Whether a pyarrow type may hold captions: strings, also in pandas' categorical form, or lists of strings.

    Type null, which a writer infers where there are no values, holds none, whatever the column is elsewhere.
    """
    # Binary, too: it is how parquet keeps text of writers that do not say that it is text.
    kind = kind.value_type if pa.types.is_dictionary(kind) else _item_type(kind) or kind
    return _is_text(kind) or _is_binary(kind)


def _item_type(kind: Any) -> Any:
    """The type of a list's items; None of no list."""
    types = pa.types
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    return kind.value_type if any(is_one(kind) for is_one in lists) else None


def _is_text(kind: Any) -> bool:
    types = pa.types
    return any(is_one(kind) for is_one in (types.is_string, types.is_large_string, types.is_string_view, types.is_null))


def _is_binary(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))
