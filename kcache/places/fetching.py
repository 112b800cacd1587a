"""Reading much of a bucket at once: spans that lie near together as one request, and many requests in flight.

Of a disk the same functions read what they are asked for, as it lies there.
"""

import hashlib
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import BinaryIO, Protocol, TypeVar

import numpy as np

from kcache.disk.scratch import unnamed_file, writing_there
from kcache.places.bucket import BucketPath
from kcache.places.opened import opened
from kcache.places.place import Place
from kcache.stopping import Crew

AT_ONCE = 16
"""Requests that wait for a store at a time: with some 85 MB/s each, more than most networks carry."""
FETCHES = 3
"""How often what arrives from a store otherwise than it was written is fetched."""
_NEAR_BYTES = 128 << 10
"""Bytes that nobody asked for and that are fetched all the same: a request of its own takes as long."""
_MOST_BYTES = 8 << 20
"""Bytes after which another request begins."""

_WINDOW_BYTES = 4 << 20
_WINDOWS = 16

_Item = TypeVar("_Item")


def near(files: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    """Which of the spans starts[i] to ends[i] of files[i] to fetch together: their numbers, (k,) int64 per request.

    The spans of one request are of one file, by start, with little between them.
    """
    if not len(files):
        return []
    order = np.lexsort((starts, files))
    files, starts, ends = files[order], starts[order], ends[order]
    far = np.ones(len(order), np.bool_)
    far[1:] = (files[1:] != files[:-1]) | (starts[1:] - ends[:-1] > _NEAR_BYTES)
    run = np.cumsum(far) - 1
    steps = (starts - starts[far][run]) // _MOST_BYTES
    far[1:] |= steps[1:] != steps[:-1]
    return np.split(order, np.flatnonzero(far)[1:])


def at_once(work: Callable[[_Item], object], items: Sequence[_Item]) -> None:
    """Call `work` with each of `items`, many at a time; of several errors the one of the first item is raised.

    Where that, or a signal, ends it early, calls that hang are not waited for.
    """
    if len(items) == 1:
        work(items[0])
        return
    with closing(Crew(min(AT_ONCE, len(items)), "kcache-fetch")) as crew:
        for done in [crew.submit(work, item) for item in items]:
            done.result()


def missing(paths: Iterable[Place]) -> list[Place]:
    """Those of `paths` at which nothing is; a folder of a bucket is listed once, however many are looked for in it."""
    listed: dict[BucketPath, set[BucketPath]] = {}
    found = []
    for path in paths:
        if isinstance(path, Path):
            there = path.exists()
        else:
            if path.parent not in listed:
                listed[path.parent] = set(path.parent.iterdir())
            there = path in listed[path.parent]
        if not there:
            found.append(path)
    return found


def listed(folder: Place) -> Iterator[tuple[str, bool]]:
    """What stands right in a folder: each name, and whether it is a folder; a link is none."""
    if isinstance(folder, Path):
        with os.scandir(folder) as entries:
            yield from ((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
        return
    found = folder.listing()
    yield from ((name.rstrip("/").rpartition("/")[2], True) for name in found["common_prefixes"])
    yield from ((entry["path"].rpartition("/")[2], False) for entry in found["objects"])


class Windows:
    """Parts of files in a bucket, for those who go through them about in order: whoever comes next finds his part here.

    Windows of a file are fetched, and the last ones kept; many threads may read at once.
    """

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[BucketPath, int], Future[bytes]] = OrderedDict()
        self._lock = Lock()

    def read(self, path: BucketPath, start: int, length: int) -> bytes:
        """`length` bytes from byte `start` on, fewer where the file ends; raises as `BucketPath.read_range` does."""
        if length > _WINDOW_BYTES:
            return bytes(path.read_range(start, length))
        first, last = start // _WINDOW_BYTES, max(start, start + length - 1) // _WINDOW_BYTES
        content = b"".join(self._window(path, number) for number in range(first, last + 1))
        return content[start - first * _WINDOW_BYTES :][:length]

    def _window(self, path: BucketPath, number: int) -> bytes:
        with self._lock:
            found = self._held.get((path, number))
            fetched = found or Future[bytes]()
            self._held[path, number] = fetched
            while len(self._held) > _WINDOWS:
                self._held.popitem(last=False)
        if found is None:
            try:
                fetched.set_result(bytes(path.read_range(number * _WINDOW_BYTES, _WINDOW_BYTES)))
            except BaseException as error:  # noqa: BLE001  # whatever it is, who waits is told it as well
                with self._lock:
                    self._held.pop((path, number), None)
                fetched.set_exception(error)
        return fetched.result()


class Readable(Protocol):
    """A file that is read from front to back."""

    def readinto(self, target: memoryview, /) -> int | None:
        """Fill `target` from the file's next bytes; gives how many there were, 0 at the end."""
        ...


@contextmanager
def reading(path: Place) -> Iterator[Readable]:
    """A file to be read from front to back, by large pieces; raises OSError, StoreError among them."""
    with path.open("rb", buffering=0) if isinstance(path, Path) else opened(path) as file:
        yield file


@contextmanager
def opened_if(path: Place, check: Callable[[str], None]) -> Iterator[BinaryIO]:
    """The file at `path`, open for reading; `check` is told its sha256 (hex), and raises ValueError for another one.

    Of a file in a bucket it is a copy, so that what is read is what was checked; what arrives otherwise is fetched
    again, as bytes may be changed on their way. Raises as `opened` does, and CacheWriteError.
    """
    if isinstance(path, Path):
        with path.open("rb") as file:
            check(hashlib.file_digest(file, "sha256").hexdigest())
            file.seek(0)
            yield file
        return
    with unnamed_file() as copy:
        for left in reversed(range(FETCHES)):
            copy.seek(0)
            copy.truncate()
            with opened(path) as there, writing_there():
                shutil.copyfileobj(there, copy)
                copy.flush()
            copy.seek(0)
            digest = hashlib.file_digest(copy, "sha256").hexdigest()
            with suppress(*[ValueError] * bool(left)):
                check(digest)
                break
        copy.seek(0)
        yield copy
