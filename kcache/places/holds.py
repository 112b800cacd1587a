"""Who reads and who writes a folder of either form: on a disk the kernel knows, of a bucket nobody does.

So nothing holds a bucket, and what another process may read there is not removed by itself.
"""

import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from kcache.disk import durable
from kcache.places.place import Place


def shared(folder: Place) -> AbstractContextManager[None]:
    """Hold a folder together with others who do the same; raises CacheBusyError when a process holds it alone."""
    return durable.shared(folder) if isinstance(folder, Path) else nullcontext()


def exclusive(folder: Place) -> AbstractContextManager[None]:
    """Hold a folder alone; raises CacheBusyError when another process holds or reads it."""
    return durable.exclusive(folder) if isinstance(folder, Path) else nullcontext()


def knows_readers(folder: Place) -> bool:
    """Whether `exclusive` keeps away from what is read: only then may a build remove what was superseded."""
    return isinstance(folder, Path)


def remove_leftovers(cache: Place) -> None:
    """Remove what writers that have ended left half made; in a bucket nothing ever is."""
    if isinstance(cache, Path):
        durable.remove_leftovers(cache)


def writing(path: Place, size: int | None = None) -> AbstractContextManager[None]:
    """Turn a failure of the system into CacheWriteError; what goes into a bucket is made on this machine first."""
    return durable.writing(path if isinstance(path, Path) else Path(tempfile.gettempdir()) / path.name, size)
