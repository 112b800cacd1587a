"""What a folder must be able to take before hours of work are done for it, and room kept back there for their end."""

import ctypes
import errno
import os
import resource
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

from kcache.durable import temporary_path, writing
from kcache.errors import CacheWriteError

_NOT_HERE = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EFBIG)
"""What systems answer that cannot set aside room for a file, or none as large in one piece."""


class Reserve:
    """Room in `folder` that nothing else can take, until it is given back or this process ends, however that ends.

    It is a file without a name. Where the system cannot set aside room there is none, and nothing is said. Raises
    CacheWriteError where there is no such room, or no file can be made.
    """

    def __init__(self, folder: Path, size: int) -> None:
        with writing(folder / "a file", size):
            self._file = TemporaryFile(dir=folder)  # noqa: SIM115 - it is open as long as the room is kept
            try:
                _allocate(self._file.fileno(), size)
            except OSError:
                self._file.close()
                raise

    def give_back(self) -> None:
        """Let the room be used; again is fine."""
        self._file.close()


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
    usage = shutil.disk_usage(folder)
    # Some file systems do not say, and have a size of nothing.
    if usage.total and usage.free < sum(files):
        raise CacheWriteError(
            f"{folder} is to get {what}, about {sum(files):,} bytes; found {usage.free:,} bytes free there; make room, "
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
