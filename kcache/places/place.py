"""A place: where a file or folder lies, on a disk or in an object store, by pathlib's names."""

from pathlib import Path
from typing import TypeAlias

from kcache.errors import ConfigError
from kcache.places.bucket import BucketPath
from kcache.urls import remote, store_url

Place: TypeAlias = Path | BucketPath
"""A file or folder: a path of this machine, as it is, or one in an object store with what of pathlib caches use."""


def place_of(path: str | Place) -> Place:
    """The place that a path or a URL of a store means; raises ConfigError for what means neither."""
    if not isinstance(path, str):
        return path
    if (url := store_url(path)) is not None:
        return BucketPath.of(url)
    if (problem := remote(path)) is not None:
        raise ConfigError(problem)
    return Path(path)
