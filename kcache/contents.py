"""A finished cache taken apart again: all that another cache of the same rows can be made of."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

import numpy as np

from kcache.assemble import Candidate, TableState, table_state
from kcache.cache import Cache
from kcache.durable import remove_temporary
from kcache.errors import CacheCorruptError, CacheMismatchError
from kcache.index import StoredRows
from kcache.joining import RESERVED, SAMPLES, joined_keys, joined_recipe, packed_states
from kcache.manifest import MANIFEST, Manifest, read_manifest
from kcache.plan import PlannedShard, TablePlan
from kcache.recipe import Recipe
from kcache.rows import FieldFiles, field_files, gather
from kcache.samples import Sample
from kcache.shards import RowBlock, commit_shard, read_commits
from kcache.sources import Refusal
from kcache.stopping import stop_here

__all__ = [
    "Contents",
    "Report",
    "RowCopier",
    "check_new_cache",
    "counted",
    "find_all",
    "read_contents",
    "read_refused",
    "shard_recipes",
    "sweep",
    "table_states",
]

Report = Callable[[str, int, int], None]
"""Called with what is being written, how many rows or samples of it are done, and their number."""

_DERIVED = (MANIFEST, "samples-*.parquet", "index-*", "rejected.jsonl", "README.md", ".tmp-*")
"""What a cache holds beside its shards."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What is in a finished cache, by key."""

    folder: Path
    manifest: Manifest
    samples: Sequence[Sample]
    refused: Sequence[Refusal]
    tables: Mapping[str, TableState]
    provenance: Mapping[str, str]
    """What the rows were made with."""

    @property
    def recipes(self) -> dict[str, Recipe]:
        """The recipe of each table."""
        return {name: entry.recipe for name, entry in self.manifest.tables.items()}

    @property
    def stored(self) -> dict[str, StoredRows]:
        """The committed rows of each table."""
        return {name: state.stored for name, state in self.tables.items()}

    @property
    def candidates(self) -> list[Candidate]:
        """The samples as what a source would offer."""
        return [
            Candidate(position=i, name=s.name, image_key=s.image_key, captions=s.captions, caption_keys=s.caption_keys)
            for i, s in enumerate(self.samples)
        ]

    @cached_property
    def by_joined_key(self) -> dict[bytes, tuple[str, Candidate]]:
        """Id and sample by the key that the sample has in tars."""
        candidates = self.candidates
        named = zip([sample.id for sample in self.samples], candidates, strict=True)
        return dict(zip(joined_keys(candidates), named, strict=True))

    @property
    def sizes(self) -> dict[bytes, tuple[int, int]]:
        """Width and height in pixels by image key."""
        return {sample.image_key: (sample.width, sample.height) for sample in self.samples}


def read_contents(cache: Path) -> Contents:
    """Everything in the cache at `cache` but the rows themselves; raises the errors of `Cache.open`."""
    opened = Cache.open(cache)
    recipes, form = opened.recipes, opened.manifest.format
    commits = [
        commit for recipe in shard_recipes(form, recipes) for commit in read_commits(cache / recipe.directory, recipe)
    ]
    columns = opened.samples.to_pydict()
    samples = [
        Sample(**{**dict(zip(columns, row, strict=True)), "captions": tuple(row[3]), "caption_keys": tuple(row[4])})
        for row in zip(*columns.values(), strict=True)
    ]
    return Contents(
        folder=cache,
        manifest=opened.manifest,
        samples=samples,
        refused=list(read_refused(cache)),
        tables=table_states(cache, form, recipes),
        provenance={name: value for commit in commits for name, value in commit.provenance.items()},
    )


def shard_recipes(form: str, recipes: Mapping[str, Recipe]) -> list[Recipe]:
    """The recipes that a cache's shard folders are named after: the tables' own, or those of the joined tars."""
    if form == "zarr":
        return list(recipes.values())
    return [joined_recipe(kind, recipes) for kind in (RESERVED, SAMPLES)]


def table_states(cache: Path, form: str, recipes: Mapping[str, Recipe]) -> dict[str, TableState]:
    """What is committed of each table of a cache of the form `form`."""
    if form == "zarr":
        return {name: table_state(cache, recipe) for name, recipe in recipes.items()}
    return packed_states(cache, recipes, recipes)


def read_refused(cache: Path) -> Iterator[Refusal]:
    """The inputs that the builds of a cache rejected, one by one; raises CacheCorruptError."""
    path = cache / "rejected.jsonl"
    if not path.exists():
        return
    try:
        with path.open(encoding="utf-8") as lines:
            yield from (Refusal(**json.loads(line)) for line in lines)
    except (OSError, ValueError, TypeError) as error:
        raise CacheCorruptError(f"{path} cannot be read ({error}); build the cache again to write it anew") from error


def check_new_cache(target: Path, form: str, recipes: Mapping[str, Recipe], samples_digest: str) -> None:
    """Refuse a folder that holds anything but this very cache, finished or interrupted; raises CacheMismatchError."""
    if target.exists() and not target.is_dir():
        raise CacheMismatchError(f"{target} is a file; expected a path where nothing is, for the new cache")
    if (target / MANIFEST).exists():
        found = read_manifest(target)
        if (found.format, found.samples_digest) != (form, samples_digest):
            raise CacheMismatchError(
                f"{target} is a {found.format} cache of {found.samples:,} other samples already; "
                "give a new or empty folder for the new cache"
            )
    own = {recipe.directory for recipe in shard_recipes(form, recipes)}
    found_names = [entry.name for entry in target.iterdir()] if target.exists() else []
    foreign = sorted(name for name in found_names if name not in own and not any(fnmatch(name, p) for p in _DERIVED))
    if foreign:
        raise CacheMismatchError(
            f"{target} is not empty (found {', '.join(foreign[:3])}); give a new or empty folder for the new cache"
        )


def sweep(cache: Path) -> None:
    """Remove what killed writers left under temporary names; call it only while holding the cache exclusively."""
    remove_temporary(cache)
    for folder in cache.iterdir():
        if folder.is_dir() and not folder.is_symlink():
            remove_temporary(folder)


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

    def __init__(self, cache: Path, recipe: Recipe, stored: StoredRows) -> None:
        self._recipe = recipe
        self._stored = stored
        dtype = np.dtype(recipe.stored_dtype)
        self._files: dict[str, FieldFiles] = {
            field.name: field_files(cache, field, dtype, stored.shards) for field in recipe.fields
        }

    def write(self, folder: Path, shard: PlannedShard, provenance: Mapping[str, str]) -> None:
        """Commit `shard` in the table's `folder`; raises CacheCorruptError for rows that are not what was committed."""
        entries = find_all(self._stored, shard.keys, self._recipe)
        arrays, offsets = {}, None
        for field in self._recipe.fields:
            arrays[field.name], bounds = gather(self._files[field.name], entries, np.empty)
            offsets = offsets if bounds is None else bounds
        keys = np.frombuffer(b"".join(shard.keys), np.uint8).reshape(-1, 16)
        folder.mkdir(exist_ok=True)
        block = RowBlock(keys=keys, arrays=arrays, offsets=offsets)
        commit_shard(folder, shard.name, self._recipe, block, provenance=provenance)


def counted(plan: TablePlan, name: str, report: Report | None) -> Iterator[PlannedShard]:
    """The shards of a plan, one after another; when the next is asked for, `report` is told that the last is done."""
    done = 0
    for shard in plan.shards():
        yield shard
        stop_here()
        done += len(shard.keys)
        if report is not None:
            report(name, done, len(plan.keys))
