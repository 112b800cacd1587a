"""Garbage: what stands in a cache's folder and is no part of it any more, found and removed.

Building never changes or removes a committed shard, so edited inputs, other recipes and killed builders leave things
behind. A shard goes when no row of it is used, a tar when no sample of it is. `compact` first writes the used rows of
the other shards again, without the unused ones between them.

Nobody holds a bucket, so there only what is older than a day goes, and only once the manifest is: who opened the cache
by an earlier one has ended by then. What a cache stops using there goes when it is collected a day later.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch

import numpy as np

from kcache.build.claims import alone
from kcache.build.committed import add_rejections
from kcache.build.finish import finish_cache
from kcache.build.joined_tars import committed_tar_keys, shard_recipes
from kcache.build.plan import TablePlan, open_plan
from kcache.config import CountReport, Say, unheard
from kcache.encoders.recipes import default_rows_per_shard
from kcache.errors import CacheCorruptError, CacheIncompleteError
from kcache.places import Place, place_of
from kcache.places.conditional import check_store
from kcache.places.effects import remove
from kcache.places.fetching import listed
from kcache.places.holds import knows_readers
from kcache.places.inventory import Inventory
from kcache.stopping import stop_here, stopped_when_safe
from kcache.store.digests import Keys, Positions
from kcache.store.index import TableState, merged_rows, stored_rows
from kcache.store.manifest import MANIFEST, SHARD_NAME, read_manifest, shard_number
from kcache.store.recipe import RESERVED, SHARD_FOLDER, Recipe
from kcache.store.shards import Commit, next_shard, read_commits
from kcache.upkeep.copying import CacheContents, read_contents, with_progress
from kcache.upkeep.portions import find_all

_DERIVED = ("samples-*.parquet", "index-*", "plans", ".tmp-*")
_DAY = 86_400.0
"""Seconds for which anything stays in a bucket."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Garbage:
    """What was removed, or would be."""

    paths: tuple[str, ...]
    """Files and folders, from the cache's folder."""
    bytes: int
    """Disk space given back: files that are also in another cache, by hard links, count nothing."""
    unused_bytes: int
    """About what the shards that stay hold of rows that no sample uses: `compact` gives that back too."""
    younger: int
    """Files and folders of a bucket that stay, as they or the manifest are not older than a day."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveShard:
    """A shard that stays, and the keys of its rows (joined keys of its samples, in a tar) that are in use."""

    commit: Commit
    keys: Keys

    @property
    def unused_bytes(self) -> int:
        """About what the rest of it takes, its rows being of about the same size."""
        return round(self.commit.bytes * (1 - len(self.keys) / self.commit.rows))


def collect_garbage(
    cache: str | Place,
    *,
    compact: bool = False,
    dry_run: bool = False,
    report: CountReport | None = None,
    say: Say = unheard,
) -> Garbage:
    """Remove from the cache at `cache` what is no part of it; with `dry_run` only say what that is.

    Samples, fingerprint and rows stay what they are, and building again has nothing to do. `report` is
    called with the table that `compact` writes again, or "removed", how many rows or paths are done, and their number,
    `say` what is worth a line: builders that plan or assemble are waited for, as they wait for this.
    Raises CacheIncompleteError while a build is unfinished, CacheBusyError while one runs or anyone reads the cache,
    and the errors of `Cache.open`.
    """
    folder = place_of(cache)
    read_manifest(folder)  # says what is there instead of a cache
    if dry_run:
        contents = _finished(folder)
        return find_garbage(contents, live_shards(contents))
    check_store(folder)
    with stopped_when_safe(), alone(folder, say):
        contents = _finished(folder)
        if compact:
            _rewrite_mixed(contents, report)
            contents = read_contents(folder)
        live = live_shards(contents)
        _forget(contents, live)
        contents = read_contents(folder)
        garbage = find_garbage(contents, live)
        for done, path in enumerate(garbage.paths, start=1):
            stop_here()
            remove(folder / path)
            if report is not None:
                report("removed", done, len(garbage.paths))
        stop_here()
    return garbage


def _finished(folder: Place) -> CacheContents:
    if open_plan(folder) is not None:
        raise CacheIncompleteError(
            f"{folder} has an unfinished build, whose rows would be taken for garbage; expected none; "
            f"finish it with `kcache cache-build SOURCE {folder}`"
        )
    return read_contents(folder)


def live_shards(contents: CacheContents) -> dict[str, list[LiveShard]]:
    """The shards that stay, by the name of their folder."""
    form, recipes = contents.manifest.format, contents.recipes
    live = {}
    for recipe in shard_recipes(form, recipes):
        folder = contents.folder / recipe.directory
        commits = [commit for commit in read_commits(folder, recipe) if commit.data is not None]
        used = _used_samples(contents, recipe, commits) if recipe.of_tars else _used_rows(contents, recipe)
        live[recipe.directory] = [
            LiveShard(commit=commit, keys=used[commit.name]) for commit in commits if commit.name in used
        ]
    return live


def _used_rows(contents: CacheContents, recipe: Recipe) -> dict[str, Keys]:
    """By shard, the keys of the table's rows that samples use."""
    stored = contents.tables[recipe.table].stored
    keys = contents.wants.wanted(recipe.table, contents.samples).unique()
    standing = _by_shard(keys, stored.entries["shard"][find_all(stored, keys, recipe)])
    return {stored.shards[shard].name: own for shard, own in standing.items()}


def _used_samples(contents: CacheContents, recipe: Recipe, commits: Sequence[Commit]) -> dict[str, Keys]:
    """By tar, the joined keys of the samples that are as they are now; of several copies the latest."""
    folder = contents.folder / recipe.directory
    inside = [Keys.of(committed_tar_keys(folder, commit)) for commit in commits]
    packed = Keys(np.concatenate([Keys.of(()).packed, *(keys.packed for keys in inside)]))
    wanted = packed.unique() if recipe.table == RESERVED else contents.tar_keys
    tars = Positions(packed, np.repeat(np.arange(len(commits)), list(map(len, inside)))).find(wanted)
    if (tars < 0).any():
        raise CacheCorruptError(
            f"{folder} lacks a sample that the manifest counts; build the cache again with its source to pack it"
        )
    return {commits[tar].name: own for tar, own in _by_shard(wanted, tars).items()}


def _by_shard(keys: Keys, shards: np.ndarray) -> dict[int, Keys]:
    """The `keys` of each shard, `shards` (n,) saying which one each is in."""
    order = np.argsort(shards, kind="stable")
    numbers, starts = np.unique(shards[order], return_index=True)
    return dict(zip(numbers.tolist(), map(Keys, np.split(keys.packed[order], starts)[1:]), strict=True))


def _forget(contents: CacheContents, live: Mapping[str, list[LiveShard]]) -> None:
    """Write the cache anew without the shards that are not `live`; what they rejected stays known."""
    folder, manifest = contents.folder, contents.manifest
    for recipe in shard_recipes(manifest.format, contents.recipes):
        kept = {shard.commit.name for shard in live[recipe.directory]}
        commits = read_commits(folder / recipe.directory, recipe)
        dropped = [commit for commit in commits if commit.data is not None and commit.name not in kept]
        known = {rejection.key for commit in commits if commit not in dropped for rejection in commit.rejected}
        for commit in dropped:  # each with what it was judged by
            if lost := [r for r in commit.rejected if r.key not in known]:
                add_rejections(folder / recipe.directory, recipe, lost, commit.provenance)
    states = _live_states(contents, live)
    new = finish_cache(
        folder,
        contents.samples,
        contents.refused,
        states,
        manifest.models,
        manifest.format,
        contents.cut,
        contents.wants,
    )
    if knows_readers(folder):
        for name in {manifest.samples_file, manifest.index_folder} - {new.samples_file, new.index_folder}:
            remove(folder / name)


def _live_states(contents: CacheContents, live: Mapping[str, list[LiveShard]]) -> dict[str, TableState]:
    states = {}
    for name, recipe in contents.recipes.items():
        parts = []
        for kept in shard_recipes(contents.manifest.format, contents.recipes):
            if kept.of_tars or kept == recipe:
                commits = [shard.commit for shard in live[kept.directory]]
                part = name if kept.of_tars else ""
                parts.append(stored_rows(contents.folder / kept.directory, commits, recipe, part))
        states[name] = replace(contents.tables[name], stored=merged_rows(recipe, parts), rejections=())
    return states


def find_garbage(contents: CacheContents, live: Mapping[str, list[LiveShard]]) -> Garbage:
    """What in the cache's folder is neither of its manifest nor one of the `live` shards; unknown files are left."""
    folder, manifest = contents.folder, contents.manifest
    paths: list[str] = []
    for name, _ in sorted(listed(folder)):
        if name in live:
            recipe = next(r for r in shard_recipes(manifest.format, contents.recipes) if r.directory == name)
            paths += _dead_files(folder / name, recipe, live[name])
        elif name in (manifest.samples_file, manifest.index_folder):
            continue
        elif any(fnmatch(name, pattern) for pattern in _DERIVED) or SHARD_FOLDER.fullmatch(name):
            paths.append(name)
    found = Inventory(folder)
    paths = [path for path in paths if folder / path in found]
    old = [p for p in paths if found.is_older(folder / MANIFEST, _DAY) and found.is_older(folder / p, _DAY)]
    return Garbage(
        paths=tuple(old),
        bytes=sum(found.freed(folder / path) for path in old),
        unused_bytes=sum(shard.unused_bytes for shards in live.values() for shard in shards),
        younger=len(paths) - len(old),
    )


def _dead_files(folder: Place, recipe: Recipe, live: Sequence[LiveShard]) -> list[str]:
    """What in a folder of shards is of none that stays, commit records first; records of rejections stay."""
    names = [name for name, _ in listed(folder)]  # before the records: all that is committed of these is known then
    rejections = [commit for commit in read_commits(folder, recipe) if commit.data is None]
    records = {f"{commit.name}.json" for commit in [*rejections, *(shard.commit for shard in live)]}
    stems = {shard.commit.stem for shard in live}
    dead = [
        name
        for name in names
        if name.startswith(".tmp-")
        or (SHARD_NAME.fullmatch(shard_number(name)) and name not in records and name.partition(".")[0] not in stems)
    ]
    return [f"{folder.name}/{name}" for name in sorted(dead, key=lambda name: (not name.endswith(".json"), name))]


def _rewrite_mixed(contents: CacheContents, report: CountReport | None) -> None:
    """Commit new shards with the used rows of all shards that have unused ones too: the latest of equal rows counts."""
    live = live_shards(contents)
    for recipe in shard_recipes(contents.manifest.format, contents.recipes):
        folder = contents.folder / recipe.directory
        mixed = [shard for shard in live[recipe.directory] if len(shard.keys) < shard.commit.rows]
        if not mixed or recipe.table == RESERVED:
            continue
        keys = Keys(np.concatenate([shard.keys.packed for shard in mixed]))
        wanted = contents.tar_keys if recipe.of_tars else contents.wants.wanted(recipe.table, contents.samples)
        plan = TablePlan(
            recipe=recipe,
            rows_per_shard=default_rows_per_shard(*(contents.recipes.values() if recipe.of_tars else [recipe])),
            first_shard=next_shard(read_commits(folder, recipe)),
            keys=wanted[wanted.among(keys)].unique(),
        )
        for planned in with_progress(plan, recipe.table, report):
            contents.portion(contents.folder, recipe, planned).commit()
