"""Sizes that were found in the headers of pictures, kept on this machine: no picture is read twice for its size alone.

They are kept by what the picture's file holds, and so are true of it in every source, for every cache and list of
shapes. All of this only saves time: where nothing can be kept, headers are read again.
"""

import logging
from collections.abc import Iterator

import numpy as np

from kcache.disk.durable import read_npy, write_npy
from kcache.disk.memo import own_folder
from kcache.disk.scratch import kept, release, spans
from kcache.errors import CacheWriteError
from kcache.foreign import reason
from kcache.store.digests import Keys, Positions
from kcache.store.formats.side_files import SIZES

logger = logging.getLogger(__name__)

_FILE = "sizes.npy"
"""Of `SIZES`, in $KCACHE_HOME."""
_MOST = 1 << 27
"""Pictures whose sizes are kept, those found last: 3.2 GB."""
_TOGETHER = 1 << 20


def remembered(keys: Keys) -> Iterator[np.ndarray]:
    """Of `SIZES`: those of the pictures of `keys` that were found before, run by run."""
    rows, find = _rows(), Positions(keys).find
    for span in spans(len(rows), _TOGETHER):
        run = rows[span]
        yield run[(find(Keys(run["key"])) >= 0) & _is_known(run)]
        release(rows)


def remember(sizes: np.ndarray) -> None:
    """Keep what is known of `sizes`, of `SIZES`, which were not remembered."""
    runs = (sizes[span] for span in spans(len(sizes), _TOGETHER))
    new = kept((run[_is_known(run)] for run in runs), sizes[:0])
    if not len(new):
        return
    try:
        path = own_folder() / _FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = _rows()
        before = (rows[span] for span in spans(len(rows), _TOGETHER))
        write_npy(path, kept([*before, new], rows[:0])[-_MOST:])
    except (CacheWriteError, OSError) as error:
        logger.warning(
            "the sizes of %s pictures cannot be kept (%s); they are read again when they are needed; free that folder, "
            "or set KCACHE_HOME to one that can be written",
            f"{len(new):,}",
            reason(error),
        )


def _rows() -> np.ndarray:
    """All that is kept, mapped; none where that cannot be read."""
    try:
        rows = read_npy(own_folder() / _FILE, mapped=True)
    except (CacheWriteError, OSError, ValueError):
        return np.empty(0, SIZES)
    return rows if rows.dtype == SIZES and rows.ndim == 1 else np.empty(0, SIZES)


def _is_known(sizes: np.ndarray) -> np.ndarray:
    return (sizes["width"] > 0) & (sizes["height"] > 0)
