"""Folders that this machine keeps to save time: those in use stay, of the others the ones not used for longest go."""

import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path

from kcache.disk.durable import writing
from kcache.disk.filesystems import lock

_held: dict[Path, int] = {}
"""What this process uses, and the open descriptors that say so to others."""


def hold(folder: Path) -> None:
    """Make sure that there is a folder, and that no sweep takes it away while this process lives."""
    while folder not in _held or not _is_in_place(folder, _held[folder]):
        if folder in _held:
            os.close(_held.pop(folder))
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # swept at this moment
                descriptor = os.open(folder, os.O_RDONLY)
                lock(descriptor, fcntl.LOCK_SH, folder)
                _held[folder] = descriptor
    with suppress(OSError):  # it may be another user's, or on a disk that only may be read: it is in use all the same
        os.utime(folder)


def _is_in_place(folder: Path, descriptor: int) -> bool:
    """Whether what is open is the folder that has this path now."""
    try:
        return os.path.samestat(folder.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def sweep(parent: Path, most: int) -> None:
    """Remove folders in `parent` that nobody holds, until the others take `most` bytes of the disk, or fewer."""
    sizes = {folder: _size(folder) for folder in parent.iterdir() if folder.is_dir()}
    together = sum(size for size, _ in sizes.values())
    for folder, (size, _) in sorted(sizes.items(), key=lambda item: item[1][1]):
        if together <= most:
            return
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
                together -= size
            finally:
                os.close(descriptor)


def _size(folder: Path) -> tuple[int, float]:
    """Bytes of the disk that a folder takes, and when it was last used."""
    taken, used = 0, 0.0
    with suppress(FileNotFoundError):
        used = folder.stat().st_mtime
        for path in folder.rglob("*"):
            taken += path.lstat().st_blocks * 512
    return taken, used
