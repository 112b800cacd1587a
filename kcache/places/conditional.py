"""Files of a bucket that only one of several writers creates, or changes only from what it has read.

An answer is not believed: a store may say "already there" of a write of ours that it had taken the first time, of two
that collided (409), or of nothing at all, and a write that timed out may have landed. What then lies there decides.
"""

import secrets
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from kcache.errors import StoreError
from kcache.places.bucket import BucketPath
from kcache.places.client import ask
from kcache.places.place import Place

_TRIES = 8
"""How often a write is tried whose answer and outcome do not go together."""
_PROBE = ".tmp-probe-"
"""How the names of files begin that a store is tried with."""
_PROBE_SECONDS = 3600.0
"""For which nobody tries: each of a trial's few requests ends within minutes, or fails."""
_PAUSE_SECONDS = 0.1
"""Before what lost against another writer is tried again, for the first time; then twice as long each time."""


class Version(NamedTuple):
    """What a store calls the content of a file at one time."""

    e_tag: str | None
    version: str | None


def create(path: BucketPath, content: bytes) -> bool:
    """Write `path` where nothing is; whether what lies there then is `content`, by this writer or by another one.

    Raises StoreError when the store neither takes it nor has anything there.
    """
    for attempt in range(_TRIES):
        try:
            _put(path, content, "create")
            return True
        except StoreError as error:
            found = read_version(path)
            if found is not None:
                return found[0] == content
            if _is_settled(error) or attempt == _TRIES - 1:
                raise
        _back_off(attempt)
    raise AssertionError("the last try returns or raises")


def read_version(path: BucketPath) -> tuple[bytes, Version] | None:
    """The content of `path` and what the store calls it; None where nothing is."""
    try:
        content, meta = path.read_whole()
    except FileNotFoundError:
        return None
    return content, Version(meta["e_tag"], meta.get("version"))


def swap(path: BucketPath, content: bytes, before: Version | None) -> bool:
    """Write `path` if it still is what `before` says, None being nothing; whether `content` lies there then.

    Raises StoreError when the store does not take it although nobody has changed it.
    """
    if before is None:
        return create(path, content)
    for attempt in range(_TRIES):
        try:
            _put(path, content, _from(before))
            return True
        except StoreError as error:
            found = read_version(path)
            if found is None or found[1] != before or found[0] == content:
                return found is not None and found[0] == content
            if _is_settled(error) or attempt == _TRIES - 1:
                raise
        _back_off(attempt)
    raise AssertionError("the last try returns or raises")


def _put(path: BucketPath, content: bytes, mode: Any) -> None:
    ask(path, lambda: path.store.put(path.key, content, mode=mode, use_multipart=False))


def _from(before: Version) -> dict[str, str | None]:
    return {"e_tag": before.e_tag} | ({"version": before.version} if before.version else {})


def _is_settled(error: StoreError) -> bool:
    """Whether the same write would be refused again."""
    return type(error.__cause__).__name__ in ("PermissionDeniedError", "UnauthenticatedError", "NotSupportedError")


def _is_refusal(error: StoreError) -> bool:
    """Whether a store says that the condition of a write does not hold."""
    return type(error.__cause__).__name__ in ("AlreadyExistsError", "PreconditionError")


def _back_off(attempt: int) -> None:
    time.sleep(_PAUSE_SECONDS * 2**attempt * (0.5 + secrets.randbelow(1000) / 1000))


def check_store(folder: Place) -> None:
    """Make sure that `folder` can be written by several at once: that its store keeps to the conditions of writes.

    Once per process and bucket, by a file below `folder` that goes again, and with it those of processes that were
    killed meanwhile. Raises StoreError with what the store lacks, or with what it does not permit. A disk always can.
    """
    if not isinstance(folder, Path) and folder.bucket not in _checked:
        _probe(folder / f"{_PROBE}{secrets.token_hex(8)}")
        _checked.add(folder.bucket)


def forget_checks() -> None:
    """Let `check_store` look again."""
    _checked.clear()


_checked: set[str] = set()


def _probe(path: BucketPath) -> None:
    first, second, third = (f"{path.name} {number}".encode() for number in (1, 2, 3))
    try:
        if not create(path, first) or _is_taken(path, second, "create"):
            raise _lacking(path, "writes a file over another one that was to be created only where none is")
        found = read_version(path)
        if found is None or found[0] != first:
            raise _lacking(path, "does not give back what was written a moment ago")
        if found[1].e_tag is None:
            raise _lacking(path, "gives no ETag, by which changes are told")
        if not swap(path, second, found[1]) or _is_taken(path, third, _from(found[1])):
            raise _lacking(path, "writes over a file that has changed since it was read")
        with suppress(FileNotFoundError, StoreError):
            for left in _left_behind(path):
                ask(path, partial(path.store.delete, left))
    finally:
        with suppress(FileNotFoundError, StoreError):
            ask(path, lambda: path.store.delete(path.key))


def _left_behind(probe: BucketPath) -> list[str]:
    """Names of what other processes tried the store with, so long ago by its clock that they have ended."""
    beside = {entry["path"]: entry["last_modified"] for entry in probe.parent.listing()["objects"]}
    now = beside.get(probe.key)
    return [
        key
        for key, written in beside.items()
        if now and key.rpartition("/")[2].startswith(_PROBE) and (now - written).total_seconds() > _PROBE_SECONDS
    ]


def _is_taken(path: BucketPath, content: bytes, mode: Any) -> bool:
    """Whether a write lands whose condition does not hold, whatever the store says of it."""
    try:
        _put(path, content, mode)
    except StoreError as error:
        if not _is_refusal(error) and _is_settled(error):
            raise
    found = read_version(path)
    return found is not None and found[0] == content


def _lacking(path: BucketPath, what: str) -> StoreError:
    return StoreError(
        f"{path.bucket}: the object store {what}, so that builders could undo each other's work; expected one with "
        "conditional writes (If-None-Match and If-Match); build on a disk and copy the cache there"
    )
