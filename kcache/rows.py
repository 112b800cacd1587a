"""Reading rows: straight out of memory-mapped files into the caller's array, each checked as it is copied."""

import mmap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from crc32c import crc32c

from kcache.errors import CacheCorruptError

__all__ = ["FieldFiles", "gather_fixed", "gather_ragged"]


class FieldFiles:
    """The files that hold one field of a table, one per shard, opened when first read.

    `piece_bytes` is the number of payload bytes after which the file has a checksum of its own (`gap_bytes` long) that
    is not payload.
    """

    def __init__(self, paths: Sequence[Path], *, piece_bytes: int, gap_bytes: int) -> None:
        self.paths = paths
        self.piece_bytes = piece_bytes
        self.gap_bytes = gap_bytes
        self._content: list[np.ndarray | None] = [None] * len(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def content(self, shard: int) -> np.ndarray:
        """All bytes of a shard's file, (size,) uint8, read-only."""
        content = self._content[shard]
        if content is None:
            content = self._content[shard] = self._open(shard)
        return content

    def _open(self, shard: int) -> np.ndarray:
        path = self.paths[shard]
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
        period = self.piece_bytes + self.gap_bytes
        runs = []
        while length > 0:
            run = min(length, self.piece_bytes - offset % period)
            runs.append(content[offset : offset + run])
            offset += run + self.gap_bytes
            length -= run
        return runs

    def corrupt(self, shard: int, offset: int, detail: str) -> CacheCorruptError:
        """The error for a row that is not what was committed."""
        return CacheCorruptError(
            f"{self.paths[shard]} is corrupt in the row at byte {offset}: {detail}; "
            "remove the commit record (.json) of that shard and build again to encode its rows anew"
        )


def gather_fixed(files: FieldFiles, shards: np.ndarray, locators: np.ndarray, out: np.ndarray) -> None:
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


def gather_ragged(files: FieldFiles, shards: np.ndarray, locators: np.ndarray, out: np.ndarray) -> None:
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
