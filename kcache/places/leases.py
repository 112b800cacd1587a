"""Leases of claims in two forms: how they are renewed, how long they run, and how they change hands.

On a disk a claim's time is when its file was changed. In a bucket its content changes with every renewal, and its lease
runs from when the one who waits first saw the content that still is there, by that one's own clock: clocks of machines
differ, and an object store's is not asked. It changes hands by a swap from what was read, so one alone gets it.
"""

import fcntl
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from kcache.disk import leases
from kcache.disk.durable import create_bytes, json_bytes
from kcache.disk.filesystems import lock
from kcache.disk.leases import RENEW_SECONDS
from kcache.errors import KcacheError
from kcache.places.bucket import BucketPath
from kcache.places.client import ask
from kcache.places.conditional import read_version, swap
from kcache.places.place import Place

BUCKET_SECONDS = 5 * RENEW_SECONDS
"""The lease of a claim in a bucket: each who waits counts it anew, so it is shorter."""
_RENEWED = "renewed"
"""What of a claim in a bucket says how often it was renewed."""

_seen: dict[BucketPath, tuple[bytes, float]] = {}
"""Of claims in buckets that others hold: the content, and when it was first seen."""


def saw(claim: Place, content: bytes) -> None:
    """Note what a claim held when it was read just now."""
    if isinstance(claim, BucketPath) and (claim not in _seen or _seen[claim][0] != content):
        _seen[claim] = (content, time.monotonic())


def seconds_left(claim: Place) -> float:
    """Until the lease of a claim that was read runs out; 0 or less afterwards. Raises OSError when it is not there."""
    if isinstance(claim, Path):
        return leases.seconds_left(claim)
    return BUCKET_SECONDS - (time.monotonic() - _seen[claim][1] if claim in _seen else 0.0)


def renew(claim: Place, said: Mapping[str, Any]) -> None:
    """Begin anew the lease of a claim that says `said`; nothing happens where that cannot be done."""
    with suppress(OSError, KcacheError, ValueError):
        if isinstance(claim, Path):
            if json.loads(claim.read_bytes()) == said:
                leases.renew(claim)
        elif (found := read_version(claim)) is not None:
            count = (now := json.loads(found[0])).pop(_RENEWED, 0)
            if now == said:
                swap(claim, json_bytes({**said, _RENEWED: count + 1}), found[1])


def take_over(claim: Place, found: bytes, content: bytes) -> bool:
    """Put `content` in the place of the claim `found`; False where another was faster, or its holder renewed it."""
    if isinstance(claim, BucketPath):
        now = read_version(claim)
        return now is not None and now[0] == found and swap(claim, content, now[1])
    with suppress(FileNotFoundError), claim.open("r+b") as file:
        # Where there are no locks, two may take over at once, and both do the work.
        lock(file.fileno(), fcntl.LOCK_EX, claim.parent)
        if os.path.samestat(os.fstat(file.fileno()), claim.stat()) and claim.read_bytes() == found:
            claim.unlink()
    return create_bytes(claim, content)


def drop(claim: Place) -> None:
    """Remove a claim that was looked at just now; where that cannot be done it stays.

    No store removes a file only if it still is what was read. Who is suspended between the two may remove the claim of
    whoever took it over: that one finds it gone, and what both of them made is committed once.
    """
    with suppress(OSError, KcacheError):
        if isinstance(claim, Path):
            claim.unlink()
        else:
            ask(claim, lambda: claim.store.delete(claim.key))
