"""What is in a folder, to be cleared up: how large, and in a bucket how old, by the store's own clock.

On a disk who clears up holds the folder alone. Nobody holds a bucket: only its age says that nobody uses a thing.
"""

import secrets
from bisect import bisect_left
from pathlib import Path

from kcache.places.bucket import BucketPath
from kcache.places.client import told
from kcache.places.place import Place


class Inventory:
    """The files below a folder, of a bucket as one listing has them."""

    def __init__(self, folder: Place) -> None:
        """Raises StoreError, also where nothing may be written: a fresh file says what time it is there."""
        self._files: list[tuple[str, int, float]] = []
        self._now = 0.0
        if isinstance(folder, BucketPath):
            self._now = _now(folder)
            with told(folder):
                entries = [
                    entry for batch in folder.store.list(f"{folder.key}/" if folder.key else None) for entry in batch
                ]
            self._files = sorted((e["path"], e["size"], e["last_modified"].timestamp()) for e in entries)

    def is_older(self, path: Place, seconds: float) -> bool:
        """Whether all that is at `path` and below was last written more than `seconds` ago; on a disk always."""
        return isinstance(path, Path) or all(self._now - written > seconds for _, _, written in self._below(path))

    def freed(self, path: Place) -> int:
        """Bytes given back when `path` is removed: what is also elsewhere, by hard links, counts nothing."""
        if isinstance(path, BucketPath):
            return sum(size for _, size, _ in self._below(path))
        inner = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
        statuses = [file.lstat() for file in inner if not file.is_dir() or file.is_symlink()]
        return sum(status.st_size for status in statuses if status.st_nlink == 1)

    def _below(self, path: BucketPath) -> list[tuple[str, int, float]]:
        first, last = (bisect_left(self._files, (f"{path.key}{letter}",)) for letter in "/0")  # 0 comes behind /
        here = bisect_left(self._files, (path.key,))
        return [file for file in self._files[here : here + 1] if file[0] == path.key] + self._files[first:last]


def _now(folder: BucketPath) -> float:
    """Seconds since the epoch, by the store's clock."""
    fresh = folder / f".tmp-now-{secrets.token_hex(6)}"
    with told(fresh):
        fresh.store.put(fresh.key, b"")
        written = fresh.store.head(fresh.key)["last_modified"]
        fresh.store.delete(fresh.key)
    return float(written.timestamp())
