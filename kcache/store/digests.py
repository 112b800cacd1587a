"""Names for content: the keys of images and captions, many of them in arrays, and a memo that spares reading files."""

import hashlib
import logging
import os
import sqlite3
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

import numpy as np

from kcache.foreign import reason
from kcache.places import Place
from kcache.places.bucket import BucketPath

logger = logging.getLogger(__name__)

KEY_BYTES = 16
_UNPACKED = 4096
"""Keys that are taken out of an array at a time, where they are wanted one by one."""
_SORTED_FROM = 100_000
"""Keys from which on they are sorted before they are looked for."""

_RACY_NS = 2_000_000_000
"""A file changed less than this before it was digested may change again under an equal timestamp (coarse clocks)."""
_PENDING_LIMIT = 20_000
"""Entries kept in memory before they are written; a killed build digests at most so many again."""

_LOCK_SECONDS = 10
"""How long another process may hold the memo before this one goes on without it."""


def content_key(content: bytes) -> bytes:
    """The key of an input (16 bytes): the first half of the sha256 of its bytes, e.g. of an undecoded image file."""
    return hashlib.sha256(content).digest()[:KEY_BYTES]


def caption_key(caption: str) -> bytes:
    """The key of a caption (16 bytes): `content_key` of its UTF-8; raises UnicodeEncodeError on lone surrogates."""
    return content_key(caption.encode())


def pack_keys(keys: Iterable[bytes]) -> np.ndarray:
    """Keys as they stand in files: (n, 16) uint8."""
    return Keys.of(keys).packed


class Keys(Sequence[bytes]):
    """Keys in one array, with no Python object for each: a hundred million take 1.6 GB."""

    def __init__(self, packed: np.ndarray) -> None:
        """`packed` as `pack_keys` gives it."""
        self.packed = np.ascontiguousarray(packed)

    @classmethod
    def of(cls, keys: Iterable[bytes]) -> "Keys":
        """The keys as they are, or packed."""
        return keys if isinstance(keys, Keys) else cls(np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES))

    def __len__(self) -> int:
        return len(self.packed)

    @overload
    def __getitem__(self, at: int) -> bytes: ...
    @overload
    def __getitem__(self, at: slice | np.ndarray) -> "Keys": ...
    def __getitem__(self, at: Any) -> "bytes | Keys":
        found = self.packed[at]
        return found.tobytes() if found.ndim == 1 else Keys(found)

    def __iter__(self) -> Iterator[bytes]:
        for first in range(0, len(self), _UNPACKED):
            yield from unpack_keys(self.packed[first : first + _UNPACKED])

    def __add__(self, other: "Keys") -> "Keys":
        return Keys(np.concatenate([self.packed, other.packed]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Keys) and np.array_equal(self.packed, other.packed)

    __hash__ = None  # type: ignore[assignment]  # they are as long as they are

    @cached_property
    def high(self) -> np.ndarray:
        """(n,) uint64: the first half of each key, in whose order the keys are but for the few that share it."""
        return self.packed.view(">u8")[:, 0].astype(np.uint64)

    @property
    def low(self) -> np.ndarray:
        """(n,) of big-endian uint64: the second half of each key."""
        return self.packed.view(">u8")[:, 1]

    def in_order(self) -> tuple[np.ndarray, np.ndarray]:
        """The order of the keys by their bytes, equal ones as they stand, and which are new in it: (n,) int64, bool."""
        order = np.argsort(self.high, kind="stable")
        high = self.high[order]
        new = np.ones(len(self), np.bool_)
        np.not_equal(high[1:], high[:-1], out=new[1:])
        if not new.all():
            low = self.low[order]
            if (low[1:] < low[:-1])[~new[1:]].any():
                order = np.lexsort((self.low, self.high))
                low = self.low[order]
            new[1:] |= low[1:] != low[:-1]
        return order, new

    def unique(self) -> "Keys":
        """Each key once, in order of first use."""
        order, new = self.in_order()
        if new.all():
            return self
        first = np.zeros(len(self), np.bool_)
        first[order[new]] = True
        return self[first]

    def find(self, keys: "Keys") -> np.ndarray:
        """Where `keys` stand among these, which are sorted and unique: (n,) int64, -1 for what is not among them."""
        if not len(self) or not len(keys):
            return np.full(len(keys), -1)
        if len(keys) < _SORTED_FROM:
            at = np.searchsorted(self.high, keys.high)
        else:  # in order, so that each look-up is near the one before: a fifth of the time for a hundred million
            order = np.argsort(keys.high)
            at = np.empty(len(keys), np.int64)
            at[order] = np.searchsorted(self.high, keys.high[order])
        while True:
            here = np.minimum(at, len(self) - 1)
            near = self.high[here] == keys.high
            found = near & (self.low[here] == keys.low)
            if not (further := near & ~found & (at < len(self))).any():
                return np.where(found, here, -1)
            at[further] += 1

    def among(self, known: Iterable[bytes]) -> np.ndarray:
        """(n,) bool: which of these keys are among `known`, in whatever order those are."""
        others = Keys.of(known)
        if not len(others) or not len(self):
            return np.zeros(len(self), np.bool_)
        order, new = others.in_order()
        if not new.all() or (order[1:] < order[:-1]).any():
            others = others[order[new]]
        return others.find(self) >= 0


class Positions:
    """A number for each key, of equal ones that of the last: sorted when it is first asked for."""

    def __init__(self, keys: Keys, numbers: np.ndarray | None = None) -> None:
        """`numbers` (n,) int64 of the `keys`; None for where they stand."""
        self._given = keys, numbers

    def find(self, keys: Iterable[bytes]) -> np.ndarray:
        """The number of each of `keys`: (n,) int64, -1 for what has none."""
        known, numbers = self._sorted
        return numbers[known.find(Keys.of(keys))]

    @cached_property
    def _sorted(self) -> tuple[Keys, np.ndarray]:
        keys, numbers = self._given
        order, new = keys.in_order()
        last = order[np.append(new[1:], True)[: len(new)]]
        # Behind the numbers that of what is not found, which is looked for at -1.
        return keys[last], np.append(last if numbers is None else numbers[last], -1)


def unpack_keys(packed: np.ndarray) -> list[bytes]:
    """The keys that `pack_keys` packed; raises ValueError for what is no array of keys."""
    if packed.dtype != np.uint8 or packed.shape[1:] != (KEY_BYTES,):
        raise ValueError(f"it holds {packed.shape} of {packed.dtype}; expected keys, (n, {KEY_BYTES}) of uint8")
    content = packed.tobytes()
    return [content[i : i + KEY_BYTES] for i in range(0, len(content), KEY_BYTES)]


EMPTY_CAPTION_KEY = caption_key("")
"""Key of the reserved row of `text`: the caption "", which guidance drops to."""
ZERO_IMAGE_KEY = content_key(b"kcache: all-zero pixels")
"""Key of the reserved row of `image_embeds`: the all-zero pixel tensor, which no image file gives."""


class DigestMemo:
    """A file that remembers digests of other files for as long as those stay unchanged.

    A digest is trusted while device, inode, size, mtime and ctime of its file are what they were, as git's index does;
    in a bucket, while size and ETag are.
    The memo only saves time: when its file cannot be read or written, digests are computed, and one warning is logged.
    Use it from one thread at a time, and as a context manager or with `flush()`, which writes what was learnt.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Open the memo at `path`; by default $KCACHE_HOME/digests.sqlite, else kcache/ in the user's cache folder."""
        self.path = path
        self._folders: dict[str, dict[str, tuple[bytes, bytes]]] = {}
        self._pending: list[tuple[bytes, bytes, bytes, bytes]] = []
        self._stamps: dict[BucketPath, bytes] = {}
        self._connection: sqlite3.Connection | None = None
        try:
            self.path = own_folder() / "digests.sqlite" if path is None else path
            self._connection = _connect(self.path)
        except Exception as error:  # noqa: BLE001  # whatever it is, it costs speed only
            self._give_up(error)

    def digest(self, path: str | Place, part: str, compute: Callable[[], bytes], rehash: bool = False) -> bytes:
        """The digest of one part of a file: remembered if the file is unchanged, else `compute()`.

        `part` names what is digested and how; equal names must mean equal `compute`. With `rehash`, what is remembered
        is ignored and replaced. Raises OSError when the file cannot be examined, and whatever `compute` raises.
        """
        if isinstance(path, BucketPath):
            return self._far_digest(path, part, compute, rehash)
        text = os.fspath(path)
        folder, name = os.path.split(text if text.startswith("/") else Path(path).absolute())
        status = os.stat(text)  # noqa: PTH116  # a Path takes as long as the call itself
        now = time.time_ns()
        stamp = struct.pack(
            "<QQQqq", status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        )
        entries = self._entries(folder)
        entry_name = f"{name}\0{part}"
        known_stamp, known = entries.get(entry_name, (b"", b""))
        if known_stamp == stamp and not rehash:
            return known
        digest = compute()
        if max(status.st_mtime_ns, status.st_ctime_ns) < now - _RACY_NS:
            entries[entry_name] = (stamp, digest)
            self._pending.append((os.fsencode(folder), os.fsencode(entry_name), stamp, digest))
            if len(self._pending) >= _PENDING_LIMIT:
                self.flush()
        return digest

    def remembered(self, path: BucketPath, part: str) -> bool:
        """Whether `digest` knows the part of a file in a bucket, and computes nothing."""
        return self._entries(str(path.parent)).get(f"{path.name}\0{part}", (b"", b""))[0] == self._far_stamp(path)

    def _far_digest(self, path: BucketPath, part: str, compute: Callable[[], bytes], rehash: bool) -> bytes:
        folder, entry_name, stamp = str(path.parent), f"{path.name}\0{part}", self._far_stamp(path)
        entries = self._entries(folder)
        known_stamp, known = entries.get(entry_name, (b"", b""))
        if known_stamp == stamp and not rehash:
            return known
        digest = compute()
        entries[entry_name] = (stamp, digest)
        self._pending.append((os.fsencode(folder), os.fsencode(entry_name), stamp, digest))
        return digest

    def _far_stamp(self, path: BucketPath) -> bytes:
        # Asked for once: each time is a request. What changes meanwhile has another stamp the next time.
        if path not in self._stamps:
            self._stamps[path] = path.stamp().encode()
        return self._stamps[path]

    def flush(self) -> None:
        """Write what was learnt since the last flush."""
        if self._connection is not None and self._pending:
            try:
                with self._connection:
                    self._connection.executemany("INSERT OR REPLACE INTO digests VALUES (?, ?, ?, ?)", self._pending)
            except Exception as error:  # noqa: BLE001
                self._give_up(error)
        self._pending.clear()

    def close(self) -> None:
        """Flush, and let go of the file."""
        self.flush()
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _entries(self, folder: str) -> dict[str, tuple[bytes, bytes]]:
        # One query per folder, not per file: sources walk folder by folder.
        if folder not in self._folders:
            self._folders[folder] = {}
            if self._connection is not None:
                query = "SELECT name, stamp, digest FROM digests WHERE folder = ?"
                try:
                    rows = self._connection.execute(query, (os.fsencode(folder),)).fetchall()
                    self._folders[folder] = {os.fsdecode(name): (stamp, bytes(digest)) for name, stamp, digest in rows}
                except Exception as error:  # noqa: BLE001
                    self._give_up(error)
        return self._folders[folder]

    def _give_up(self, error: Exception) -> None:
        logger.warning(
            "the digest memo %s cannot be used (%s); files are digested without it, which is slower but right; "
            "free or delete that file, or set KCACHE_HOME to a folder that can be written",
            self.path,
            reason(error),
        )
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None


def own_folder() -> Path:
    """Where kcache keeps what it can do without: $KCACHE_HOME, else kcache/ in the user's cache folder."""
    if home := os.environ.get("KCACHE_HOME"):
        return Path(home)
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "kcache"


def _connect(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, timeout=_LOCK_SECONDS, check_same_thread=False)
    try:
        # A blob each, because names need not be UTF-8 and inode numbers need not fit sqlite's signed integers.
        connection.execute(
            "CREATE TABLE IF NOT EXISTS digests (folder BLOB, name BLOB, stamp BLOB, digest BLOB, "
            "PRIMARY KEY (folder, name)) WITHOUT ROWID"
        )
        connection.commit()
    except sqlite3.Error:
        connection.close()
        raise
    return connection
