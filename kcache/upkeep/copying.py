"""A finished cache taken apart again: all that another cache of the same rows can be made of."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cached_property

import numpy as np

from kcache.build.claims import TURN
from kcache.build.committed import check_outside, read_committed, record_rejections
from kcache.build.joined_tars import RESERVED_KEY, plan_tars, shard_recipes, tar_keys, tar_recipe
from kcache.build.plan import Plan, PlannedShard, TablePlan, plan_table
from kcache.config import CountReport
from kcache.config.shapes import ShapeSet
from kcache.disk.readers import Reading
from kcache.encoders.recipes import default_rows_per_shard
from kcache.errors import CacheMismatchError
from kcache.places import Place
from kcache.places.fetching import listed
from kcache.stopping import stop_here
from kcache.store.cache import Cache
from kcache.store.digests import Keys, Positions
from kcache.store.formats.columns import Samples
from kcache.store.formats.sample_extras import with_controls
from kcache.store.index import TableState, table_state
from kcache.store.manifest import MANIFEST, Manifest, read_manifest, shapes_to_note
from kcache.store.recipe import SAMPLES, TEXT, Recipe, controls_of, kind_of
from kcache.store.samples import Refusal, columns_of, read_cut, read_refused
from kcache.store.samples import samples_digest as digest_of
from kcache.store.shaped.wants import Wants
from kcache.upkeep.portions import PictureSizes, Portion, of_rows, of_samples

_DERIVED = (MANIFEST, "samples-*.parquet", "index-*", "rejected.jsonl", "README.md", ".tmp-*", "plans", TURN)
"""What a cache holds beside its shards, while it is made, too."""


@dataclass(frozen=True, kw_only=True)
class CacheContents:
    """What is in a finished cache, by key."""

    folder: Place
    manifest: Manifest
    samples: Samples
    refused: Sequence[Refusal]
    tables: Mapping[str, TableState]
    cut: Mapping[bytes, int]
    """Tokens of captions that were cut off, by key of the caption."""
    reading: Reading
    """Keeps what is to be copied from being removed."""

    @property
    def provenance(self) -> dict[str, str]:
        """What the rows were made with."""
        return {name: value for state in self.tables.values() for name, value in state.provenance.items()}

    @property
    def recipes(self) -> dict[str, Recipe]:
        """The recipe of each table."""
        return {name: entry.recipe for name, entry in self.manifest.tables.items()}

    @property
    def wants(self) -> Wants:
        """Which rows the tables have of the samples."""
        return self.manifest.wants

    @cached_property
    def sizes(self) -> PictureSizes:
        """Width and height of the samples' pictures."""
        return PictureSizes(self.samples)

    @cached_property
    def tar_keys(self) -> Keys:
        """The key of each sample in tars."""
        return Keys.of(tar_keys(self.samples, self.wants))

    @cached_property
    def _by_tar_key(self) -> Positions:
        return Positions(self.tar_keys)

    def of_tables(self, names: Collection[str], sets: Sequence[ShapeSet]) -> "CacheContents":
        """The same samples with the rows of some tables only, in which pictures have the shapes of these sets."""
        tables = {name: entry for name, entry in self.manifest.tables.items() if name in names}
        roles: set[str] = {kind_of(name).role for name in tables}
        samples, digest, had = self.samples, self.manifest.samples_digest, self.wants.controls
        if (controls := controls_of(tables)) != had:
            samples = with_controls(samples, [had.index(name) for name in controls])
            digest = digest_of(samples)
        shapes = shapes_to_note(sets if any(kind_of(name).sided for name in tables) else ())
        models = {role: model for role, model in self.manifest.models.items() if role in roles}
        return replace(
            self,
            manifest=replace(self.manifest, tables=tables, models=models, shapes=shapes, samples_digest=digest),
            samples=samples,
            tables={name: state for name, state in self.tables.items() if name in tables},
            cut=self.cut if TEXT.name in tables else {},
        )

    def portion(self, target: Place, recipe: Recipe, shard: PlannedShard) -> Portion:
        """What a planned shard of `recipe` is copied from, into the folder that it gets in the cache at `target`.

        Raises CacheCorruptError for rows that samples use and that are nowhere.
        """
        if recipe.of_tars:
            numbers = self._by_tar_key.find(shard.keys)
            samples = self.samples.at(numbers[numbers >= 0])
            return of_samples(self.folder, target, self.tables, recipe, shard, samples, self.provenance, self.wants)
        state = self.tables[recipe.table]
        return of_rows(self.folder, target, recipe, state.stored, shard, self.sizes, self.provenance, self.wants)


def read_contents(cache: Place) -> CacheContents:
    """Everything in the cache at `cache` but the rows themselves; raises the errors of `Cache.open`."""
    reading, opened = Reading(cache), Cache.open(cache)
    recipes, form = opened.recipes, opened.manifest.format
    return CacheContents(
        folder=cache,
        manifest=opened.manifest,
        samples=columns_of(cache, opened.manifest),
        refused=list(read_refused(cache)),
        tables=read_committed(cache, form, recipes),
        cut=read_cut(cache, opened.manifest),
        reading=reading,
    )


def check_new_cache(target: Place, form: str, recipes: Mapping[str, Recipe], samples_digest: str) -> None:
    """Refuse a folder that holds anything but this very cache, finished or interrupted; raises CacheMismatchError."""
    if target.is_file():
        raise CacheMismatchError(f"{target} is a file; expected a path where nothing is, for the new cache")
    if (target / MANIFEST).exists():
        found = read_manifest(target)
        if (found.format, found.samples_digest) != (form, samples_digest):
            raise CacheMismatchError(
                f"{target} is a {found.format} cache of {found.samples:,} other samples already; "
                "give a new or empty folder for the new cache"
            )
    else:
        check_outside(target)
    own = {recipe.directory for recipe in shard_recipes(form, recipes)}
    found_names = [name for name, _ in listed(target)] if target.is_dir() else []
    foreign = sorted(name for name in found_names if name not in own and not any(fnmatch(name, p) for p in _DERIVED))
    if foreign:
        raise CacheMismatchError(
            f"{target} is not empty (found {', '.join(foreign[:3])}); give a new or empty folder for the new cache"
        )


def with_progress(plan: TablePlan, name: str, report: CountReport | None) -> Iterator[PlannedShard]:
    """The shards of a plan, one after another; when the next is asked for, `report` is told that the last is done."""
    done = 0
    for shard in plan.shards:
        yield shard
        stop_here()
        done += len(shard.keys)
        if report is not None:
            report(name, done, len(plan.keys))


class CacheCopier:
    """Plans what is in a cache for the folder of another one, in either form, and says what each shard is made of."""

    def __init__(self, contents: CacheContents, target: Place, form: str) -> None:
        """`form` is that of the cache at `target`, "zarr" or "webdataset"."""
        self._contents = contents
        self._target = target
        self._form = form

    @cached_property
    def recipes(self) -> list[Recipe]:
        """Those that the shards are of."""
        return shard_recipes(self._form, self._contents.recipes)

    def wanted(self, recipe: Recipe) -> Keys:
        """The keys of all that shards of `recipe` hold in the end."""
        if not recipe.of_tars:
            return self._contents.wants.wanted(recipe.table, self._contents.samples)
        return self._contents.tar_keys if recipe.table == SAMPLES else Keys.of([RESERVED_KEY])

    def plan(self, rows_per_shard: int | None = None) -> Plan:
        """What the target lacks, cut into shards; `rows_per_shard` None takes what makes about 256 MB."""
        contents, tables = self._contents, []
        if self._form != "zarr":
            rows = rows_per_shard or default_rows_per_shard(*contents.recipes.values())
            return plan_tars(self._target, contents.recipes, contents.samples, rows, contents.wants)
        for recipe in self.recipes:
            there, rows = table_state(self._target, recipe), rows_per_shard or default_rows_per_shard(recipe)
            wanted, first = self.wanted(recipe), there.next_shard
            tables.append(plan_table(recipe, wanted, there.stored.known, (), rows_per_shard=rows, first_shard=first))
        return Plan(tables=tuple(tables))

    def size(self, shards: Iterable[tuple[TablePlan, Sequence[PlannedShard]]]) -> int:
        """Bytes of the rows in planned shards of some tables; of tars as many as their share of the samples has."""
        contents, size, samples = self._contents, 0, 0
        for table, own in shards:
            if not table.recipe.of_tars:
                size += sum(_size(contents.tables[table.recipe.table], shard.keys) for shard in own)
            elif table.recipe.table == SAMPLES:
                samples += sum(len(shard.keys) for shard in own)
        if samples:
            used = sum(
                _size(state, contents.wants.keys(name, contents.samples)) for name, state in contents.tables.items()
            )
            size += used * samples // len(contents.samples)
        return size

    def portion(self, recipe: Recipe, shard: PlannedShard) -> Portion:
        """What a planned shard of `recipe` is copied from; raises CacheCorruptError."""
        return self._contents.portion(self._target, recipe, shard)

    def record_rejected(self) -> None:
        """Commit what the cache has rejected; for when all shards are committed, as it takes the numbers after them."""
        contents = self._contents
        if self._form == "zarr":
            for state in contents.tables.values():
                folder = self._target / state.recipe.directory
                record_rejections(folder, state.recipe, list(state.rejected.values()), contents.provenance)
            return
        recipe = tar_recipe(SAMPLES, contents.recipes)
        rejected = [rejection for state in contents.tables.values() for rejection in state.rejected.values()]
        record_rejections(self._target / recipe.directory, recipe, rejected, contents.provenance)


def _size(state: TableState, keys: Sequence[bytes]) -> int:
    """Bytes of the rows behind `keys`, those that are stored."""
    positions = state.stored.find(keys)
    return sum(
        int(state.stored.entries[field.name]["length"][positions].sum(dtype=np.int64)) for field in state.recipe.fields
    )
