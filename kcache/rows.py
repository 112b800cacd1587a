"""Reading rows: straight out of memory-mapped files into the caller's array, each checked as it is copied."""

import mmap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from crc32c import crc32c

from kcache.errors import CacheCorruptError
from kcache.formats import format_of
from kcache.manifest import ShardEntry
from kcache.recipe import Field

__all__ = ["Empty", "FieldFiles", "RowFile", "field_files", "gather", "unit_bytes"]

Empty = Callable[[tuple[int, ...], np.dtype[np.generic]], np.ndarray]
"""Makes an array of unspecified content from its shape and dtype, as `np.empty` does."""


class RowFile(NamedTuple):
    """A file with rows of one field: after every `piece_bytes` of payload stand `gap_bytes` that are none."""

    path: Path
    piece_bytes: int
    gap_bytes: int


class FieldFiles:
    """The files that hold one field of a table, one per shard, mapped into memory when first read."""

    def __init__(self, field: Field, dtype: np.dtype[np.generic], files: Sequence[RowFile]) -> None:
        self.field = field
        self.dtype = dtype
        self.files = files
        self._content: list[np.ndarray | None] = [None] * len(files)

    def __len__(self) -> int:
        return len(self.files)

    def content(self, shard: int) -> np.ndarray:
        """All bytes of a shard's file, (size,) uint8, read-only."""
        content = self._content[shard]
        if content is None:
            content = self._content[shard] = self._open(shard)
        return content

    def _open(self, shard: int) -> np.ndarray:
        path = self.files[shard].path
        try:
            with path.open("rb") as file:
                return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        except (OSError, ValueError) as error:
            raise CacheCorruptError(
                f"{path} cannot be read ({error}); expected a committed shard's data there"
            ) from error

    def pieces(self, shard: int, offset: int, length: int) -> list[np.ndarray]:
        """The payload of a row as the runs of bytes it is made of, gaps left out."""
        content = self.content(shard)
        _, piece_bytes, gap_bytes = self.files[shard]
        runs = []
        while length > 0:
            run = min(length, piece_bytes - offset % (piece_bytes + gap_bytes))
            runs.append(content[offset : offset + run])
            offset += run + gap_bytes
            length -= run
        return runs

    def corrupt(self, shard: int, offset: int, detail: str) -> CacheCorruptError:
        """The error for a row that is not what was committed."""
        return CacheCorruptError(
            f"{self.files[shard].path} is corrupt in the row at byte {offset}: {detail}; "
            "`kcache cache-verify CACHE --source SOURCE --repair` encodes such rows again"
        )


def field_files(cache: Path, field: Field, dtype: np.dtype[np.generic], shards: Sequence[ShardEntry]) -> FieldFiles:
    """The files that hold `field` in the shards of the cache at `cache`."""
    files = []
    for shard in shards:
        form = format_of(shard.data)
        files.append(RowFile(cache / form.field_file(shard.data, field), *form.pieces(unit_bytes(field, dtype))))
    return FieldFiles(field, dtype, files)


def unit_bytes(field: Field, dtype: np.dtype[np.generic]) -> int:
    """Bytes of one row, or of one token of a ragged field."""
    return int(np.prod(field.shape)) * dtype.itemsize


def gather(files: FieldFiles, entries: np.ndarray, empty: Empty) -> tuple[np.ndarray, np.ndarray | None]:
    """The rows that index entries point to, in an array made by `empty`; each row's checksum is verified.

    Fixed rows are (n, …), None. Ragged ones are (T, …), all tokens behind each other, and (n + 1,) int64: where
    each row starts. Raises CacheCorruptError when a row's bytes are not the committed ones.
    """
    field, dtype, locators = files.field, files.dtype, entries[files.field.name]
    if not field.ragged:
        fixed = empty((len(entries), *field.shape), dtype)
        _gather_fixed(files, entries["shard"], locators, fixed)
        return fixed, None
    _check_lengths(files, entries["shard"], locators)
    offsets = np.zeros(len(entries) + 1, np.int64)
    np.cumsum(locators["length"].astype(np.int64) // unit_bytes(field, dtype), out=offsets[1:])
    flat = empty((int(offsets[-1]), *field.shape), dtype)
    _gather_ragged(files, entries["shard"], locators, flat)
    return flat, offsets


def _check_lengths(files: FieldFiles, shards: np.ndarray, locators: np.ndarray) -> None:
    """Raise CacheCorruptError for a row longer than its file, before memory is taken for it."""
    used, of_row = np.unique(shards, return_inverse=True)
    sizes = np.array([files.content(shard).size for shard in used.tolist()], np.int64)
    too_long = np.flatnonzero(locators["length"] > sizes[of_row])
    if len(too_long):
        row, size = locators[too_long[0]], int(sizes[of_row[too_long[0]]])
        raise files.corrupt(
            int(shards[too_long[0]]), int(row["offset"]), f"it has {row['length']} bytes, the file {size}"
        )


def _gather_fixed(files: FieldFiles, shards: np.ndarray, locators: np.ndarray, out: np.ndarray) -> None:
    """Copy one row per locator into `out` (n, …), checking each: the i-th row comes from file `shards[i]`.

    Raises CacheCorruptError when a row's bytes are not the committed ones.
    """
    rows = out.reshape(len(out), -1).view(np.uint8)
    row_bytes = rows.shape[1]
    offsets = locators["offset"].tolist()
    checksums = locators["crc32c"].tolist()
    contents = {shard: files.content(shard) for shard in np.unique(shards).tolist()}
    for i, shard in enumerate(shards.tolist()):
        offset = offsets[i]
        source = contents[shard][offset : offset + row_bytes]
        if source.size != row_bytes:
            raise files.corrupt(shard, offset, f"the file ends {row_bytes - source.size} bytes before the row does")
        row = rows[i]
        row[:] = source
        if crc32c(row) != checksums[i]:
            raise files.corrupt(shard, offset, f"crc32c is {crc32c(row):08x}, expected {checksums[i]:08x}")


def _gather_ragged(files: FieldFiles, shards: np.ndarray, locators: np.ndarray, out: np.ndarray) -> None:
    """Copy rows of differing length behind each other into `out` (T, …), T being the sum of their tokens.

    Raises CacheCorruptError when a row's bytes are not the committed ones.
    """
    flat = out.reshape(-1).view(np.uint8)
    position = 0
    for shard, offset, length, checksum in zip(
        shards.tolist(),
        locators["offset"].tolist(),
        locators["length"].tolist(),
        locators["crc32c"].tolist(),
        strict=True,
    ):
        start = position
        for piece in files.pieces(shard, offset, length):
            flat[position : position + piece.size] = piece
            position += piece.size
        if position - start != length:
            raise files.corrupt(shard, offset, f"the file ends {start + length - position} bytes before the row does")
        if crc32c(flat[start:position]) != checksum:
            raise files.corrupt(shard, offset, f"crc32c is {crc32c(flat[start:position]):08x}, expected {checksum:08x}")
