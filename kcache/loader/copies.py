"""Shards of a cache copied whole into a folder of this machine: once, for all runs and processes that read from there.

A copy has the name that the file has in the cache, which carries a digest of its content: it is never of another one,
and nothing has to be compared, or removed in time. Files appear when all of them is there, verified, so that whoever
is killed loses the files that were under way. One process copies at a time; the others wait, and then have everything.
"""

import fcntl
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from contextlib import contextmanager
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kcache.disk.durable import new_file, publish, remove_temporary, temporary_path, writing
from kcache.disk.filesystems import free_bytes, lock
from kcache.errors import CacheCorruptError, CacheWriteError, StoreError
from kcache.foreign import corrupt, system_number
from kcache.places.fetching import FETCHES, at_once, reading
from kcache.places.place import Place
from kcache.stopping import Crew
from kcache.store.cache import Cache
from kcache.store.formats import format_of
from kcache.store.formats.checksums import crc32c
from kcache.store.formats.chosen import Chosen
from kcache.store.manifest import DATA_NAME, ShardEntry
from kcache.store.shaped.joined import Joined
from kcache.store.shards import Commit, read_commit

logger = logging.getLogger(__name__)

_AT_ONCE = 16
"""Files that are copied at a time: with some 85 MB/s each, more than most networks carry."""
_BLOCK_BYTES = 8 << 20
_SAID_SECONDS = 10.0
"""Between two words on how far it is."""
_POLL_SECONDS = 0.2
_TOGETHER = 1 << 20
"""Entries of an index that are looked at together."""


class Wanted(NamedTuple):
    """A file of a cache that a copy is wanted of."""

    name: str
    """Relative to the cache, and to the folder with the copies."""
    bytes: int
    crc32c: int


def copied(cache: Cache, fields: Sequence[str], folder: Path, most_bytes: int | None = None) -> Cache | None:
    """The cache with the rows of `fields` taken from copies of its shards in `folder`, which are made where they lack.

    None, and it is said why, where they have more than `most_bytes`, where the folder has no room for them, or where
    shards are not named by their content. Raises CacheCorruptError for a file that is not what was committed,
    StoreError, and CacheWriteError where the folder cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        why_not = _copied_all(cache.path, wanted_files(cache, fields), folder, most_bytes)
    except LookupError as error:
        why_not = str(error)
    except CacheWriteError as error:
        if system_number(error) not in (ENOSPC, EDQUOT):
            raise
        why_not = f"there was no room any more: {error}"
    if why_not is not None:
        logger.warning("the rows of %s are not taken from copies in %s: %s", cache.path, folder, why_not)
        return None
    return cache.with_rows_in(folder)


def _copied_all(source: Place, wanted: Sequence[Wanted], folder: Path, most_bytes: int | None) -> str | None:
    """Make the copies that lack; or say why they cannot all be there."""
    size = sum(file.bytes for file in wanted)
    if most_bytes is not None and size > most_bytes:
        return f"they have {size:,} bytes, and --stage-bytes is {most_bytes:,}"
    with _alone(folder):
        remove_temporary(folder)
        lacking = [file for file in wanted if not _is_there(folder / file.name, file.bytes)]
        needed, free = sum(file.bytes for file in lacking), free_bytes(folder)
        if free is not None and needed > free:
            return f"{needed:,} bytes of them are not there yet, and {free:,} bytes are free"
        _copy_all(source, folder, lacking)
    return None


def wanted_files(cache: Cache, fields: Sequence[str]) -> list[Wanted]:
    """The files that hold the rows of `fields` of the samples, each once, by name; raises LookupError.

    That is for shards that are not named by their content, or of which there is no record.
    """
    used = [(part, name, _shards_used(part, name)) for part in cache.by_shape(*fields) for name in fields]
    commits: dict[str, Commit] = {}

    def read(shard: ShardEntry) -> None:
        commits[shard.data] = _commit_of(cache.path, shard)

    at_once(read, list({shard.data: shard for _, _, shards in used for shard in shards}.values()))
    wanted: dict[str, Wanted] = {}
    for part, name, shards in used:
        for shard in shards:
            path = format_of(shard.data).field_file(shard.data, part.field(name))
            inner = path.partition("/")[2]
            found = next((file for file in commits[shard.data].files if file.path == inner), None)
            if found is None:
                raise LookupError(f"the record of {shard.data} does not tell of {inner}")
            wanted[path] = Wanted(path, found.bytes, found.crc32c)
    return [wanted[path] for path in sorted(wanted)]


def _shards_used(cache: Cache, field: str) -> list[ShardEntry]:
    entries, shards, used = cache.entries(field), cache.manifest.tables[cache.table_of(field)].shards, set[int]()
    parts = entries.parts if isinstance(entries, Joined) else (entries,)
    if not any(isinstance(part, Chosen) for part in parts):
        return list(shards)
    for first in range(0, len(entries), _TOGETHER):
        used.update(np.unique(entries[first : first + _TOGETHER]["shard"]).tolist())
    return [shards[number] for number in sorted(used)]


def _commit_of(cache: Place, shard: ShardEntry) -> Commit:
    """The record of a shard; raises LookupError where it is not the record of that content."""
    folder, _, data = shard.data.partition("/")
    named = DATA_NAME.fullmatch(data)
    if named is None or named[2] is None:
        raise LookupError(f"{shard.data} is of an older cache, whose shards are not named by their content")
    commit = read_commit(cache / folder / f"{named[1]}.json")
    if commit.data != data:
        raise LookupError(f"{shard.data} is not what its record tells of any more")
    return commit


def _is_there(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except (FileNotFoundError, NotADirectoryError):
        return False


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """In the block, no other process of this machine copies into `folder`; the hold ends with the process, too."""
    with writing(folder / ".copying"):
        descriptor = os.open(folder / ".copying", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        said = False
        while True:
            try:
                lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, folder)
                break
            except BlockingIOError:
                if not said:
                    logger.warning("another process copies into %s; this one waits for it", folder)
                said = True
                time.sleep(_POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)


def _copy_all(source: Place, folder: Path, files: Sequence[Wanted]) -> None:
    total, done, ended = sum(file.bytes for file in files), _Count(), threading.Event()
    if not files:
        return
    begun = said = time.monotonic()
    crew = Crew(min(_AT_ONCE, len(files)), "kcache-copy")
    try:
        copying = {crew.submit(_copy, source / file.name, folder, file, done, ended) for file in files}
        while copying:
            finished, copying = wait(copying, _POLL_SECONDS, FIRST_EXCEPTION)
            for each in finished:
                each.result()
            if (now := time.monotonic()) - said >= _SAID_SECONDS or not copying:
                said, rate = now, max(done.bytes, 1) / max(now - begun, 1e-9)
                left = f", {(total - done.bytes) / rate:,.0f} s left" if copying else ""
                told = "copied to %s: %.3g of %.3g GB, %.3g MB/s%s"
                logger.warning(told, folder, done.bytes / 1e9, total / 1e9, rate / 1e6, left)
    finally:
        ended.set()
        crew.close()


class _Count:
    """Bytes that were copied, by several threads."""

    def __init__(self) -> None:
        self.bytes = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self.bytes += count


def _copy(source: Place, folder: Path, file: Wanted, done: _Count, ended: threading.Event) -> None:
    """Copy one file, verified; what is not as it was committed may have changed on its way, and is fetched again."""
    final, temporary = folder / file.name, temporary_path(folder)
    with writing(final):
        final.parent.mkdir(parents=True, exist_ok=True)
    try:
        for again in reversed(range(FETCHES)):
            with writing(final, file.bytes):
                size, checksum = _written(source, temporary, done, ended)
            if (size, checksum) == (file.bytes, file.crc32c):
                publish(temporary, final, file.bytes)
                return
            temporary.unlink()
            done.add(-size)
            if not again:
                raise CacheCorruptError(
                    f"{source} differs from what was committed: found {size:,} bytes with crc32c {checksum:08x}, "
                    f"expected {file.bytes:,} with {file.crc32c:08x}; `kcache cache-verify CACHE --source SOURCE "
                    "--repair` encodes its rows again"
                )
    finally:
        temporary.unlink(missing_ok=True)


def _written(source: Place, temporary: Path, done: _Count, ended: threading.Event) -> tuple[int, int]:
    """Bytes and crc32c of what came of `source`, which is in the new file `temporary` now."""
    block, size, checksum = memoryview(bytearray(_BLOCK_BYTES)), 0, 0
    with new_file(temporary) as file:
        try:
            with reading(source) as content:
                while read := content.readinto(block):
                    if ended.is_set():
                        raise StoreError(f"{source} was being copied when that was ended")
                    file.write(block[:read])
                    size, checksum = size + read, crc32c(block[:read], checksum)
                    done.add(read)
        except FileNotFoundError as error:
            raise corrupt(error, source, "build the cache again with its source to encode it anew") from error
    return size, checksum
