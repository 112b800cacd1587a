"""The manifest's counts of samples, rejections, rows and bytes, compared with what the files of the cache hold."""

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from kcache.errors import CacheCorruptError
from kcache.manifest import MANIFEST, ShardEntry, TableEntry
from kcache.shards import Commit, read_side_file, side_name
from kcache.vouched import BrokenFile, Vouched

__all__ = ["check_counts"]

SHOWN = 5
"""Wrong counts that are named one by one."""


def check_counts(vouched: Vouched, broken_shards: Collection[str]) -> list[BrokenFile]:
    """The manifest, where it counts something else than its files hold; and side files that cannot be counted.

    Rows and bytes are those that the side files name. `broken_shards` are known to be broken, and count as the manifest
    says.
    """
    if vouched.manifest is None:
        return []
    faults, wrong = list[BrokenFile](), list(vouched.wrong_counts)
    for table, entry in vouched.manifest.tables.items():
        rows = size = 0
        for shard in entry.shards:
            name, found = shard.data.removesuffix(".tar"), (shard.rows, shard.bytes)
            commit = vouched.commits.get(name)
            if commit is not None and name not in broken_shards:
                try:
                    found = _stored(vouched.folder, entry, shard, commit)
                except CacheCorruptError as error:
                    path = f"{name.partition('/')[0]}/{side_name(commit.name, _part(entry, shard))}"
                    faults.append(BrokenFile(path=path, shard=name, reason=str(error)))
            wrong += _differences(f"{table} in {shard.data}", (shard.rows, shard.bytes), found)
            rows, size = rows + found[0], size + found[1]
        wrong += _differences(table, (entry.rows, entry.bytes), (rows, size))
    if wrong:
        faults.append(BrokenFile(path=MANIFEST, shard=None, reason=_reason(wrong)))
    return faults


def _stored(folder: Path, entry: TableEntry, shard: ShardEntry, commit: Commit) -> tuple[int, int]:
    """Rows of a table in a shard, and the bytes of these rows."""
    side = read_side_file((folder / shard.data).parent, commit, entry.recipe, _part(entry, shard))
    return len(side), sum(int(side[field.name]["length"].sum(dtype=np.int64)) for field in entry.recipe.fields)


def _part(entry: TableEntry, shard: ShardEntry) -> str:
    """What a side file says of its table: the name, where a tar holds the rows of several."""
    return entry.recipe.table if shard.data.endswith(".tar") else ""


def _differences(what: str, said: tuple[int, int], found: tuple[int, int]) -> list[str]:
    return [
        f"{a:,} {unit} of {what}, there are {b:,}"
        for unit, a, b in zip(("rows", "bytes"), said, found, strict=True)
        if a != b
    ]


def _reason(wrong: Sequence[str]) -> str:
    more = f" (and {len(wrong) - SHOWN} more)" if len(wrong) > SHOWN else ""
    return (
        f"it counts {'; '.join(wrong[:SHOWN])}{more}; --repair writes it anew, and so does cache-build with the flags "
        "that built the cache: no row is encoded for that"
    )
