"""Which ranges of a cache's files hold the rows of a run of samples, and in which order they are to be asked for."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kcache.errors import CacheCorruptError, KcacheError, StoreError
from kcache.foreign import corrupt
from kcache.loader.streaming.streamed import StreamShape
from kcache.places.bucket import BucketPath
from kcache.places.client import is_silence
from kcache.places.place import Place
from kcache.store.cache import Cache
from kcache.store.digests import mirrored_key
from kcache.store.recipe import kind_of
from kcache.store.rows import unit_bytes

GAP_BYTES = 64 << 10
"""Between two rows of a block, at most so many bytes that nobody wants are read along: they take less time than one
more request, and are fewer than the latents of a picture. Headers in tars and captions not drawn are such bytes."""

_ALONE, _FETCHED = 0.01, 1.05
"""Rows asked for alone, as a share of all, and bytes read for each that is wanted, from which on it is said."""
ENOUGH_ROWS = 1000
"""That a cache has, and that were wanted, before it is said: what fewer come to is chance, and costs nobody much."""
_RUNS, _RUN_ROWS = 16, 1024
"""Rows that are looked at to know how long they are at most."""
_COUNTS = ("position", "block", "offset", "extent", "length")
_NUMBERS = ("use", "field", "file")
ROW = np.dtype([*((name, "<i4") for name in _NUMBERS), *((name, "<i8") for name in _COUNTS), ("crc32c", "<u4")])
"""A row that one sample of a run wants: the number of the sample in the run, the numbers of field and file, the row's
position in its table, the block it is read with, and where it stands: bytes from `offset` to `offset` + `extent`,
`length` of which are the row's."""


class Fetch(NamedTuple):
    """A range to be asked for, and the rows (n,) of ROW in it."""

    file: int
    start: int
    length: int
    rows: np.ndarray


@dataclass
class Tally:
    """What was asked for, added up over runs of samples."""

    rows: int = 0
    """Rows wanted, one that several samples want counted for each."""
    alone: int = 0
    """Of those, the ones that took a request for themselves, though their block has others."""
    wanted: int = 0
    """Bytes of the rows, each row counted once in a run of samples, and of those that dropout leaves unused among
    them: these are read along, and no cache would spare them."""
    fetched: int = 0
    """Bytes of the ranges."""

    def remark(self) -> str | None:
        """What is to be said where rows lie apart that are read together; None where they do not, or are few yet."""
        if self.rows < ENOUGH_ROWS:
            return None
        if self.alone <= _ALONE * self.rows and self.fetched <= _FETCHED * self.wanted:
            return None
        return (
            f"{self.alone / self.rows:.1%} of the rows take a request for themselves, and "
            f"{self.fetched / self.wanted:.2f} bytes are read for each that is wanted: rows of neighbouring samples "
            "lie apart, or others between them, as with several captions a picture, captions or pictures that several "
            "samples share, and selections; a cache built at once of these samples alone is read in whole blocks"
        )


class Layout:
    """Where the rows of some fields of a cache stand, with a number for each file."""

    def __init__(self, cache: Cache, fields: Sequence[str], shape: StreamShape) -> None:
        self._cache = cache
        self.fields = list(fields)
        self._shape = shape
        self.paths: list[Place] = []
        numbers: dict[Place, int] = {}
        self._files: list[np.ndarray] = []
        """Per field the number of each shard's file: that of a tar is the same for all fields."""
        self.pieces: list[dict[int, tuple[int, int]]] = []
        """Per field and number of a file: the bytes after which a gap comes, and its bytes, see `FieldFile`."""
        self._pieces: list[np.ndarray] = []
        for name in fields:
            files = cache.field_files(name).files
            for each in files:
                if each.path not in numbers:
                    numbers[each.path] = len(self.paths)
                    self.paths.append(each.path)
            self._files.append(np.array([numbers[each.path] for each in files], np.int64))
            pieces = [(each.piece_bytes, each.gap_bytes) for each in files]
            self.pieces.append({numbers[each.path]: piece for each, piece in zip(files, pieces, strict=True)})
            self._pieces.append(np.array(pieces, np.int64))
        self.units = [unit_bytes(cache.field(name), cache.dtype(name)) for name in fields]
        """Bytes of a row, or of a token of a ragged field."""

    def rows(self, samples: np.ndarray, positions: "dict[str, np.ndarray]") -> np.ndarray:
        """The rows that `samples` (n,) want, at `positions` of their tables: (n × fields,) of ROW, field by field."""
        rows = np.empty(len(samples) * len(self.fields), ROW)
        for number, name in enumerate(self.fields):
            table = self._cache.table_of(name)
            part = rows[number * len(samples) : (number + 1) * len(samples)]
            entries = self._cache.entries(name)[positions[name]]
            located, shards = entries[name], entries["shard"].astype(np.int64)
            part["use"], part["field"], part["position"] = np.arange(len(samples)), number, positions[name]
            part["file"] = self._files[number][shards]
            for key in ("offset", "length", "crc32c"):
                part[key] = located[key]
            pieces = self._pieces[number][shards]
            part["extent"] = _extents(part["offset"], part["length"], pieces[:, 0], pieces[:, 1])
            # The row for no input is wanted by samples of any block: it is read once for all of them.
            caption = kind_of(table).per == "caption"
            in_use = int(self._cache.caption_bounds[-1]) if caption else len(self._cache)
            reserved = (positions[name] == in_use) & (kind_of(table).reserved is not None)
            part["block"] = np.where(reserved, -1, samples // self._shape.block_rows)
        return rows

    def payload(self, found: np.ndarray, fetch: Fetch, row: np.void) -> np.ndarray:
        """The bytes of a row in what was `found` of its range, gaps left out."""
        offset, length = int(row["offset"]), int(row["length"])
        start = offset - fetch.start
        if row["extent"] == length:
            return found[start : start + length]
        piece, gap = self.pieces[int(row["field"])][int(row["file"])]
        runs = []
        while length > 0:
            run = min(length, piece - offset % (piece + gap))
            runs.append(found[offset - fetch.start : offset - fetch.start + run])
            offset, length = offset + run + gap, length - run
        return np.concatenate(runs)

    def mean_bytes(self, name: str) -> float:
        """Bytes of a row of a field, on average of the table."""
        return self._cache.resident_bytes([name]) / self._cache.table_length(name)

    def most_bytes(self, name: str) -> int:
        """Bytes of the longest row of some runs of neighbours that are spread over the table."""
        entries = self._cache.entries(name)
        # Runs: the index is read in parts.
        starts = range(0, len(entries), max(_RUN_ROWS, len(entries) // _RUNS))
        return max(int(entries[start : start + _RUN_ROWS][name]["length"].max()) for start in starts)

    def corrupt(self, fetch: Fetch, row: np.void, detail: str) -> CacheCorruptError:
        """The error for a row that is not what was committed."""
        name = self.fields[int(row["field"])]
        return CacheCorruptError(
            f"{self.paths[fetch.file]} is corrupt in the row of {name} at byte {row['offset']}, key "
            f"{self._key(name, int(row['position']))}: {detail}; `kcache cache-verify CACHE --source SOURCE --repair` "
            "encodes such rows again"
        )

    def _key(self, name: str, position: int) -> str:
        """The key (hex) of the row at `position` of a field's table; "unknown" where the samples cannot be read."""
        kind, bounds = kind_of(self._cache.table_of(name)), self._cache.caption_bounds
        per_caption = kind.per == "caption"
        if kind.reserved is not None and position == (bounds[-1] if per_caption else len(self._cache)):
            return kind.reserved.hex()
        try:
            if not per_caption:
                sample = position % len(self._cache.index[self._cache.table_of(name)])
                key = self._cache.told(sample, "image_key")
                return str((key if sample == position else mirrored_key(key)).hex())
            sample = int(np.searchsorted(bounds, position, side="right")) - 1
            return str(self._cache.told(sample, "caption_keys")[position - int(bounds[sample])].hex())
        except KcacheError:
            return "unknown"

    def explained(self, error: BaseException, fetch: Fetch) -> BaseException:
        """What to raise for an error of asking for a range: a file that is gone or cut is corruption."""
        path = self.paths[fetch.file]
        if isinstance(error, StoreError) and isinstance(path, BucketPath) and not is_silence(error):
            with suppress(OSError):  # what the store said first is what is told
                if (size := path.size()) < fetch.start + fetch.length:
                    missing = f"the file ends {fetch.start + fetch.length - size:,} bytes before its rows do"
                    return self.corrupt(fetch, fetch.rows[-1], missing)
        if isinstance(error, OSError) and not isinstance(error, KcacheError):
            return corrupt(error, path, "build the cache again with its source to encode it anew")
        return error


def _extents(offsets: np.ndarray, lengths: np.ndarray, pieces: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """Bytes from a row's first to its last: its own, and the gaps among them; see `FieldFile`."""
    inside = offsets % (pieces + gaps)
    return lengths + np.maximum(inside + lengths - 1, 0) // pieces * gaps


def plan_fetches(rows: np.ndarray, most_bytes: int, tally: Tally) -> list[Fetch]:
    """The ranges that hold `rows` (n,) of ROW, in order of first use; a range is of one block and of one file.

    It has about `most_bytes` at most, or is one row. What it comes to is added to `tally`.
    """
    rows = rows[np.lexsort((rows["offset"], rows["file"], rows["block"]))]
    ends = rows["offset"] + rows["extent"]
    begins = np.ones(len(rows), np.bool_)
    begins[1:] = (
        (rows["block"][1:] != rows["block"][:-1])
        | (rows["file"][1:] != rows["file"][:-1])
        | (rows["offset"][1:] > ends[:-1] + GAP_BYTES)
    )
    starts = rows["offset"][np.flatnonzero(begins)][np.cumsum(begins) - 1]
    begins[1:] |= ((ends - starts - 1) // most_bytes)[1:] > ((ends - starts - 1) // most_bytes)[:-1]
    firsts = np.flatnonzero(begins)
    lasts = np.append(firsts[1:], len(rows)) - 1
    lengths = ends[lasts] - rows["offset"][firsts]
    _count(rows, firsts, lengths, tally)
    order = np.argsort(np.minimum.reduceat(rows["use"], firsts), kind="stable")
    return [
        Fetch(int(rows["file"][first]), int(rows["offset"][first]), length, rows[first : last + 1])
        for first, last, length in zip(
            firsts[order].tolist(), lasts[order].tolist(), lengths[order].tolist(), strict=True
        )
    ]


def _count(rows: np.ndarray, firsts: np.ndarray, lengths: np.ndarray, tally: Tally) -> None:
    same = (rows["file"][1:] == rows["file"][:-1]) & (rows["offset"][1:] == rows["offset"][:-1])
    same &= rows["block"][1:] == rows["block"][:-1]
    alone = np.diff(np.append(firsts, len(rows))) == 1
    of_block = rows["block"] * 256 + rows["field"]
    _, group, counts = np.unique(of_block, return_inverse=True, return_counts=True)
    tally.rows += len(rows)
    tally.alone += int((counts[group][firsts[alone]] > 1).sum())
    tally.wanted += int(rows["length"].sum() - rows["length"][1:][same].sum() + _unused_bytes(rows))
    tally.fetched += int(lengths.sum())


def _unused_bytes(rows: np.ndarray) -> float:
    """Bytes of the rows in whose place samples take the one for no input, about."""
    reserved, total = rows["block"] < 0, 0.0
    for field in np.unique(rows["field"][reserved]):
        mine = rows["field"] == field
        if (own := mine & ~reserved).any():
            total += float((mine & reserved).sum() * rows["length"][own].mean())
    return total
