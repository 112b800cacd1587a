"""Files of a bucket that only one of several writers creates, or changes only from what it has read.

An answer is not believed: a store may say "already there" of a write of ours that it had taken the first time, of two
that collided (409), or of nothing at all, and a write that timed out may have landed. What then lies there decides.
"""

import secrets
import time
from typing import NamedTuple

from kcache.errors import StoreError
from kcache.places.bucket import BucketPath
from kcache.places.client import told

_TRIES = 6
"""How often a write is tried whose answer and outcome do not go together."""


class Version(NamedTuple):
    """What a store calls the content of a file at one time."""

    e_tag: str | None
    version: str | None


def create(path: BucketPath, content: bytes) -> bool:
    """Write `path` where nothing is; whether what lies there then is `content`, by this writer or by another one.

    Raises StoreError when the store neither takes it nor has anything there.
    """
    from obstore.exceptions import AlreadyExistsError

    for attempt in range(_TRIES):
        try:
            with told(path):
                path.store.put(path.key, content, mode="create", use_multipart=False)
                return True
        except StoreError as error:
            if not isinstance(error.__cause__, AlreadyExistsError) and attempt == _TRIES - 1:
                raise
        try:
            return path.read_bytes() == content
        except FileNotFoundError:
            time.sleep(0.1 * 2**attempt * (0.5 + secrets.randbelow(1000) / 1000))
    raise StoreError(f"{path}: the object store says that it is there, and that it is not; expected one or the other")


def read_version(path: BucketPath) -> tuple[bytes, Version] | None:
    """The content of `path` and what the store calls it; None where nothing is."""
    try:
        with told(path):
            found = path.store.get(path.key)
            return bytes(found.bytes()), Version(found.meta["e_tag"], found.meta.get("version"))
    except FileNotFoundError:
        return None


def swap(path: BucketPath, content: bytes, before: Version | None) -> bool:
    """Write `path` if it still is what `before` says, None being nothing; whether `content` lies there then."""
    if before is None:
        return create(path, content)
    mode = {"e_tag": before.e_tag} | ({"version": before.version} if before.version else {})
    try:
        with told(path):
            path.store.put(path.key, content, mode=mode, use_multipart=False)
            return True
    except StoreError:
        found = read_version(path)
        if found is not None and found[0] == content:
            return True
        if found is not None and found[1] != before:
            return False
        raise
