"""Files and folders, seen whole or not at all, also after a crash or a power cut; locks; arrays read back warily."""

import ast
import errno
import fcntl
import io
import json
import os
import secrets
import shutil
import stat
import tokenize
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kcache.disk.filesystems import UNSUPPORTED, free_bytes, lock, sync
from kcache.disk.leases import ran_out
from kcache.disk.readers import holders, read_by_its_holder
from kcache.errors import CacheBusyError, CacheWriteError, KcacheError
from kcache.foreign import SYSTEM_ADVICE, out_of_memory, reason, system_number
from kcache.processes import from_label, is_gone, is_knowable, this_process

TEMPORARY_PREFIX = ".tmp-"

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EINVAL, errno.EACCES)
"""What file systems without hard links answer."""
_OF_ROOM = (0, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors for which it matters how much room there is."""


def temporary_path(folder: Path) -> Path:
    """A name in `folder` that nothing else uses, with the process that uses it; what stands there is never read."""
    return folder / f"{TEMPORARY_PREFIX}{secrets.token_hex(6)}-{this_process().label}"


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A new folder in `parent` under a temporary name, to be published in the block; gone when the block fails."""
    folder = temporary_path(parent)
    try:
        with writing(folder):
            folder.mkdir()
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def remove_temporary(folder: Path) -> None:
    """Remove what writers left in `folder` that have ended; what a living one is writing stays.

    Of a writer of which nothing is known here, that is what has not changed for the time of a lease. What cannot be
    removed is in no one's way, and stays until it can.
    """
    for entry in folder.glob(f"{TEMPORARY_PREFIX}*"):
        owner = from_label(entry.name.removeprefix(TEMPORARY_PREFIX).partition("-")[2])
        if owner is not None and (is_gone(owner) or (not is_knowable(owner) and ran_out(entry))):
            with suppress(OSError):
                _delete(entry)


def remove_leftovers(cache: Path) -> None:
    """`remove_temporary` in the folder of a cache and in those of its tables; links are not followed."""
    for folder in (cache, *cache.iterdir()):
        if folder.is_dir() and not folder.is_symlink():
            remove_temporary(folder)


@contextmanager
def writing(path: Path, size: int | None = None) -> Iterator[None]:
    """Turn a failure of the system, by whichever library it comes, into CacheWriteError: `path` and what to do.

    It says the `size` in bytes and the room there, where these may be the cause.
    """
    try:
        yield
    except KcacheError:
        raise
    except Exception as error:
        number = system_number(error)
        if not (number or isinstance(error, OSError)) or out_of_memory(error):
            raise
        what = os.strerror(number) if number else reason(error)
        free = free_bytes(path.parent) if number in _OF_ROOM else None
        takes = f"it takes {size:,} bytes, " if size is not None else ""
        where = "" if free is None else f": {takes}{free:,} bytes are free in {path.parent}"
        do = SYSTEM_ADVICE.get(number, "make room or permit writing there")
        raise CacheWriteError(
            f"{path} could not be written ({what}){where}; {do}, and start again: what was finished is kept"
        ) from error


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: a rename is on disk only after its folder is."""
    with suppress(PermissionError), _opened(folder) as descriptor:  # it may be written, but not read, or not synced
        sync(descriptor)


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def publish(temporary: Path, final: Path, size: int | None = None) -> None:
    """Give what was written under a temporary name its final one, durably, for all to read who may.

    A file takes the place of the one before it in one step; a folder must not stand there yet.
    """
    with writing(final, size):
        share(temporary)
        temporary.rename(final)
        sync_folder(final.parent)


def replace(temporary: Path, final: Path) -> None:
    """`publish` in the place of whatever is there; what of that cannot be removed is in no one's way any more."""
    with suppress(CacheWriteError):
        remove(final)
    publish(temporary, final)


def share(path: Path) -> None:
    """Give files and folders that a library keeps to its user, at `path` and below, the mode of any new one there.

    That follows from the umask, or from the folder's own rules. Links are left alone.
    """
    entries = [path, *(path.rglob("*") if path.is_dir() and not path.is_symlink() else ())]
    modes = {entry: entry.lstat().st_mode for entry in entries}
    private = {entry: mode for entry, mode in modes.items() if not mode & 0o077 and not stat.S_ISLNK(mode)}
    for is_kind, make in ((stat.S_ISREG, Path.touch), (stat.S_ISDIR, Path.mkdir)):
        if kept := [entry for entry, mode in private.items() if is_kind(mode)]:
            usual = temporary_path(path.parent)
            make(usual)
            mode = stat.S_IMODE(usual.lstat().st_mode)
            _delete(usual)
            for entry in kept:
                with suppress(OSError):  # a file system without modes
                    entry.chmod(mode | stat.S_IMODE(private[entry]))


def remove(path: Path) -> None:
    """Remove a file, link or folder so that no reader ever sees a part of it; nothing there is fine."""
    condemned = temporary_path(path.parent)
    with writing(path):
        try:
            path.rename(condemned)
        except FileNotFoundError:
            return
        _delete(condemned)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A new file to write in the block; what it holds is on disk after it, its name once its folder is synced."""
    with path.open("xb") as file:
        yield file
        file.flush()
        sync(file.fileno())


@contextmanager
def _writing(final: Path, size: int) -> Iterator[BinaryIO]:
    temporary = temporary_path(final.parent)
    with writing(final, size):
        try:
            with new_file(temporary) as file:
                yield file
            publish(temporary, final, size)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_bytes(final: Path, content: bytes) -> None:
    """Write a file durably, in one step as seen by readers; raises CacheWriteError."""
    with _writing(final, len(content)) as file:
        file.write(content)


def json_bytes(value: Any) -> bytes:
    """A value as the text of a JSON file: sorted keys, two spaces, so that equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def write_json(final: Path, value: Any) -> None:
    """Write a JSON file durably, as `json_bytes` puts it."""
    write_bytes(final, json_bytes(value))


def write_npy(final: Path, array: np.ndarray) -> None:
    """Write an array as a .npy file durably; arrays of Python objects are refused."""
    with _writing(final, array.nbytes) as file:
        np.save(file, array, allow_pickle=False)


def create_bytes(final: Path, content: bytes) -> bool:
    """Write a file durably, in one step, where there is none; returns False where there is one.

    That is so, too, when two try at once. Where a file system has no hard links, the later of two at the same moment
    takes the place of the other, which may have been told True; what is there is whole all the same.
    """
    temporary = temporary_path(final.parent)
    with writing(final, len(content)):
        try:
            with new_file(temporary) as file:
                file.write(content)
            if not _is_named(temporary, final):
                return False
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(final.parent)
    return True


def _is_named(temporary: Path, final: Path) -> bool:
    """Give a file the name `final`, too, where nothing has it; False where something has."""
    try:
        final.hardlink_to(temporary)  # fails where a name exists, on network file systems too
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if final.exists():
            return False
        temporary.rename(final)
    return True


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold `folder` alone; the kernel lets go when this process ends, however it ends.

    On a network file system this holds among the processes of one machine. Raises CacheBusyError when another process
    holds the folder, alone or `shared`, or reads it.
    """
    with _held(folder, fcntl.LOCK_EX, "its only user"), read_by_its_holder(folder):
        yield


def shared(folder: Path) -> AbstractContextManager[None]:
    """Hold `folder` together with others who do the same; raises CacheBusyError when a process holds it `exclusive`."""
    return _held(folder, fcntl.LOCK_SH, "no one to hold it alone")


@contextmanager
def _held(folder: Path, kind: int, expected: str) -> Iterator[None]:
    with _opened(folder) as descriptor:
        try:
            lock(descriptor, kind | fcntl.LOCK_NB, folder)
        except BlockingIOError:
            raise CacheBusyError(
                f"{folder} is in use by {holders(folder)}; expected {expected}; "
                "wait for that one to end, or stop it: what it has committed is kept"
            ) from None
        yield


def _check_header(file: BinaryIO) -> None:
    """Raise as parsers do for a header of Python 2, which numpy would only warn of: nothing here ever wrote one."""
    size_bytes = 2 if np.lib.format.read_magic(file) == (1, 0) else 4
    ast.literal_eval(file.read(min(int.from_bytes(file.read(size_bytes), "little"), _LONGEST_HEADER)).decode("latin-1"))
    file.seek(0)


_LONGEST_HEADER = 10_000
# What numpy's parser of headers lets through besides ValueError.
_HEADER_ERRORS = (
    SyntaxError, tokenize.TokenError, TypeError, LookupError, RecursionError, MemoryError, ArithmeticError,
)  # fmt: skip


def npy_of(content: bytes, name: str) -> np.ndarray:
    """The array that `content`, all of a .npy file called `name`, holds; raises ValueError for what is no such file."""
    file = io.BytesIO(content)
    try:
        _check_header(file)
        return np.lib.format.read_array(file, allow_pickle=False)
    except _HEADER_ERRORS as error:
        raise ValueError(f"{name} has no header of an array: {error}") from error


def read_npy(path: Path, *, mapped: bool = False) -> np.ndarray:
    """The array in a .npy file, read or memory-mapped; raises OSError, or ValueError for what is no such file.

    Not `np.load`, which opens archives, too, and tries other formats on what it does not know.
    """
    try:
        with path.open("rb") as file:
            _check_header(file)
            if mapped:
                try:
                    return np.lib.format.open_memmap(path, mode="r")
                except OSError as error:
                    if error.errno not in UNSUPPORTED:
                        raise
            return np.lib.format.read_array(file, allow_pickle=False)
    except _HEADER_ERRORS as error:
        raise ValueError(f"{path.name} has no header of an array: {error}") from error
