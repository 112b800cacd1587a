"""Files of either form, open for libraries that read here and there in them: those of a bucket come by ranges."""

import io
from pathlib import Path

from kcache.places.bucket import BucketPath
from kcache.places.place import Place

_AHEAD = 4 << 20
"""Bytes that are asked of a store at a time, where a library reads less."""


def opened(path: Place) -> io.BufferedReader:
    """The file at `path`, open for reading; raises OSError, FileNotFoundError among them, or StoreError."""
    return path.open("rb") if isinstance(path, Path) else io.BufferedReader(_Ranges(path), _AHEAD)


class _Ranges(io.RawIOBase):
    """A file in a bucket: each read is a request."""

    def __init__(self, path: BucketPath) -> None:
        self._path, self._at, self._size = path, 0, path.size()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # as io calls it
        count = max(0, min(len(buffer), self._size - self._at))
        if count:
            buffer[:count] = self._path.read_range(self._at, count)
            self._at += count
        return count
