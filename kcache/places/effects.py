"""What caches do with files, in two forms: as a disk does it, and as an object store does.

Each function takes a path of this machine or one in a bucket. On a disk things are made under a temporary name and
renamed; in a bucket a file is there when all of it is, and nothing is renamed: it is made on this machine first.
"""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from kcache.disk import durable
from kcache.disk.durable import json_bytes
from kcache.errors import CacheBusyError, CacheWriteError
from kcache.places import conditional
from kcache.places.bucket import BucketPath
from kcache.places.client import told
from kcache.places.place import Place

_AT_ONCE = 16
"""Requests that wait for a store at a time, where many files are wanted."""
_PART_BYTES = 16 << 20


def read_all(paths: Sequence[Place]) -> Iterator[bytes]:
    """The content of each of `paths`, in their order; those of a bucket are fetched ahead, many at a time.

    Raises OSError, FileNotFoundError among them, or StoreError.
    """
    if not any(isinstance(path, BucketPath) for path in paths):
        yield from (path.read_bytes() for path in paths)
        return
    with ThreadPoolExecutor(_AT_ONCE, "kcache-fetch") as pool:
        try:
            for first in range(0, len(paths), 4 * _AT_ONCE):
                yield from pool.map(lambda path: path.read_bytes(), paths[first : first + 4 * _AT_ONCE])
        finally:
            pool.shutdown(cancel_futures=True)


def create_bytes(final: Place, content: bytes) -> bool:
    """Write a file where there is none; False where there is one with other content, also when two try at once.

    On a disk, False as well where there is one with this content.
    """
    return durable.create_bytes(final, content) if isinstance(final, Path) else conditional.create(final, content)


def write_bytes(final: Place, content: bytes) -> None:
    """Write a file whole, in the place of what is there; raises CacheWriteError or StoreError."""
    if isinstance(final, Path):
        durable.write_bytes(final, content)
    else:
        with told(final):
            final.store.put(final.key, content)


def write_json(final: Place, value: Any) -> None:
    """`write_bytes` of a value as `json_bytes` puts it."""
    write_bytes(final, json_bytes(value))


def swap_bytes(final: Place, content: bytes, before: bytes | None) -> None:
    """Write a file in the place of `before`, None being nothing; raises CacheBusyError where it is not that any more.

    On a disk whoever changes a file so holds its turn, and nobody else can have changed it.
    """
    if isinstance(final, Path):
        durable.write_bytes(final, content)
        return
    found = conditional.read_version(final)
    if (None if found is None else found[0]) != before or not conditional.swap(final, content, found and found[1]):
        raise CacheBusyError(f"{final} was changed by another process meanwhile; expected no one to; try again")


@contextmanager
def temporary_folder(parent: Place) -> Iterator[Path]:
    """A new folder of this machine to make things in that `publish` puts into `parent`; gone when the block fails."""
    if isinstance(parent, Path):
        with durable.temporary_folder(parent) as folder:
            yield folder
        return
    folder = Path(tempfile.mkdtemp(prefix="kcache-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(temporary: Path, final: Place) -> None:
    """Give a file or folder that was made under a temporary name its final place, whole; the temporary one goes.

    In a bucket the files of a folder appear one by one, as on a disk where the folder is there already, which no reader
    may miss meanwhile: what counts must be written after them.
    """
    if isinstance(final, Path):
        try:
            durable.publish(temporary, final)
            return
        except CacheWriteError:
            if not (temporary.is_dir() and final.is_dir()):
                raise
    if temporary.is_dir():
        for path in [path for path in sorted(temporary.rglob("*")) if path.is_file()]:
            place = final / path.relative_to(temporary).as_posix()
            make_folder(place.parent)
            publish(path, place)
        shutil.rmtree(temporary)
    elif isinstance(final, BucketPath):
        _upload(temporary, final)
        temporary.unlink()


def _upload(path: Path, final: BucketPath) -> None:
    with told(final):
        final.store.put(final.key, path, chunk_size=_PART_BYTES, max_concurrency=4)


def write_npy(final: Place, array: np.ndarray) -> None:
    """Write an array as a .npy file; arrays of Python objects are refused."""
    if isinstance(final, Path):
        durable.write_npy(final, array)
        return
    with temporary_folder(final) as folder:
        durable.write_npy(folder / "array.npy", array)
        publish(folder / "array.npy", final)


def make_folder(folder: Place) -> None:
    """Make sure that there is a folder; in a bucket there are none to make."""
    if isinstance(folder, Path):
        with durable.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)


def remove(path: Place) -> None:
    """Remove a file, or a folder with all that is in it; nothing there is fine."""
    if isinstance(path, Path):
        durable.remove(path)
        return
    keys = [path.key, *(inner.key for inner, _ in path.below())]
    with told(path):
        for key in keys:
            with suppress(FileNotFoundError):
                path.store.delete(key)
