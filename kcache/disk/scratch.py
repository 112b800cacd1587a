"""What need not fit into memory: it lies in the temporary folder, in files without a name, so that nothing is left.

Arrays there are read-only and mapped: what of them is in memory the system may take back, and `release` gives back.
"""

import mmap
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from io import BufferedRandom
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kcache.disk.durable import writing
from kcache.disk.filesystems import UNSUPPORTED

_IN_MEMORY = 64 << 20
"""Bytes up to which an array is in memory."""


def unnamed_file() -> BufferedRandom:
    """A new file that is gone once nobody has it open or mapped, also after a kill; raises CacheWriteError."""
    with writing_there():
        return tempfile.TemporaryFile()


def writing_there(size: int | None = None) -> AbstractContextManager[None]:
    """`writing`, of such a file."""
    return writing(Path(tempfile.gettempdir()) / "kcache", size)


def mapped_file(file: BinaryIO) -> Any:
    """All of a file, mapped where that can be; raises CacheWriteError where what was written has no room."""
    with writing_there():
        file.flush()
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
    file.seek(0)
    return file.read()


class Pile:
    """Rows that come run by run, and are one array in the end."""

    def __init__(self, empty: np.ndarray) -> None:
        """`empty` has no rows, and the dtype and shape that they have."""
        self._empty = empty
        self._few = [empty]
        self._size = 0
        self._file: BinaryIO | None = None

    def add(self, run: np.ndarray) -> None:
        """Put some rows on top; raises CacheWriteError where the temporary folder has no room."""
        self._few.append(run)
        self._size += run.nbytes
        if self._file is not None or self._size > _IN_MEMORY:
            self._write()

    def _write(self) -> None:
        if self._file is None:
            self._file = unnamed_file()
        with writing_there(self._size):
            for run in self._few:
                self._file.write(np.ascontiguousarray(run).reshape(-1).view(np.uint8).data)
        self._few = []

    def array(self) -> np.ndarray:
        """All of them; in a file, read-only, where they are many."""
        if self._file is None:
            return np.concatenate(self._few)
        with self._file as file:
            content = mapped_file(file)
        return np.frombuffer(content, self._empty.dtype).reshape(-1, *self._empty.shape[1:])


def kept(runs: Iterable[np.ndarray], empty: np.ndarray) -> np.ndarray:
    """The rows of `runs`, one after the other, as a `Pile` of them; `empty` has none."""
    pile = Pile(empty)
    for run in runs:
        pile.add(run)
    return pile.array()


def release(array: np.ndarray) -> None:
    """Give back the memory that a mapped array takes, which is read again where it is asked for; of others nothing."""
    base: Any = array
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def spans(length: int, step: int) -> Iterator[slice]:
    """0 to `length`, in slices of `step`, the last one shorter."""
    return (slice(first, min(first + step, length)) for first in range(0, length, step))
