"""What not every file system can: bring files to the disk, lock folders, map files. It is done where it can be."""

import errno
import fcntl
import logging
import mmap
import os
import resource
import shutil
from pathlib import Path

logger = logging.getLogger(__name__)

UNSUPPORTED = (
    errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.ENOLCK, errno.ENODEV, errno.ENOTTY,
)  # fmt: skip
"""What file systems answer that cannot sync, lock or map; EIO and ENOSPC are failures of those that can."""

_unlocked: set[Path] = set()
"""Folders of which it was said that they cannot be locked."""


def free_bytes(folder: Path) -> int | None:
    """Bytes that are free where `folder` is, or is to be; None where it is not told, as by some file systems."""
    try:
        existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
        disk = shutil.disk_usage(existing)
    except (OSError, StopIteration):
        return None
    return disk.free if disk.total else None


def sync(descriptor: int) -> None:
    """Bring what stands behind an open descriptor to the disk."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def lock(descriptor: int, kind: int, folder: Path) -> None:
    """`flock` what is open, in `folder`; where that cannot be, it is said once for each folder.

    Raises BlockingIOError when another process has it.
    """
    try:
        fcntl.flock(descriptor, kind)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        if folder not in _unlocked:
            _unlocked.add(folder)
            logger.warning(
                "%s cannot be locked there (%s), and nothing keeps two commands from changing it at once: "
                "make sure that only one is at work in it",
                folder,
                error.strerror,
            )


def mapped(path: Path) -> mmap.mmap:
    """The content of a file, mapped; where that cannot be, read into memory.

    Python keeps a descriptor per mapping: where a large cache uses them up, more are asked for. Raises OSError, and
    ValueError for an empty file.
    """
    try:
        return _map(path)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return _read(path)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if error.errno != errno.EMFILE or soft == hard:
            raise
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return _map(path)


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _read(path: Path) -> mmap.mmap:
    content = mmap.mmap(-1, path.stat().st_size)
    with path.open("rb", buffering=0) as file, memoryview(content) as target:
        filled = 0
        while filled < len(target) and (count := file.readinto(target[filled:])):
            filled += count
    return content
