"""Who reads a folder holds it, so that nobody removes what is being read; and who holds it is found out.

The hold is the kernel's, as that of `kcache.disk.durable.exclusive`, which is refused while anyone reads: it ends with
the process, however that ends. On a network file system it holds among the processes of one machine; where a file
system knows no such holds, or nothing may be opened, reading goes on without.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kcache.errors import CacheBusyError
from kcache.places.bucket import BucketPath

_alone: set[tuple[int, int]] = set()
"""The folders, by device and inode, that this process holds alone: it may read them as well."""


class Reading:
    """Holds a folder together with all other readers and writers, until it is closed or nobody has it any more."""

    def __init__(self, folder: Path | BucketPath) -> None:
        """Raises CacheBusyError when another process holds the folder alone; in a bucket nobody holds anything."""
        self._folder = folder
        self._descriptor: int | None = None
        if not isinstance(folder, Path):
            return
        try:
            if _identity(folder) in _alone:
                return
            self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise CacheBusyError(
                f"{folder} is being changed by {holders(folder)}; expected no one to hold it alone; "
                "wait for that one to end"
            ) from None
        except OSError:
            self.close()

    def close(self) -> None:
        """Let go of the folder; closing again is fine."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> "Reading":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(OSError, AttributeError, TypeError):  # the interpreter may be shutting down
            self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """In the process that it is sent to, it is a hold of that process."""
        return Reading, (self._folder,)


@contextmanager
def read_by_its_holder(folder: Path) -> Iterator[None]:
    """In the block, this process holds `folder` alone, and may read it."""
    identity = _identity(folder)
    _alone.add(identity)
    try:
        yield
    finally:
        _alone.discard(identity)


def holders(folder: Path) -> str:
    """Who holds `folder`, in words: "another process, 4711 (kcache train-prior …)", as far as the system says."""
    found = [_told(pid) for pid in _holding(folder)]
    return ", ".join(["another process", *found]) if found else f"another process (`fuser -v {folder}` may tell which)"


def _holding(folder: Path) -> list[int]:
    """Numbers of the processes that hold `folder`, of those that can be seen from here."""
    try:
        lines, inode = Path("/proc/locks").read_text(encoding="utf-8").splitlines(), folder.stat().st_ino
    except OSError:
        return []
    # proc(5): "1: FLOCK ADVISORY READ 4711 08:01:131073 0 EOF", and "1: -> FLOCK …" for one that waits.
    fields = [line.split() for line in lines]
    pids = {int(words[4]) for words in fields if words[1] == "FLOCK" and words[5].endswith(f":{inode}")}
    return sorted(pid for pid in pids if pid > 0 and _has_open(pid, folder))


def _has_open(pid: int, folder: Path) -> bool:
    """Whether a process has `folder` open; True as well where that may not be seen: inode numbers seldom repeat."""
    try:
        opened = list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return True
    for link in opened:
        with suppress(OSError):
            if link.readlink() == folder.resolve():
                return True
    return False


def _told(pid: int) -> str:
    if pid == os.getpid():
        return "or another part of this one"
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return str(pid)
    command = " ".join(" ".join(words).split())
    return f"{pid} ({command if len(command) <= 200 else command[:199] + '…'})"


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
