"""Leases: how long is respected what a process holds of which nobody here can say whether it still runs.

Who holds something renews it while it works. Time is that of the file system, for which a new file is made beside:
clocks of machines differ.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

LEASE_SECONDS = 900.0
"""A holder that has not renewed what it holds for so long has ended, or is so far away that work goes on without it."""
RENEW_SECONDS = 60.0
"""How often a holder renews."""


def renew(path: Path) -> None:
    """Begin the lease of a file anew; nothing happens where that cannot be done."""
    with suppress(OSError):
        os.utime(path)  # without times: the file server's clock, not this machine's


def seconds_left(path: Path) -> float:
    """Until the lease of a file or folder runs out; 0 or less afterwards. Raises OSError when it is not there.

    What was renewed in the future, by a clock that has been put back since, is as if renewed now.
    """
    with tempfile.TemporaryFile(dir=path.parent, prefix=".tmp-now-") as fresh:
        now = os.fstat(fresh.fileno()).st_mtime
    changes = dict(_changes(path))
    for changed, time in changes.items():
        if time > now + RENEW_SECONDS:
            with suppress(OSError):
                os.utime(changed, (now, now), follow_symlinks=False)
    return LEASE_SECONDS - (now - min(now, max(changes.values())))


def ran_out(path: Path) -> bool:
    """Whether the lease of `path` has run out for certain."""
    try:
        return seconds_left(path) <= 0
    except OSError:
        return False


def _changes(path: Path) -> Iterator[tuple[Path, float]]:
    yield path, path.lstat().st_mtime
    if path.is_dir() and not path.is_symlink():
        for inner in path.rglob("*"):
            with suppress(OSError):  # its writer may be at work, after all
                yield inner, inner.lstat().st_mtime
