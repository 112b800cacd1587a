"""Records of buckets that were fetched, kept on this machine: what is listed as it was need not be fetched again.

A file of a bucket is the same as long as its name, size, tag and time of writing are: what is written anew has another
time. Every content is kept with its checksum. All of this only saves requests: where it cannot be, they are made.
"""

import json
import logging
import sqlite3
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from kcache.disk.filesystems import free_bytes
from kcache.disk.memo import own_folder
from kcache.errors import CacheWriteError
from kcache.foreign import reason
from kcache.places import Place
from kcache.places.bucket import BucketPath
from kcache.places.effects import read_all

logger = logging.getLogger(__name__)

_TOGETHER = 64
_MOST_BYTES = 32 << 30
"""What is kept at most, over a few records: three tables of a hundred million rows have 11 GB of them."""
_LEFT_BYTES = 1 << 30
"""What stays free where it is kept: that must not take the room that an index, or anyone else, cannot do without."""
_DAY = 86_400
_KNOWN = """
SELECT path, stamp, CAST(used AS INTEGER), sum, CAST(content AS BLOB)
FROM records WHERE path IN (SELECT value FROM json_each(?))"""
_USED = """
SELECT page_size * (page_count - freelist_count)
FROM pragma_page_size(), pragma_page_count(), pragma_freelist_count()"""
_FORGET = """
DELETE FROM records WHERE path IN (
    SELECT path FROM (SELECT path, sum(size) OVER (ORDER BY used DESC, path) AS together FROM records)
    WHERE together > ?
)"""
_LOCK_SECONDS = 10
"""How long another process may hold what is kept before this one goes on without it."""
_unused: set[Path | None] = set()
"""Files of which it was said that they cannot be used."""


def read_listed(folder: Place, names: Sequence[str]) -> Iterator[bytes]:
    """The content of files right in `folder`, in the order of `names`; raises as `read_all` does."""
    if not names or not isinstance(folder, BucketPath):
        yield from read_all([folder / name for name in names])
        return
    paths = [folder / name for name in names]
    stamps = _stamps(folder)
    with closing(_Kept()) as kept:
        for first in range(0, len(paths), _TOGETHER):
            some = paths[first : first + _TOGETHER]
            known = kept.known({path: stamps[path.name] for path in some if path.name in stamps})
            lacking = [path for path in some if path not in known]
            found = dict(zip(lacking, read_all(lacking), strict=True))
            kept.add({path: (stamps[path.name], content) for path, content in found.items() if path.name in stamps})
            yield from (known[path] if path in known else found[path] for path in some)


def _stamps(folder: BucketPath) -> dict[str, str]:
    """Of the files right in a folder, by name, what is another text once one is written anew."""
    return {
        entry["path"].rpartition("/")[2]: f"{entry['size']} {entry['e_tag']} {entry['last_modified'].isoformat()}"
        for entry in folder.listing()["objects"]
        if entry["e_tag"]
    }


class _Kept:
    """The file that keeps what was fetched; one that cannot be used keeps nothing, which is said once."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._now = int(time.time())
        self._connection: sqlite3.Connection | None = None
        try:
            self._path = own_folder() / "records.sqlite"
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self._path, timeout=_LOCK_SECONDS)
            with self._connection:
                self._connection.execute(
                    "CREATE TABLE IF NOT EXISTS records "
                    "(path TEXT PRIMARY KEY, stamp TEXT, used INTEGER, size INTEGER, sum INTEGER, content BLOB)"
                )
        except (CacheWriteError, OSError, sqlite3.Error) as error:
            self._give_up(error)

    def known(self, stamps: Mapping[BucketPath, str]) -> dict[BucketPath, bytes]:
        """What is kept of the files that have these stamps still."""
        asked = {str(path): path for path in stamps}
        rows = self._do(_KNOWN, [json.dumps(list(asked))])
        found, old = dict[BucketPath, bytes](), list[tuple[int, str]]()
        for url, stamp, used, checksum, content in rows:
            if stamp == stamps[asked[url]] and zlib.crc32(content) == checksum:
                found[asked[url]] = content
                old += [(self._now, url)] if used < self._now - _DAY else []
        self._do_all("UPDATE records SET used = ? WHERE path = ?", old)
        return found

    def add(self, contents: Mapping[BucketPath, tuple[str, bytes]]) -> None:
        """Keep the contents of files that had these stamps, where there is room."""
        free = None if self._connection is None or self._path is None else free_bytes(self._path.parent)
        if free is not None and free < _LEFT_BYTES:
            self._give_up(OSError(f"{free:,} bytes are free there, and {_LEFT_BYTES:,} are left to others"))
        rows = [
            (str(path), stamp, self._now, len(content), zlib.crc32(content), content)
            for path, (stamp, content) in contents.items()
        ]
        self._do_all("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?, ?, ?)", rows)

    def close(self) -> None:
        """Let go of the file; where it holds too much, what was not used for longest goes first."""
        [[used]] = self._do(_USED) or [[0]]
        if used > _MOST_BYTES:
            self._do_all(_FORGET, [(_MOST_BYTES // 2,)])
        self._let_go()

    def _do(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        try:
            return [] if self._connection is None else self._connection.execute(query, values).fetchall()
        except sqlite3.Error as error:
            self._give_up(error)
            return []

    def _do_all(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
        if self._connection is not None and rows:
            try:
                with self._connection:
                    self._connection.executemany(statement, rows)
            except sqlite3.Error as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if self._path not in _unused:  # a long build looks at records again and again
            _unused.add(self._path)
            logger.warning(
                "what was fetched of records cannot be kept in %s (%s); they are fetched again each time, which is "
                "slower but right; free or delete that file, or set KCACHE_HOME to a folder that can be written",
                self._path or "a file",
                reason(error),
            )
        self._let_go()

    def _let_go(self) -> None:
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None
