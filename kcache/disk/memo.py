"""A memo of what files hold, which spares reading unchanged ones again, and the folder that keeps it."""

import logging
import os
import sqlite3
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from kcache.errors import CacheWriteError, StoreError
from kcache.foreign import reason
from kcache.places import Place
from kcache.places.bucket import BucketPath
from kcache.places.fetching import at_once
from kcache.urls import store_url

logger = logging.getLogger(__name__)

_RACY_NS = 2_000_000_000
"""A file changed less than this before it was digested may change again under an equal timestamp (coarse clocks)."""
_PENDING_LIMIT = 20_000
"""Entries kept in memory before they are written; a killed build digests at most so many again."""
_PENDING_BYTES = 64 << 20
"""What these may take."""
_SMALL_BYTES = 64
"""Of a digest: larger ones, of all that a file holds, are read from the memo's file when they are asked for."""

_LOCK_SECONDS = 10
"""How long another process may hold the memo before this one goes on without it."""

Entry = tuple[bytes, bytes, bytes, bytes]
"""Of something digested: the folder, the file's name with what was digested of it, the file's stamp, the digest."""


class DigestMemo:
    """A file that remembers digests of other files for as long as those stay unchanged.

    A digest is trusted while device, inode, size, mtime and ctime of its file are what they were, as git's index does;
    in a bucket, while size and ETag are.
    The memo only saves time: when its file cannot be read or written, digests are computed, and one warning is logged.
    Use it from one thread at a time, and as a context manager or with `flush()`, which writes what was learnt.
    """

    def __init__(self, path: Path | None = None, *, kept: bool = True) -> None:
        """Open the memo at `path`; by default $KCACHE_HOME/digests.sqlite, else kcache/ in the user's cache folder.

        One that is not `kept` knows nothing, has no file, and holds what it is asked for another one to `learn`.
        """
        self.path = path
        self._kept = kept
        self._folders: dict[str, dict[str, tuple[bytes, bytes | None]]] = {}
        """By folder and entry: the stamp, and the digest unless it is only in the file."""
        self._pending: list[Entry] = []
        self._pending_bytes = 0
        self._learnt = set[tuple[str, str]]()
        """Which entries others have computed for this memo: not to be computed again, whatever is asked."""
        self._stamps: dict[BucketPath, bytes] = {}
        self._connection: sqlite3.Connection | None = None
        if not kept:
            return
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
        folder, name, stamp, settled = self._examined(path)
        entry = f"{name}\0{part}"
        if not rehash or (folder, entry) in self._learnt:
            known_stamp, known = self._entries(folder).get(entry, (b"", None))
            if known_stamp == stamp and (known := known or self._stored(folder, entry, stamp)) is not None:
                return known
        digest = compute()
        if settled:
            self._note(folder, entry, stamp, digest)
        return digest

    def remembered(self, path: str | Place, part: str) -> bool:
        """Whether `digest` knows that part of a file, and computes nothing; raises StoreError."""
        try:
            folder, name, stamp, _ = self._examined(path)
        except StoreError:
            raise
        except OSError:
            return False
        return self._entries(folder).get(f"{name}\0{part}", (b"", b""))[0] == stamp

    def learn(self, entries: Iterable["Entry"]) -> None:
        """Take over what was digested for this memo elsewhere: of files that are here what they were there.

        These are not digested again, also where a rehash is asked for. What is of another file is left out.
        """
        for folder, entry, stamp, digest in entries:
            place, (name, _, _) = os.fsdecode(folder), os.fsdecode(entry).partition("\0")
            path = f"{place}/{name}" if store_url(place) is None else BucketPath.of(place) / name
            try:
                here = self._examined(path)[2]
            except StoreError:
                raise
            except OSError:
                continue
            # Each machine has numbers of its own for file systems, which come first.
            if here == stamp or (isinstance(path, str) and here[8:] == stamp[8:]):
                self._learnt.add((place, os.fsdecode(entry)))
                self._note(place, os.fsdecode(entry), here, digest)

    def ask(self, paths: Sequence[BucketPath]) -> None:
        """Examine files in a bucket, as far as they are there, many at a time: each is a request. Raises StoreError."""

        def examine(path: BucketPath) -> None:
            with suppress(FileNotFoundError):
                self._far_stamp(path)

        at_once(examine, paths)

    def _examined(self, path: str | Place) -> tuple[str, str, bytes, bool]:
        """Folder, name and stamp of a file, and whether a change of it from now on would show; raises OSError."""
        if isinstance(path, BucketPath):
            return str(path.parent), path.name, self._far_stamp(path), True
        text = os.fspath(path)
        folder, name = os.path.split(text if text.startswith("/") else Path(path).absolute())
        status = os.stat(text)  # noqa: PTH116  # a Path takes as long as the call itself
        stamp = struct.pack(
            "<QQQqq", status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        )
        return folder, name, stamp, max(status.st_mtime_ns, status.st_ctime_ns) < time.time_ns() - _RACY_NS

    def _note(self, folder: str, entry: str, stamp: bytes, digest: bytes) -> None:
        held = len(digest) <= _SMALL_BYTES or self._connection is None
        self._entries(folder)[entry] = (stamp, digest if held else None)
        self._pending.append((os.fsencode(folder), os.fsencode(entry), stamp, digest))
        self._pending_bytes += len(digest)
        if len(self._pending) >= _PENDING_LIMIT or self._pending_bytes >= _PENDING_BYTES:
            self.flush()

    def _stored(self, folder: str, entry: str, stamp: bytes) -> bytes | None:
        """A digest that is in the memo's file, or on its way there; None where it cannot be had."""
        self.flush()
        if self._connection is None:
            return None
        query = "SELECT digest FROM digests WHERE folder = ? AND name = ? AND stamp = ?"
        try:
            row = self._connection.execute(query, (os.fsencode(folder), os.fsencode(entry), stamp)).fetchone()
        except Exception as error:  # noqa: BLE001
            self._give_up(error)
            return None
        return None if row is None else bytes(row[0])

    def _far_stamp(self, path: BucketPath) -> bytes:
        # Asked for once: each time is a request. What changes meanwhile has another stamp the next time.
        if path not in self._stamps:
            self._stamps[path] = path.stamp().encode()
        return self._stamps[path]

    def taken(self) -> list[Entry]:
        """What one that is not kept has digested so far."""
        return list(self._pending)

    def flush(self) -> None:
        """Write what was learnt since the last flush."""
        if not self._kept:
            return
        if self._connection is not None and self._pending:
            try:
                with self._connection:
                    self._connection.executemany("INSERT OR REPLACE INTO digests VALUES (?, ?, ?, ?)", self._pending)
            except Exception as error:  # noqa: BLE001
                self._give_up(error)
        self._pending.clear()
        self._pending_bytes = 0

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

    def _entries(self, folder: str) -> dict[str, tuple[bytes, bytes | None]]:
        # One query per folder, not per file: sources walk folder by folder.
        if folder not in self._folders:
            self._folders[folder] = {}
            if self._connection is not None:
                query = (
                    "SELECT name, stamp, CASE WHEN length(digest) <= ? THEN digest END FROM digests WHERE folder = ?"
                )
                try:
                    rows = self._connection.execute(query, (_SMALL_BYTES, os.fsencode(folder)))
                    self._folders[folder] = {os.fsdecode(name): (stamp, digest) for name, stamp, digest in rows}
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
    """Where kcache keeps what it can do without: $KCACHE_HOME, else kcache/ in the user's cache folder.

    Raises CacheWriteError for an account that has no home.
    """
    if home := os.environ.get("KCACHE_HOME"):
        return Path(home)
    caches = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(caches) if caches else Path.home() / ".cache") / "kcache"
    except RuntimeError as error:
        raise CacheWriteError(
            "this account has no home, and nothing says where kcache is to keep what saves it time; expected a folder "
            "that can be written; set KCACHE_HOME to one"
        ) from error


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
