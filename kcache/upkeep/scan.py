"""One file read once, from front to back: its size, its crc32c and the crc32c of every row that stands in it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kcache.foreign import check_withheld
from kcache.places import Place
from kcache.places.fetching import reading
from kcache.store.formats.checksums import crc32c

BLOCK_BYTES = 1 << 20
"""Read at a time: a block's rows are checked while it lies in the processor's cache."""


class RowSpans(NamedTuple):
    """Where the rows of one field stand in a file: (n,) int64 each, by offset, no two rows overlapping."""

    offsets: np.ndarray
    lengths: np.ndarray
    """Bytes of payload."""
    checksums: np.ndarray
    piece_bytes: int
    """After so many bytes of payload stand `gap_bytes` that are none."""
    gap_bytes: int

    @property
    def ends(self) -> np.ndarray:
        """Where each row's last piece ends, (n,) int64."""
        into_piece = self.offsets % (self.piece_bytes + self.gap_bytes)
        return self.offsets + self.lengths + (into_piece + self.lengths - 1) // self.piece_bytes * self.gap_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Scan:
    """What a file turned out to be."""

    bytes: int
    crc32c: int
    broken: tuple[np.ndarray, ...]
    """Per field: positions in its spans of the rows that are not what was committed."""
    error: str | None = None
    """Why the file could not be read to its end."""


def scan_file(path: Place, fields: Sequence[RowSpans], advance: Callable[[int], None]) -> Scan:
    """Read the file at `path` and check the rows that `fields` say are in it.

    Plain reads rather than a memory map: an unreadable sector is then an error to report, not a signal that ends the
    process. `advance` is called with the number of bytes read since the last call. Raises StoreError.
    """
    rows = _Rows(fields)
    size = checksum = 0
    error = None
    try:
        with reading(path) as file:
            buffer = memoryview(bytearray(rows.longest_block()))
            while True:
                wanted = rows.next_cut() - size
                got = _fill(file.readinto, buffer[:wanted])
                block = buffer[:got]
                checksum = crc32c(block, checksum)
                rows.check(block, size)
                size += got
                advance(got)
                if got < wanted:
                    break
    except OSError as problem:
        check_withheld(problem, path)
        error = problem.strerror or (
            "there is no such file" if isinstance(problem, FileNotFoundError) else str(problem)
        )
    return Scan(bytes=size, crc32c=checksum, broken=rows.broken_by_field(), error=error)


def _fill(read_into: Callable[[memoryview], int | None], target: memoryview) -> int:
    """Read until `target` is full or the file ends; returns the bytes read."""
    done = 0
    while done < len(target) and (got := read_into(target[done:])):
        done += got
    return done


class _Rows:
    """The rows of all fields of a file in order of offset, checked block by block; a block never cuts a row."""

    def __init__(self, fields: Sequence[RowSpans]) -> None:
        self._layouts = [(f.piece_bytes, f.piece_bytes + f.gap_bytes) for f in fields]
        numbers = [np.full(len(f.offsets), number) for number, f in enumerate(fields)]
        starts = np.concatenate([f.offsets for f in fields] or [np.empty(0, np.int64)])
        order = np.argsort(starts, kind="stable")

        def merged(parts: Sequence[np.ndarray]) -> np.ndarray:
            return np.concatenate(parts)[order] if parts else np.empty(0, np.int64)

        self._starts = starts[order]
        self._fields = merged(numbers)
        self._positions = merged([np.arange(len(f.offsets)) for f in fields])
        self._lengths = merged([f.lengths for f in fields])
        self._checksums = merged([f.checksums for f in fields])
        self._ends = merged([f.ends for f in fields])
        self._sound = np.zeros(len(order), np.bool_)
        self._first = self._last = self._cut = 0

    def longest_block(self) -> int:
        """Bytes that any block fits into."""
        return BLOCK_BYTES + int((self._ends - self._starts).max(initial=0))

    def next_cut(self) -> int:
        """Where the next block ends."""
        self._cut += BLOCK_BYTES
        self._first, self._last = self._last, int(np.searchsorted(self._starts, self._cut))
        if self._last > self._first:
            self._cut = max(self._cut, int(self._ends[self._last - 1]))
        return self._cut

    def check(self, block: memoryview, start: int) -> None:
        """Check the rows of the block that was read at `start`; it is short where the file ends."""
        here = slice(self._first, self._last)
        arrays = (self._fields, self._starts, self._lengths, self._ends, self._checksums)
        sound = []
        for field, offset, length, end, checksum in zip(*(array[here].tolist() for array in arrays), strict=True):
            piece, period = self._layouts[field]
            content = block[offset - start : end - start]
            whole = len(content) == end - offset
            sound.append(whole and _row_crc32c(content, offset, length, piece, period) == checksum)
        self._sound[here] = sound

    def broken_by_field(self) -> tuple[np.ndarray, ...]:
        """Positions of the rows that were not read, or were but are not what was committed, per field."""
        broken = ~self._sound
        return tuple(np.sort(self._positions[broken & (self._fields == i)]) for i in range(len(self._layouts)))


def _row_crc32c(content: memoryview, offset: int, length: int, piece: int, period: int) -> int:
    """crc32c of a row's payload: of every `period` bytes of the file, from its start, the first `piece`."""
    if len(content) == length:
        return int(crc32c(content))
    checksum, at = 0, 0
    while length > 0:
        run = min(length, piece - (offset + at) % period)
        checksum = crc32c(content[at : at + run], checksum)
        at += run + period - piece
        length -= run
    return int(checksum)
