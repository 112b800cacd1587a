"""A finished cache taken apart again: all that another cache of the same rows can be made of."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cached_property

import numpy as np

from kcache.build.claims import TURN
from kcache.build.committed import check_outside, read_committed, record_rejections
from kcache.build.joined_tars import RESERVED_KEY, TarWriter, plan_tars, shard_recipes, tar_keys, tar_recipe
from kcache.build.plan import Plan, PlannedShard, TablePlan, plan_table
from kcache.config import CountReport
from kcache.config.shapes import ShapeSet
from kcache.disk.readers import Reading
from kcache.encoders.recipes import default_rows_per_shard
from kcache.errors import CacheCorruptError, CacheMismatchError
from kcache.places import Place
from kcache.places.effects import make_folder
from kcache.places.fetching import listed
from kcache.stopping import stop_here
from kcache.store.cache import Cache
from kcache.store.digests import pack_keys
from kcache.store.formats.side_files import size_rows
from kcache.store.index import StoredRows, TableState, table_state
from kcache.store.manifest import MANIFEST, Manifest, read_manifest, shapes_to_note
from kcache.store.recipe import SAMPLES, TEXT, Recipe, kind_of
from kcache.store.rows import FieldFiles, field_files, gather
from kcache.store.samples import Refusal, Sample, read_cut, read_refused, sample_list
from kcache.store.shaped.wants import Wants
from kcache.store.shards import RowBlock, commit_shard

_DERIVED = (MANIFEST, "samples-*.parquet", "index-*", "rejected.jsonl", "README.md", ".tmp-*", "plans", TURN)
"""What a cache holds beside its shards, while it is made, too."""


@dataclass(frozen=True, kw_only=True)
class CacheContents:
    """What is in a finished cache, by key."""

    folder: Place
    manifest: Manifest
    samples: Sequence[Sample]
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
    def sizes(self) -> dict[bytes, tuple[int, int]]:
        """Width and height of the samples' pictures, by key."""
        return {sample.image_key: (sample.width, sample.height) for sample in self.samples}

    def of_tables(self, names: Collection[str], sets: Sequence[ShapeSet]) -> "CacheContents":
        """The same samples with the rows of some tables only, in which pictures have the shapes of these sets."""
        tables = {name: entry for name, entry in self.manifest.tables.items() if name in names}
        roles: set[str] = {kind_of(name).role for name in tables}
        shapes = shapes_to_note(sets if any(kind_of(name).sided for name in tables) else ())
        models = {role: model for role, model in self.manifest.models.items() if role in roles}
        return replace(
            self,
            manifest=replace(self.manifest, tables=tables, models=models, shapes=shapes),
            tables={name: state for name, state in self.tables.items() if name in tables},
            cut=self.cut if TEXT.name in tables else {},
        )

    @cached_property
    def _by_tar_key(self) -> dict[bytes, Sample]:
        return dict(zip(tar_keys(self.samples), self.samples, strict=True))

    def planned(self, keys: Sequence[bytes]) -> dict[bytes, Sample]:
        """The samples with these keys in tars."""
        return {key: self._by_tar_key[key] for key in keys if key in self._by_tar_key}


def read_contents(cache: Place) -> CacheContents:
    """Everything in the cache at `cache` but the rows themselves; raises the errors of `Cache.open`."""
    reading, opened = Reading(cache), Cache.open(cache)
    recipes, form = opened.recipes, opened.manifest.format
    return CacheContents(
        folder=cache,
        manifest=opened.manifest,
        samples=sample_list(opened.samples),
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


def find_all(stored: StoredRows, keys: Sequence[bytes], recipe: Recipe) -> np.ndarray:
    """The index entries of `keys`, in their order; raises CacheCorruptError when one is not stored."""
    positions = stored.find(keys)
    if (positions < 0).any():
        raise CacheCorruptError(
            f"{int((positions < 0).sum())} rows of {recipe.table} that samples use are in no shard of "
            f"{recipe.directory}; build the cache again with its source to encode them anew"
        )
    return stored.entries[positions]


class RowCopier:
    """Writes rows that stand somewhere in `cache` into new zarr shards, checking each on the way."""

    def __init__(
        self, cache: Place, recipe: Recipe, stored: StoredRows, sizes: Mapping[bytes, tuple[int, int]]
    ) -> None:
        """`stored` are the rows of `recipe` in `cache`, `sizes` width and height of pictures by key."""
        self._recipe = recipe
        self._sizes = sizes if kind_of(recipe.table).per == "image" else {}
        self._stored = stored
        dtype = np.dtype(recipe.stored_dtype)
        self._files: dict[str, FieldFiles] = {
            field.name: field_files(cache, field, dtype, stored.shards) for field in recipe.fields
        }

    def write(self, folder: Place, shard: PlannedShard, provenance: Mapping[str, str]) -> None:
        """Commit `shard` in the table's `folder`; raises CacheCorruptError for rows that are not what was committed."""
        entries = find_all(self._stored, shard.keys, self._recipe)
        arrays, offsets = {}, None
        for field in self._recipe.fields:
            arrays[field.name], bounds = gather(self._files[field.name], entries, np.empty)
            offsets = offsets if bounds is None else bounds
        make_folder(folder)
        sizes = size_rows(shard.keys, self._sizes) if self._sizes else None
        block = RowBlock(keys=pack_keys(shard.keys), arrays=arrays, offsets=offsets, sizes=sizes)
        commit_shard(folder, shard.name, self._recipe, block, provenance=provenance)


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
    """Writes what is in a cache into the folder of another one, in either form, shard by shard."""

    def __init__(self, contents: CacheContents, target: Place, form: str) -> None:
        """`form` is that of the cache at `target`, "zarr" or "webdataset"."""
        self._contents = contents
        self._target = target
        self._form = form

    @cached_property
    def recipes(self) -> list[Recipe]:
        """Those that the shards are of."""
        return shard_recipes(self._form, self._contents.recipes)

    def wanted(self, recipe: Recipe) -> Sequence[bytes]:
        """The keys of all that shards of `recipe` hold in the end."""
        contents = self._contents
        if not recipe.of_tars:
            return contents.wants.wanted(recipe.table, contents.samples)
        return tar_keys(contents.samples) if recipe.table == SAMPLES else [RESERVED_KEY]

    def plan(self, rows_per_shard: int | None = None) -> Plan:
        """What the target lacks, cut into shards; `rows_per_shard` None takes what makes about 256 MB."""
        contents, tables = self._contents, []
        if self._form != "zarr":
            rows = rows_per_shard or default_rows_per_shard(tar_recipe(SAMPLES, contents.recipes))
            return plan_tars(self._target, contents.recipes, contents.samples, rows)
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

    def write(
        self, recipe: Recipe, shards: Iterable[PlannedShard], kept: Callable[[PlannedShard], bool] = lambda _: True
    ) -> None:
        """Commit planned shards of `recipe`, but those that `kept` denies; raises CacheCorruptError."""
        contents = self._contents
        if recipe.of_tars:
            writer = TarWriter(self._target, contents.tables, contents.provenance, contents.folder, contents.wants)
            writer.write(recipe.table, shards, contents.planned, kept)
            return
        rows = RowCopier(contents.folder, recipe, contents.tables[recipe.table].stored, contents.sizes)
        for shard in shards:
            if kept(shard):
                rows.write(self._target / recipe.directory, shard, contents.provenance)

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
    entries = state.stored.entries[state.stored.find(keys)]
    return sum(int(entries[field.name]["length"].sum(dtype=np.int64)) for field in state.recipe.fields)
