"""What is committed of each table, in either form: read from commit records and side files, and nothing else.

What was rejected while no shard of its own was written is committed here, too.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from kcache.build.joined_tars import shard_recipes
from kcache.disk.durable import npy_of
from kcache.errors import CacheMismatchError, KcacheError
from kcache.places import Place
from kcache.places.effects import make_folder
from kcache.store.formats.checksums import crc32c
from kcache.store.formats.side_files import SIZES, sizes_name
from kcache.store.index import StoredRows, TableState, judges, merged_rows, provenance_of, stored_rows, table_state
from kcache.store.manifest import MANIFEST, read_manifest
from kcache.store.recipe import SHARD_FOLDER, Recipe, kind_of
from kcache.store.shards import Commit, Rejection, next_shard, read_commits, record_commit
from kcache.urls import check_local

DECODER = ("kcache", "pillow", "formats")
"""What of the provenance decides which inputs can be decoded."""


@dataclass(frozen=True, kw_only=True)
class Committed:
    """What is committed of each table."""

    in_place: Mapping[str, TableState]
    """Where a cache of its form keeps rows, and its manifest can refer to them."""
    waiting: Mapping[str, TableState]
    """Encoded into tables, and in no tar yet; {} where tables are what the cache consists of."""

    @cached_property
    def tables(self) -> Mapping[str, TableState]:
        """All of it."""
        if not self.waiting:
            return self.in_place
        return {
            name: replace(
                table,
                stored=merged_rows(table.recipe, [self.in_place[name].stored, table.stored]),
                rejections=self.in_place[name].rejections + table.rejections,
                judged_by={**self.in_place[name].judged_by, **table.judged_by},
            )
            for name, table in self.waiting.items()
        }

    @property
    def provenance(self) -> dict[str, str]:
        """What the rows that wait for a tar were made with."""
        return {name: value for table in self.waiting.values() for name, value in table.provenance.items()}

    def judged_now(self) -> list[tuple[Mapping[str, str], list[Rejection]]]:
        """The rejections that wait to be recorded beside the tars, by what they were made with."""
        groups: dict[tuple[tuple[str, str], ...], list[Rejection]] = {}
        for table in self.waiting.values():
            for rejection in table.rejected.values():
                made_with = tuple(sorted(table.judged_by[rejection.key].items()))
                groups.setdefault(made_with, []).append(rejection)
        return [(dict(made_with), rejected) for made_with, rejected in sorted(groups.items())]


def read_committed(
    cache: Place, form: str, recipes: Mapping[str, Recipe], earlier: Mapping[str, Recipe] | None = None
) -> dict[str, TableState]:
    """What is committed of each table where a cache of the form `form` keeps it.

    In tars, rows count that were written into tars of the recipes `earlier`, too, if the table's own recipe is the
    same. Every commit record and side file is read: ask once, and hand on what came. Raises CacheCorruptError.
    """
    if form == "zarr":
        return {name: table_state(cache, recipe) for name, recipe in recipes.items()}
    parts: dict[str, list[StoredRows]] = {name: [] for name in recipes}
    rejections: list[Rejection] = []
    provenance: dict[str, str] = {}
    judged_by: dict[str, Mapping[str, str]] = {}
    for tables in [earlier, recipes] if earlier and dict(earlier) != dict(recipes) else [recipes]:
        same = [name for name in tables if name in recipes and tables[name] == recipes[name]]
        for recipe in shard_recipes(form, tables):
            folder = cache / recipe.directory
            commits = read_commits(folder, recipe)
            for name in same:
                parts[name].append(stored_rows(folder, commits, tables[name], name))
            if len(same) == len(tables):
                rejections += [rejection for commit in commits for rejection in commit.rejected]
                judged_by |= judges(commits)
            if tables is recipes:
                provenance |= provenance_of(commits)
    return {
        name: TableState(
            recipe=recipe,
            stored=merged_rows(recipe, parts[name]),
            rejections=tuple(rejections),
            provenance=provenance,
            judged_by=judged_by,
        )
        for name, recipe in recipes.items()
    }


def record_rejections(
    folder: Place, recipe: Recipe, rejected: Sequence[Rejection], provenance: Mapping[str, str]
) -> None:
    """Commit, as a shard without rows, the rejections by this decoder that commit records in `folder` lack."""
    commits = read_commits(folder, recipe)
    alike = [c for c in commits if all(c.provenance.get(name) == provenance.get(name) for name in DECODER)]
    known = {rejection.key: rejection for commit in alike for rejection in commit.rejected}
    new = {rejection.key: rejection for rejection in rejected if rejection != known.get(rejection.key)}
    if new:
        add_rejections(folder, recipe, [new[key] for key in sorted(new)], provenance)


def add_rejections(folder: Place, recipe: Recipe, rejected: Sequence[Rejection], provenance: Mapping[str, str]) -> None:
    """Commit rejections, as a shard without rows, under the first number that nobody has."""
    make_folder(folder)
    number = next_shard(read_commits(folder, recipe))
    while record_commit(folder, f"{number:05d}", recipe, rejected=rejected, provenance=provenance).rejected != tuple(
        rejected
    ):
        number += 1


def recorded_sizes(cache: Place, recipes: Mapping[str, Recipe]) -> Iterator[np.ndarray]:
    """Of `SIZES`: the pictures that were encoded into tables of `recipes`, as decoded; one may come several times."""
    for recipe in recipes.values():
        if kind_of(recipe.table).per == "image":
            folder = cache / recipe.directory
            yield from (_read_sizes(folder, commit) for commit in read_commits(folder, recipe))


def _read_sizes(folder: Place, commit: Commit) -> np.ndarray:
    """Of `SIZES`: the pictures behind a shard's rows; none where that is not recorded, or not any more.

    They can be found again from the pictures, so what is damaged of them is passed over here, as it is by nothing that
    verifies a cache.
    """
    nothing = np.empty(0, SIZES)
    record = next((file for file in commit.files if file.path == sizes_name(commit.stem)), None)
    if record is None:
        return nothing
    path = folder / record.path
    try:
        content = path.read_bytes()
        rows = npy_of(content, path.name)
    except (OSError, ValueError):
        return nothing
    if crc32c(content) != record.crc32c or rows.dtype != SIZES or rows.ndim != 1:
        return nothing
    return rows[(rows["width"] > 0) & (rows["height"] > 0)]


def check_target(folder: Place) -> None:
    """Refuse, by CacheMismatchError, to build a cache in a folder that is something else."""
    if isinstance(folder, Path):
        check_local(folder)
    if folder.is_file():
        raise CacheMismatchError(f"{folder} is a file; expected a folder for the cache, or a path where nothing is")
    # Looked at once: other builders may begin, or end, at this moment.
    found: list[Place] = list(folder.glob("*"))
    if links := [entry.name for entry in found if entry.is_symlink()]:
        raise CacheMismatchError(
            f"{folder} holds the link {min(links)}, through which a build would write elsewhere; "
            "expected a folder that owns its files; put what it leads to in its place"
        )
    names = {entry.name for entry in found}
    foreign = sorted(name for name in names if not name.startswith("."))
    if foreign and names.isdisjoint((MANIFEST, "plans")) and not any(map(SHARD_FOLDER.fullmatch, foreign)):
        raise CacheMismatchError(
            f"{folder} is not empty and not a cache (found {', '.join(foreign[:3])}); "
            "give an empty or new folder for the cache"
        )
    if MANIFEST not in names:
        check_outside(folder)


def check_outside(folder: Place) -> None:
    """Refuse, by CacheMismatchError, to begin a cache inside of another one, where it would be taken for a part of it.

    On a disk all folders above are looked at, in a bucket the next one: each would be a request.
    """
    above = Path(os.path.realpath(folder)).parents if isinstance(folder, Path) else [folder.parent]
    for outer in above:
        if outer != folder and _is_cache(outer):
            raise CacheMismatchError(
                f"{folder} is inside of the cache {outer}, which owns all that is in its folder; expected a place "
                "beside it; give another folder for the new cache"
            )


def _is_cache(folder: Place) -> bool:
    try:
        # Where there is none, its reader would look through the folders around for what was meant.
        if isinstance(folder, Path) and not (folder / MANIFEST).is_file():
            return False
        read_manifest(folder)
    except (KcacheError, OSError):  # none, that of another program, or one that this account must not see
        return False
    return True
