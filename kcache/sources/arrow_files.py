"""Files of rows, parquet and Arrow streams, read in chunks: a parquet row group or an Arrow record batch."""

import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

_HELD_BYTES = 1 << 30
"""Image bytes of recently read chunks that are kept in memory, so that nearby rows do not read them again."""


class RowFile(Protocol):
    """One file of rows; opening and reading raise pa.ArrowException or OSError when the file is broken."""

    path: Path
    schema: Any
    """The file's pyarrow.Schema."""
    starts: Sequence[int]
    """First row of each chunk, and the number of rows at the end."""

    def read_chunk(self, chunk: int, column: str) -> Any:
        """The rows of one chunk of one column, as a pyarrow.ChunkedArray."""


class ParquetFile:
    """A parquet file; a chunk is a row group, which parquet can only decompress as a whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metadata = pq.read_metadata(path)
        self.schema = self._metadata.schema.to_arrow_schema()
        self.starts: Sequence[int] = _starts(
            self._metadata.row_group(k).num_rows for k in range(self._metadata.num_row_groups)
        )

    def read_chunk(self, chunk: int, column: str) -> Any:
        with pq.ParquetFile(self.path, metadata=self._metadata) as file:
            return file.read_row_group(chunk, columns=[column]).column(column)


class ArrowStream:
    """A file in Arrow's stream format, as `datasets` keeps its rows, memory-mapped; a chunk is a record batch."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with pa.ipc.open_stream(pa.memory_map(str(path))) as reader:
            self.schema = reader.schema
            self._batches = [batch for batch in reader if batch.num_rows]
        self.starts: Sequence[int] = _starts(batch.num_rows for batch in self._batches)

    def read_chunk(self, chunk: int, column: str) -> Any:
        return pa.chunked_array([self._batches[chunk].column(column)])


def _starts(counts: Iterable[int]) -> list[int]:
    return list(accumulate(counts, initial=0))


@dataclass(frozen=True, slots=True)
class Images:
    """The images of one chunk: their bytes, or the paths of files that hold them."""

    contents: Any
    """pyarrow.ChunkedArray of binary."""
    paths: Any
    """pyarrow.ChunkedArray of binary (text not yet checked), or None where the column holds no paths."""

    def __len__(self) -> int:
        return len(self.contents)

    def content(self, row: int) -> bytes | None:
        """The bytes of the image of a row of the chunk, or None."""
        content: bytes | None = self.contents[row].as_py()
        return content

    def path(self, row: int) -> str | None:
        """The path of the image of a row of the chunk, or None."""
        path = None if self.paths is None else self.paths[row].as_py()
        return None if path is None else os.fsdecode(path)


class HeldImages:
    """Reads the image column by chunks and keeps the last ones; may be called from several threads."""

    def __init__(self, column: str) -> None:
        self.column = column
        self._held: OrderedDict[tuple[Path, int], Images] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def read(self, file: RowFile, chunk: int) -> Images:
        """The images of one chunk; raises pa.ArrowException or OSError when the file is broken."""
        # Reading under the lock: threads that want rows of the same chunk shall not each read it.
        with self._lock:
            images = self._held.pop((file.path, chunk), None)
            if images is None:
                images = decode_images(file.read_chunk(chunk, self.column))
                self._bytes += images.contents.nbytes
            self._held[file.path, chunk] = images
            # Two at least: threads at the border of two chunks shall not read both again and again.
            while len(self._held) > 2 and self._bytes > _HELD_BYTES:
                self._bytes -= self._held.popitem(last=False)[1].contents.nbytes
            return images


def decode_images(column: Any) -> Images:
    """The cells of an image column; raises pa.ArrowInvalid when their offsets lead out of the data."""
    column.validate()
    if not pa.types.is_struct(column.type):
        column.validate(full=True)
        return Images(column, None)
    contents = pc.struct_field(column, "bytes")
    contents.validate(full=True)
    if column.type.get_field_index("path") < 0:
        return Images(contents, None)
    paths = pc.struct_field(column, "path").cast(pa.large_binary())
    paths.validate(full=True)
    return Images(contents, paths)


def decode_captions(column: Any) -> list[str | list[str | None] | None]:
    """The cells of a caption column; bytes that are not UTF-8 become lone surrogates, so only their cells suffer.

    Raises pa.ArrowInvalid when their offsets lead out of the data.
    """
    column.validate()
    several = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    cells = column.cast(pa.large_list(pa.large_binary()) if several else pa.large_binary())
    cells.validate(full=True)
    if several:
        return [None if cell is None else [_text(item) for item in cell] for cell in cells.to_pylist()]
    return [_text(cell) for cell in cells.to_pylist()]


def _text(cell: bytes | None) -> str | None:
    return None if cell is None else cell.decode("utf-8", "surrogateescape")


def is_image_type(kind: Any) -> bool:
    """Whether a pyarrow type holds images: `datasets`' struct of bytes and path, or the bytes alone."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)
    return _is_binary(kind)


def is_caption_type(kind: Any) -> bool:
    """Whether a pyarrow type holds captions: strings, also in pandas' categorical form, or lists of strings."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_binary(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))
