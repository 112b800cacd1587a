"""Reading much of a bucket at once: spans that lie near together as one request, and many requests in flight.

Of a disk the same functions read what they are asked for, as it lies there.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from kcache.places.bucket import BucketPath
from kcache.places.place import Place

AT_ONCE = 16
"""Requests that wait for a store at a time: with some 85 MB/s each, more than most networks carry."""
FETCHES = 3
"""How often what arrives from a store otherwise than it was written is fetched."""
_NEAR_BYTES = 128 << 10
"""Bytes that nobody asked for and that are fetched all the same: a request of its own takes as long."""
_MOST_BYTES = 8 << 20
"""Bytes after which another request begins."""

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
    """Call `work` with each of `items`, many at a time; of several errors the one of the first item is raised."""
    if len(items) == 1:
        work(items[0])
        return
    with ThreadPoolExecutor(min(AT_ONCE, max(1, len(items))), "kcache-fetch") as pool:
        try:
            for _ in pool.map(work, items):
                pass
        finally:
            pool.shutdown(cancel_futures=True)


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


class Readable(Protocol):
    """A file that is read from front to back."""

    def readinto(self, target: memoryview, /) -> int | None:
        """Fill `target` from the file's next bytes; gives how many there were, 0 at the end."""
        ...


@contextmanager
def reading(path: Place) -> Iterator[Readable]:
    """A file to be read from front to back, by large pieces; raises OSError, StoreError among them."""
    if isinstance(path, BucketPath):
        yield _InBucket(path)
        return
    with path.open("rb", buffering=0) as file:
        yield file


class _InBucket:
    def __init__(self, path: BucketPath) -> None:
        self._path, self._size, self._at = path, path.size(), 0

    def readinto(self, target: memoryview, /) -> int:
        count = min(len(target), self._size - self._at)
        if count:
            content = self._path.read_range(self._at, count)
            count = len(content)
            target[:count] = content
        self._at += count
        return count


def at_hand(folder: Place, names: Sequence[str], kept: Path) -> Path:
    """A folder of this machine with the files `names` of `folder`, which never change under that name.

    Those of a bucket are fetched into a folder of that name in `kept`, once, whole or not at all.
    """
    if isinstance(folder, Path):
        return folder
    final = kept / folder.name
    if all((final / name).is_file() for name in names):
        return final
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept, prefix=".tmp-") as made:
        at_once(lambda name: _download(folder / name, Path(made) / name), names)
        shutil.rmtree(final, ignore_errors=True)
        try:
            os.rename(made, final)  # noqa: PTH104
        except OSError:
            if not final.is_dir():  # else another process was faster
                raise
        else:
            Path(made).mkdir()  # what the block removes
    return final


def _download(path: BucketPath, final: Path) -> None:
    with reading(path) as source, final.open("wb") as file:
        buffer = memoryview(bytearray(_MOST_BYTES))
        while count := source.readinto(buffer):
            file.write(buffer[:count])
