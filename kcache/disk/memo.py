"""A memo of what files hold, which spares reading unchanged ones again, and the folder that keeps it."""

import logging
import os
import sqlite3
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from kcache.foreign import reason
from kcache.places import Place
from kcache.places.bucket import BucketPath

logger = logging.getLogger(__name__)

_RACY_NS = 2_000_000_000
"""A file changed less than this before it was digested may change again under an equal timestamp (coarse clocks)."""
_PENDING_LIMIT = 20_000
"""Entries kept in memory before they are written; a killed build digests at most so many again."""

_LOCK_SECONDS = 10
"""How long another process may hold the memo before this one goes on without it."""


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
