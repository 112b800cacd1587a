"""What a folder must be able to take before hours of work are done for it, and room kept back there for their end."""

import ctypes
import errno
import io
import os
import resource
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO, cast

from kcache.disk.durable import new_file, temporary_path, writing
from kcache.disk.filesystems import free_bytes
from kcache.errors import CacheWriteError

_NOT_HERE = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EFBIG)
"""What systems answer that cannot set aside room for a file, or none as large in one piece."""
_FOLDERS = 1 << 18
"""Bytes for the folders that the files are put into."""
_NOTHING = io.BytesIO()


class Reserve:
    """Room in `folder` that nothing else can take, for files by name, until it is used or this process ends.

    It lies in files that have no name yet, so that nothing of it is ever left, and `write_file` writes into them: there
    is no moment in which another could take it. Where the system cannot set aside room there is none, and nothing is
    said; where it cannot name such files later, the room is given back for what is written instead. Raises
    CacheWriteError where there is no such room, or no file can be made.
    """

    def __init__(self, folder: Path, files: Mapping[str, int]) -> None:
        self._files: dict[str, BinaryIO] = {}
        self._named = _can_name(folder)
        for name, size in {**files, "": _FOLDERS if files else 0}.items():
            with writing(folder / (name or "a file"), size):
                self._files[name] = file = _nameless(folder)
                try:
                    _allocate(file.fileno(), size)
                except OSError:
                    self.give_back()
                    raise

    def take(self, name: str) -> BinaryIO | None:
        """The file that becomes `name`, which is the caller's now; None where there is none to write into."""
        self._files.pop("", _NOTHING).close()  # folders take room, too
        file = self._files.pop(name, None)
        if file is not None and not self._named:
            file.close()
            return None
        return file

    def give_back(self) -> None:
        """Let all of it be used; again is fine."""
        while self._files:
            self._files.popitem()[1].close()


def write_file(path: Path, parts: Callable[[], Iterable[Any]], reserve: Reserve | None = None) -> None:
    """Write what `parts` gives into a new file, durably once its folder is, into the room kept for its name, if any."""
    file = None if reserve is None else reserve.take(path.name)
    if file is None:
        with new_file(path) as new:
            new.writelines(parts())
        return
    with file:
        file.writelines(parts())
        file.truncate()
        file.flush()
        os.fsync(file.fileno())
        _name(file, path)


def _nameless(folder: Path) -> BinaryIO:
    try:
        return os.fdopen(os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666), "r+b")
    except (OSError, AttributeError):  # where the system has no such files, one that has lost its name
        return cast("BinaryIO", TemporaryFile(dir=folder))


def _name(file: BinaryIO, path: Path) -> None:
    # Through a descriptor of the folder, as Python follows a link there only then.
    descriptors = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.link(str(file.fileno()), path, src_dir_fd=descriptors, follow_symlinks=True)
    finally:
        os.close(descriptors)


def _can_name(folder: Path) -> bool:
    named = temporary_path(folder)
    try:
        with _nameless(folder) as file:
            _name(file, named)
        named.unlink()
    except OSError:
        return False
    return True


def _allocate(descriptor: int, size: int) -> None:
    # Not os.posix_fallocate, which writes every block where the file system cannot set them aside.
    try:
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    except AttributeError:  # only Linux has it
        return
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if size and fallocate(descriptor, 0, 0, size) and (number := ctypes.get_errno()) not in _NOT_HERE:
        raise OSError(number, os.strerror(number))


def check_room(folder: Path, files: Sequence[int], what: str) -> None:
    """Check that `folder` can take new files of so many bytes each, which are `what`; raises CacheWriteError."""
    most, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if most != resource.RLIM_INFINITY and max(files, default=0) > most:
        raise CacheWriteError(
            f"{folder} is to get {what} with a file of about {max(files):,} bytes; found that this process may write "
            f"{most:,} bytes into a file; raise that limit: ulimit -f unlimited"
        )
    free = free_bytes(folder)
    if free is not None and free < sum(files):
        raise CacheWriteError(
            f"{folder} is to get {what}, about {sum(files):,} bytes; found {free:,} bytes free there; make room, "
            "or choose a folder on another disk"
        )


def can_link(folder: Path) -> bool:
    """Whether symbolic links can be made in `folder`, which is tried."""
    link = temporary_path(folder)
    try:
        link.symlink_to("nothing")
        link.unlink()
    except OSError:
        return False
    return True
