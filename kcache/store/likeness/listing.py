"""The groups of near-duplicates as a list, by names: what `kcache cache-duplicates` says and writes."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kcache.disk.durable import write_bytes
from kcache.errors import ConfigError
from kcache.store.cache import Cache
from kcache.store.likeness.cosines import Done
from kcache.store.likeness.duplicates import DUPLICATE, Group, groups_of
from kcache.store.likeness.known import known_duplicates
from kcache.urls import check_local

if TYPE_CHECKING:
    import pyarrow

SHOWN = 10
"""Groups that are told one by one, and duplicates of each."""


@dataclass(frozen=True, kw_only=True)
class Listed:
    """The near-duplicates of a cache."""

    cache: str
    cosine: float
    """From which on a picture is a duplicate."""
    samples: int
    """Of the whole cache."""
    duplicates: int
    """Samples that `not duplicate` would leave out, at this cosine."""
    groups: int
    largest: list[dict[str, Any]]
    """The largest groups, as lines of the list are; of each the first duplicates."""
    output: str | None
    """The list."""


def list_duplicates(
    cache: str, cosine: float = DUPLICATE, output: str | None = None, done: Done = lambda done, total: None
) -> Listed:
    """Find the near-duplicates of the cache at a path or URL, and write them to `output`, a JSON line for each group.

    Raises ConfigError for a `cosine` or an `output` that cannot be, CacheWriteError, and the errors of `Cache.open` and
    `find_duplicates`.
    """
    if not (math.isfinite(cosine) and 0 < cosine <= 1):
        raise ConfigError(f"--cosine is {cosine:g}; expected a number above 0 and up to 1, such as {DUPLICATE}")
    path = None if output is None else _checked(output)
    opened = Cache.open(cache)
    found = known_duplicates(opened, done)
    groups = groups_of(found, cosine)
    names = _Names(opened, np.unique([number for each in groups for number in (each.kept, *each.duplicates.tolist())]))
    if path is not None:
        write_bytes(
            path, b"".join(json.dumps(names.line(each), ensure_ascii=False).encode() + b"\n" for each in groups)
        )
    return Listed(
        cache=cache, cosine=cosine, samples=len(opened), duplicates=sum(len(each.duplicates) for each in groups),
        groups=len(groups), largest=[names.line(each, SHOWN) for each in groups[:SHOWN]], output=output,
    )  # fmt: skip


def _checked(output: str) -> Path:
    check_local(output)
    path = Path(output)
    if path.is_dir() or not path.parent.is_dir():
        what = "a folder" if path.is_dir() else f"but {path.parent} is no folder"
        raise ConfigError(f"--output is {output}, {what}; expected a file, such as {Path('duplicates.jsonl')}")
    return path


class _Names:
    """Ids and names of some samples, in columns."""

    def __init__(self, cache: Cache, numbers: np.ndarray) -> None:
        self._numbers = numbers
        self._parts = list(self._of(cache, numbers))
        self._bounds = np.cumsum([0, *map(len, self._parts)])

    def _of(self, cache: Cache, numbers: np.ndarray) -> "Iterator[pyarrow.Table]":
        for at, part in cache.parts({"id", "name"}):
            first, last = np.searchsorted(numbers, (at[0], at[-1] + 1)) if len(at) else (0, 0)
            yield part.select(["id", "name"]).take(numbers[first:last] - (at[0] if len(at) else 0))

    def _told(self, number: int) -> dict[str, str]:
        place = int(np.searchsorted(self._numbers, number))
        part = int(np.searchsorted(self._bounds, place, "right")) - 1
        [row] = self._parts[part].slice(place - int(self._bounds[part]), 1).to_pylist()
        return {"id": row["id"], "name": row["name"]}

    def line(self, group: Group, most: int | None = None) -> dict[str, Any]:
        """A group as the list has it; of its duplicates at most so many."""
        pairs = zip(group.duplicates[:most].tolist(), group.cosines[:most].tolist(), strict=True)
        told = [self._told(number) | {"cosine": round(cosine, 6)} for number, cosine in pairs]
        return {"kept": self._told(group.kept), "samples": 1 + len(group.duplicates), "duplicates": told}
