"""A place: where a file or folder lies, on a disk or in an object store, by pathlib's names."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from kcache.errors import ConfigError
from kcache.places.bucket import BucketPath
from kcache.places.hub import snapshot
from kcache.urls import hub_cache, remote, store_url, without_scheme

Place: TypeAlias = Path | BucketPath
"""A file or folder: a path of this machine, as it is, or one in an object store with what of pathlib caches use."""


def place_of(path: str | Place) -> Place:
    """The place that a path or a URL of a store means; raises ConfigError for what means neither."""
    if isinstance(path, BucketPath):
        return path
    text = without_scheme(os.fspath(path))
    if (url := store_url(text)) is not None:
        return BucketPath.of(url)
    if (problem := remote(text)) is not None:
        raise ConfigError(problem)
    return Path(text)


def cache_place(path: str | Place, parts: Sequence[str] | None = None) -> Place:
    """`place_of` for a cache that is only read: "hf://datasets/owner/name@revision" too, of which a copy is fetched.

    Of one on the Hub only the files that match `parts` are fetched, by default all; raises StoreError.
    """
    found = None if isinstance(path, BucketPath) else hub_cache(os.fspath(path))
    return place_of(path) if found is None else snapshot(*found, parts)
