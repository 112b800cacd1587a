"""Reading rows: straight out of memory-mapped files into the caller's array, each checked as it is copied.

Rows in a bucket are fetched as ranges, each checked as it arrives.
"""

import mmap
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from kcache.disk.filesystems import mapped
from kcache.errors import CacheCorruptError
from kcache.foreign import corrupt
from kcache.places import Place
from kcache.places.bucket import BucketPath
from kcache.places.fetching import FETCHES, at_once, near
from kcache.store.formats import format_of
from kcache.store.formats.checksums import crc32c, joined_crc32c
from kcache.store.manifest import ShardEntry
from kcache.store.recipe import Field

Empty = Callable[[tuple[int, ...], np.dtype[np.generic]], np.ndarray]
"""Makes an array of unspecified content from its shape and dtype, as `np.empty` does."""

_TOGETHER = 64
"""Rows whose checksums are looked at together."""
_LONG_BYTES = 4 << 20
"""Longer than any row of a text: of a file in a bucket with such a row it is asked how long it is."""

_DO = "`kcache cache-verify CACHE --source SOURCE --repair` encodes such rows again"


class FieldFile(NamedTuple):
    """A file with rows of one field: after every `piece_bytes` of payload stand `gap_bytes` that are none."""

    path: Place
    piece_bytes: int
    gap_bytes: int


class FieldFiles:
    """The files that hold one field of a table, one per shard, mapped into memory when first read.

    Those of a bucket are `far`: they are never mapped, only what is wanted of them is fetched.
    """

    def __init__(
        self, field: Field, dtype: np.dtype[np.generic], files: Sequence[FieldFile], advice: str = _DO
    ) -> None:
        """`advice` says what to do about a row that is not what was committed."""
        self.field = field
        self._advice = advice
        self.dtype = dtype
        self.files = files
        self.far = bool(files) and isinstance(files[0].path, BucketPath)
        self._maps: dict[int, tuple[mmap.mmap, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self.files)

    def size(self, shard: int) -> int:
        """Bytes of a shard's file."""
        path = self.files[shard].path
        if not isinstance(path, BucketPath):
            return self.content(shard).size
        try:
            return path.size()
        except FileNotFoundError as error:
            raise corrupt(error, path, _DO) from error

    def content(self, shard: int) -> np.ndarray:
        """All bytes of a shard's file, (size,) uint8, read-only."""
        return self._mapped(shard)[1]

    def _mapped(self, shard: int) -> tuple[mmap.mmap, np.ndarray]:
        opened = self._maps.get(shard)
        if opened is None:
            opened = self._maps[shard] = self._open(shard)
        return opened

    def _open(self, shard: int) -> tuple[mmap.mmap, np.ndarray]:
        path = self.files[shard].path
        if isinstance(path, BucketPath):
            raise ValueError(f"{path} is in a bucket; expected a file of this machine, which alone can be mapped")
        try:
            content = mapped(path)
            return content, np.frombuffer(content, np.uint8)
        except (OSError, ValueError) as error:
            raise corrupt(error, path, self._advice) from error

    def will_need(self, entries: np.ndarray) -> None:
        """Have the rows that index entries point to read from the disk, all at once, without waiting for them.

        Without this each page that is not in memory is waited for alone, and much around it read in vain: 0.04 GB/s
        where the disk gives 0.6 to 0.9 GB/s in sequence, and 0.7 to 0.9 with it, in random batches of 64 rows of 74 kB.
        """
        if self.far or not hasattr(mmap, "MADV_WILLNEED"):
            return
        locators = entries[self.field.name]
        # The system wants offsets in whole pages. `gather` reports rows beyond the end of a file.
        starts = locators["offset"] // mmap.PAGESIZE * mmap.PAGESIZE
        lengths = locators["offset"] - starts + locators["length"]
        for shard, start, length in zip(entries["shard"].tolist(), starts.tolist(), lengths.tolist(), strict=True):
            opened, content = self._mapped(shard)
            if start < content.size:
                opened.madvise(mmap.MADV_WILLNEED, start, length)

    def pieces(self, shard: int, offset: int, length: int) -> list[np.ndarray]:
        """The payload of a row as the runs of bytes it is made of, gaps left out."""
        return self.pieces_in(self.content(shard), 0, shard, offset, length)

    def pieces_in(self, content: np.ndarray, start: int, shard: int, offset: int, length: int) -> list[np.ndarray]:
        """`pieces`, where `content` is what stands in the file from byte `start` on."""
        _, piece_bytes, gap_bytes = self.files[shard]
        runs = []
        while length > 0:
            run = min(length, piece_bytes - offset % (piece_bytes + gap_bytes))
            runs.append(content[offset - start : offset - start + run])
            offset += run + gap_bytes
            length -= run
        return runs

    def ends(self, shards: np.ndarray, locators: np.ndarray) -> np.ndarray:
        """Where in their files rows end, (n,) int64."""
        used, of_row = np.unique(shards, return_inverse=True)
        layouts = [self.files[shard] for shard in used.tolist()]
        piece, gap = (np.array([layout[i] for layout in layouts], np.int64)[of_row] for i in (1, 2))
        offsets, lengths = _offsets(locators), locators["length"].astype(np.int64)
        return offsets + lengths + (offsets % (piece + gap) + np.maximum(lengths, 1) - 1) // piece * gap

    def corrupt(self, shard: int, offset: int, detail: str) -> CacheCorruptError:
        """The error for a row that is not what was committed."""
        return CacheCorruptError(
            f"{self.files[shard].path} is corrupt in the row at byte {offset}: {detail}; {self._advice}"
        )


def field_files(
    cache: Place,
    field: Field,
    dtype: np.dtype[np.generic],
    shards: Sequence[ShardEntry],
    copies: Place | None = None,
) -> FieldFiles:
    """The files that hold `field` in the shards of the cache at `cache`, or their copies in a folder."""
    cache, files = copies or cache, []
    for shard in shards:
        form = format_of(shard.data)
        files.append(FieldFile(cache / form.field_file(shard.data, field), *form.pieces(unit_bytes(field, dtype))))
    advice = _DO if copies is None else "it is a copy: remove it, and start again, upon which it is copied anew"
    return FieldFiles(field, dtype, files, advice)


def unit_bytes(field: Field, dtype: np.dtype[np.generic]) -> int:
    """Bytes of one row, or of one token of a ragged field."""
    return int(np.prod(field.shape)) * dtype.itemsize


def gather(files: FieldFiles, entries: np.ndarray, empty: Empty) -> tuple[np.ndarray, np.ndarray | None]:
    """The rows that index entries point to, in an array made by `empty`; each row's checksum is verified.

    Fixed rows are (n, …), None. Ragged ones are (T, …), all tokens behind each other, and (n + 1,) int64: where
    each row starts. Raises CacheCorruptError when a row's bytes are not the committed ones.
    """
    field, unit = files.field, unit_bytes(files.field, files.dtype)
    shards, locators = entries["shard"], entries[field.name]
    if field.ragged:
        _check_lengths(files, shards, locators)
    bounds = np.zeros(len(entries) + 1, np.int64)
    np.cumsum(locators["length"] if field.ragged else np.full(len(entries), unit), out=bounds[1:])
    out = empty((int(bounds[-1]) // unit if field.ragged else len(entries), *field.shape), files.dtype)
    flat = out.reshape(-1).view(np.uint8)
    if files.far:
        _fetch(files, shards, locators, bounds, flat)
        return out, bounds // unit if field.ragged else None
    for first in range(0, len(entries), _TOGETHER):
        rows = slice(first, first + _TOGETHER)
        ends = bounds[first : first + _TOGETHER + 1]
        if field.ragged:
            _copy(files, shards[rows], locators["offset"][rows], ends, flat)
            _verify(files, shards[rows], locators[rows], ends, flat)
        else:
            _copy_verified(files, shards[rows], locators[rows], ends, flat)
    return out, bounds // unit if field.ragged else None


def _check_lengths(files: FieldFiles, shards: np.ndarray, locators: np.ndarray) -> None:
    """Raise CacheCorruptError for a row longer than its file, before memory is taken for it."""
    if files.far and locators["length"].max(initial=0) <= _LONG_BYTES:
        return
    used, of_row = np.unique(shards, return_inverse=True)
    sizes = np.array([files.size(shard) for shard in used.tolist()], np.int64)
    too_long = np.flatnonzero(locators["length"] > sizes[of_row])
    if len(too_long):
        row, size = locators[too_long[0]], int(sizes[of_row[too_long[0]]])
        raise files.corrupt(
            int(shards[too_long[0]]), int(row["offset"]), f"it has {row['length']} bytes, the file {size}"
        )


def _copy(files: FieldFiles, shards: np.ndarray, offsets: np.ndarray, bounds: np.ndarray, flat: np.ndarray) -> None:
    """Copy ragged rows, the i-th from file shards[i] at offsets[i], to the bytes bounds[i] to bounds[i + 1] of `flat`.

    Raises CacheCorruptError when a file ends before a row does.
    """
    places = list(zip(shards.tolist(), offsets.tolist(), np.diff(bounds).tolist(), strict=True))
    pieces = [piece for place in places for piece in files.pieces(*place)]
    if sum(map(len, pieces)) != bounds[-1] - bounds[0]:
        _raise_cut(files, places)
    # One call for all rows: after an assignment per row, two filling threads would wait for each other's release of
    # Python's lock. Measured with two threads on two cores: 0.70 of np.take's speed per row, 0.96 in one call.
    np.concatenate(pieces, out=flat[bounds[0] : bounds[-1]])


def _copy_verified(
    files: FieldFiles, shards: np.ndarray, locators: np.ndarray, bounds: np.ndarray, flat: np.ndarray
) -> None:
    """`_copy` and `_verify` for rows of one length, in one long call each: between calls, threads wait for each other.

    The checksum of all rows together is compared; only when it is another are they verified one by one.
    """
    start, length = int(bounds[0]), int(bounds[1] - bounds[0])
    contents = {shard: files.content(shard) for shard in set(shards.tolist())}
    places = list(zip(shards.tolist(), locators["offset"].tolist(), strict=True))
    pieces = [contents[shard][offset : offset + length] for shard, offset in places]
    if sum(map(len, pieces)) != bounds[-1] - bounds[0]:
        _raise_cut(files, [(shard, offset, length) for shard, offset in places])
    copied = np.concatenate(pieces, out=flat[start : int(bounds[-1])])
    if crc32c(copied) != joined_crc32c(locators["crc32c"], length):
        _verify(files, shards, locators, bounds, flat)  # tells which row it is


def _raise_cut(files: FieldFiles, places: Sequence[tuple[int, int, int]]) -> None:
    for shard, offset, length in places:
        missing = length - sum(map(len, files.pieces(shard, offset, length)))
        if missing:
            raise files.corrupt(shard, offset, f"the file ends {missing} bytes before the row does")


def _verify(files: FieldFiles, shards: np.ndarray, locators: np.ndarray, bounds: np.ndarray, flat: np.ndarray) -> None:
    """Raise CacheCorruptError when one of the copied rows is not what was committed."""
    ends = bounds.tolist()
    for i, expected in enumerate(locators["crc32c"].tolist()):
        found = crc32c(flat[ends[i] : ends[i + 1]])
        if found != expected:
            detail = f"crc32c is {found:08x}, expected {expected:08x}"
            raise files.corrupt(int(shards[i]), int(locators["offset"][i]), detail)


def _offsets(locators: np.ndarray) -> np.ndarray:
    """Where rows start, (n,) int64, and for what cannot be a place in a file one that none reaches."""
    return np.minimum(locators["offset"], 1 << 60).astype(np.int64)


def _fetch(files: FieldFiles, shards: np.ndarray, locators: np.ndarray, bounds: np.ndarray, flat: np.ndarray) -> None:
    """Fetch rows from a bucket, the i-th to the bytes bounds[i] to bounds[i + 1] of `flat`, and verify each of them.

    What arrives otherwise than it was committed is fetched again, as it may have changed on its way; then it is what
    lies there, and CacheCorruptError is raised.
    """
    ends = files.ends(shards, locators)

    def fetch(rows: np.ndarray) -> None:
        for again in reversed(range(FETCHES)):
            try:
                return _fetch_range(files, shards[rows], locators[rows], ends[rows], bounds[:-1][rows], flat)
            except CacheCorruptError:
                if not again:
                    raise
        return None

    at_once(fetch, near(shards, _offsets(locators), ends))


def _fetch_range(
    files: FieldFiles, shards: np.ndarray, locators: np.ndarray, ends: np.ndarray, targets: np.ndarray, flat: np.ndarray
) -> None:
    """`_fetch` for rows of one file, by offset, in one request; the i-th goes to `flat` from byte targets[i] on."""
    shard, offsets = int(shards[0]), _offsets(locators).tolist()
    path, start, end = files.files[shard].path, offsets[0], int(ends.max())
    try:
        content = np.frombuffer(path.read_range(start, end - start), np.uint8)  # type: ignore[union-attr]
    except FileNotFoundError as error:
        raise corrupt(error, path, _DO) from error
    lengths, sums = locators["length"].tolist(), locators["crc32c"].tolist()
    for offset, length, expected, target in zip(offsets, lengths, sums, targets.tolist(), strict=True):
        pieces = files.pieces_in(content, start, shard, offset, length)
        if lacks := length - sum(map(len, pieces)):
            raise files.corrupt(shard, offset, f"the file ends {lacks} bytes before the row does")
        found = crc32c(np.concatenate(pieces or [content[:0]], out=flat[target : target + length]))
        if found != expected:
            raise files.corrupt(shard, offset, f"crc32c is {found:08x}, expected {expected:08x}")


def token_numbers(bounds: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens the ragged rows at `positions` (n,) consist of, row i being the tokens bounds[i] to bounds[i + 1].

    Returns (T,) and (n + 1,), int64: the tokens' numbers, and where each of the n rows starts among them.
    """
    lengths = bounds[positions + 1] - bounds[positions]
    offsets = np.zeros(len(positions) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return np.repeat(bounds[positions] - offsets[:-1], lengths) + np.arange(offsets[-1]), offsets


def take(
    resident: tuple[np.ndarray, np.ndarray | None], positions: np.ndarray, empty: Empty
) -> tuple[np.ndarray, np.ndarray | None]:
    """Rows out of memory, `positions` having been checked: `mode="clip"` then spares numpy a copy of its own."""
    rows, bounds = resident
    numbers, offsets = (positions, None) if bounds is None else token_numbers(bounds, positions)
    out = empty((len(numbers), *rows.shape[1:]), rows.dtype)
    return np.take(rows, numbers, axis=0, out=out, mode="clip"), offsets
