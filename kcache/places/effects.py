"""What caches do with files, in two forms: as a disk does it, and as an object store does.

Each function takes a path of this machine or one in a bucket. On a disk things are made under a temporary name and
renamed; in a bucket a file is there when all of it is, and nothing is renamed: it is made on this machine first.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from kcache.disk import durable
from kcache.disk.durable import json_bytes
from kcache.errors import CacheBusyError, CacheWriteError, StoreError
from kcache.places import conditional
from kcache.places.bucket import BucketPath
from kcache.places.client import ask
from kcache.places.fetching import AT_ONCE, FETCHES
from kcache.places.place import Place
from kcache.stopping import Crew

_PART_BYTES = 16 << 20
"""Of an upload that is sent in parts; a smaller one is one request."""
_DELETIONS = 1000
"""Of one request, as many as it may hold."""
_ROUNDS = 10
"""How often a folder is looked through again that is being removed."""

_Taken = TypeVar("_Taken")


def read_all(paths: Sequence[Place]) -> Iterator[bytes]:
    """The content of each of `paths`, in their order; those of a bucket are fetched ahead, many at a time.

    Raises OSError, FileNotFoundError among them, or StoreError.
    """
    return take_all(paths, bytes)


def take_all(paths: Sequence[Place], take: Callable[[bytes], _Taken]) -> Iterator[_Taken]:
    """`read_checked` of each of `paths`, in their order; those of a bucket are fetched ahead, many at a time."""
    if not any(isinstance(path, BucketPath) for path in paths):
        yield from (read_checked(path, take) for path in paths)
        return
    with closing(Crew(min(AT_ONCE, len(paths)), "kcache-fetch")) as crew:
        for first in range(0, len(paths), 4 * AT_ONCE):
            part = paths[first : first + 4 * AT_ONCE]
            yield from [taken.result() for taken in [crew.submit(read_checked, path, take) for path in part]]


def read_checked(path: Place, take: Callable[[bytes], _Taken]) -> _Taken:
    """What `take` makes of the content of `path`; it raises ValueError, or CacheCorruptError, for what is not right.

    What comes from a bucket and is not right is fetched again, as bytes may be changed on their way; the last error
    is raised. `take` may be called in another thread.
    """
    for _ in range(FETCHES - 1 if isinstance(path, BucketPath) else 0):
        with suppress(ValueError):
            return take(path.read_bytes())
    return take(path.read_bytes())


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
        ask(final, lambda: final.store.put(final.key, content))


def write_json(final: Place, value: Any) -> None:
    """`write_bytes` of a value as `json_bytes` puts it."""
    write_bytes(final, json_bytes(value))


def swap_bytes(final: Place, content: bytes, before: bytes | None) -> None:
    """Write a file in the place of `before`, None being nothing; raises CacheBusyError where it is not that any more.

    It may also be `content` already, written by a twin. A bucket changes it in one step; on a disk whoever does this
    holds the turn, and one that was suspended for so long that another one had it since finds that out here.
    """
    if isinstance(final, Path):
        there = final.read_bytes() if final.exists() else None
        if is_swapped := there in (content, before):
            durable.write_bytes(final, content)
    else:
        there, version = conditional.read_version(final) or (None, None)
        is_swapped = there == content or (there == before and conditional.swap(final, content, version))
    if not is_swapped:
        raise CacheBusyError(f"{final} was changed by another process meanwhile; expected no one to; try again")


@contextmanager
def temporary_folder(parent: Place) -> Iterator[Path]:
    """A new folder of this machine to make things in that `publish` puts into `parent`; gone when the block fails."""
    if isinstance(parent, Path):
        with durable.temporary_folder(parent) as folder:
            yield folder
        return
    here = Path(tempfile.gettempdir())
    durable.remove_temporary(here)  # what those left who were killed
    folder = durable.temporary_path(here)
    with durable.writing(folder):
        folder.mkdir(0o700)
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
    # What is sent is signed with its digest, so it arrives as it is or not at all; of parts their number is checked.
    ask(final, lambda: final.store.put(final.key, path, chunk_size=_PART_BYTES, max_concurrency=4))
    if (size := path.stat().st_size) > _PART_BYTES and (there := final.size()) != size:
        raise StoreError(f"{final} has {there:,} bytes after {size:,} were written; expected as many; start again")


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
    """Remove a file, or a folder with all that is in it; nothing there is fine.

    In a bucket the last names go first, so that of shards, wherever this ends, the record goes before the data.
    """
    if isinstance(path, Path):
        durable.remove(path)
        return
    if path.key:
        with suppress(FileNotFoundError):
            ask(path, lambda: path.store.delete(path.key))
    for _ in range(_ROUNDS):
        keys = [inner.key for inner, _ in path.below()][::-1]
        if not keys:
            return
        for first in range(0, len(keys), _DELETIONS):
            with suppress(FileNotFoundError):  # another process removes as well, and not every store lets that pass
                ask(path, partial(path.store.delete, keys[first : first + _DELETIONS]))
    raise StoreError(f"{path}: files keep appearing while they are removed; expected no one to write there; end it")
