"""The index, made once per build: memory-mapped arrays that say, for every sample, where each of its rows stands.

`index-<digest>/<table>.npy` holds one entry per sample (per caption for `text`), in sample order: the shard's position
in the manifest and a locator per field. The last entry of `image_embeds` is the all-zero image, that of `text` the
empty caption. `captions.npy` (N + 1,) int64 says that sample i has the captions captions[i] to captions[i + 1]. It is
made of `TableState`s: what is committed of each table, read from the side files of its shards.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kcache.errors import CacheIncompleteError
from kcache.places import Place
from kcache.store.digests import KEY_BYTES, Keys
from kcache.store.formats.columns import Sample, Samples
from kcache.store.formats.index_files import CAPTION_BOUNDS as CAPTION_BOUNDS
from kcache.store.formats.index_files import bytes_of as bytes_of
from kcache.store.formats.index_files import index_dtype as index_dtype
from kcache.store.formats.index_files import open_index as open_index
from kcache.store.formats.index_files import write_index as write_index
from kcache.store.formats.parts import Rows, in_memory
from kcache.store.manifest import Manifest, ShardEntry
from kcache.store.recipe import TEXT, Recipe, kind_of
from kcache.store.rows import unit_bytes
from kcache.store.samples import read_cut, short_sides
from kcache.store.shaped.standing import order_arrays
from kcache.store.shaped.wants import Wants
from kcache.store.shards import Commit, Rejection, next_shard, read_commits, read_side_files
from kcache.tally import Tally

_TOGETHER = 1 << 20
"""Entries of an index that are written together."""


@dataclass(frozen=True)
class StoredRows:
    """The committed rows of one table, findable by key, and the shards that they stand in."""

    entries: np.ndarray
    """(R,) of `index_dtype`, sorted by key."""
    keys: np.ndarray
    """(R,) S16, sorted, no key twice."""
    shards: tuple[ShardEntry, ...]
    """What the `shard` of an entry is a position in."""

    def find(self, keys: Sequence[bytes]) -> np.ndarray:
        """Positions in `entries` of `keys`, (n,) int64, -1 where a key is not stored."""
        return self.known.find(Keys.of(keys))

    @cached_property
    def known(self) -> Keys:
        """All keys, sorted."""
        return Keys(self.keys.view(np.uint8).reshape(-1, KEY_BYTES))

    def used(self, keys: Sequence[bytes]) -> int:
        """How many rows the `keys` stand for, each counted once."""
        found = np.zeros(len(self.keys) + 1, np.bool_)
        found[self.find(keys)] = True
        return int(found[:-1].sum())

    @cached_property
    def key_set(self) -> frozenset[bytes]:
        """All keys, as 16 bytes each."""
        # As V16: numpy would cut zero bytes off the end of an S16.
        return frozenset(self.keys.view("V16").tolist())


def stored_rows(folder: Place, commits: Sequence[Commit], recipe: Recipe, part: str = "") -> StoredRows:
    """The rows of a table's commits in `folder`; `part` names the table where shards hold several.

    Of a key that was committed twice the later row counts.
    """
    entries, keys = [], []
    shards: list[ShardEntry] = []
    held = [commit for commit in commits if commit.data is not None and commit.holds(part)]
    for commit, side in zip(held, read_side_files(folder, held, recipe, part), strict=True):
        found = np.empty(len(side), index_dtype(recipe.fields))
        found["shard"] = len(shards)
        for field in recipe.fields:
            found[field.name] = side[field.name]
        entries.append(found)
        keys.append(np.ascontiguousarray(side["key"]).view("S16").reshape(-1))
        size = sum(int(side[field.name]["length"].sum(dtype=np.int64)) for field in recipe.fields)
        shards.append(ShardEntry(name=commit.name, data=f"{folder.name}/{commit.data}", rows=len(side), bytes=size))
    return _latest(recipe, entries, keys, shards)


def merged_rows(recipe: Recipe, parts: Sequence[StoredRows]) -> StoredRows:
    """The rows of several places as one; of a key that is in two of them the later place's counts."""
    entries, keys = [], []
    shards: list[ShardEntry] = []
    for part in parts:
        moved = part.entries.copy()
        moved["shard"] += len(shards)
        entries.append(moved)
        keys.append(part.keys)
        shards += part.shards
    return _latest(recipe, entries, keys, shards)


def _latest(
    recipe: Recipe, entries: Sequence[np.ndarray], keys: Sequence[np.ndarray], shards: Sequence[ShardEntry]
) -> StoredRows:
    if not entries:
        return StoredRows(np.empty(0, index_dtype(recipe.fields)), np.empty(0, "S16"), tuple(shards))
    together = np.concatenate(keys)
    order, new = Keys(together.view(np.uint8).reshape(-1, KEY_BYTES)).in_order()
    latest = order[np.append(new[1:], True)] if len(order) else order  # the last of those that are equal
    return StoredRows(np.concatenate(entries)[latest], together[latest], tuple(shards))


@dataclass(frozen=True, kw_only=True)
class TableState:
    """What is committed of one table."""

    recipe: Recipe
    stored: StoredRows
    rejections: tuple[Rejection, ...] = ()
    next_shard: int = 0
    """Number that the table's next shard gets."""
    provenance: Mapping[str, str]
    """What its rows were made with."""
    judged_by: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    """By the key (hex) of each rejection, what it was made with."""

    @cached_property
    def rejected(self) -> dict[bytes, Rejection]:
        """Rejections by key, those left out that a later shard stored after all."""
        by_key = {bytes.fromhex(rejection.key): rejection for rejection in self.rejections}
        stored = self.stored.find(list(by_key)) >= 0
        return {key: by_key[key] for key, is_stored in zip(by_key, stored.tolist(), strict=True) if not is_stored}


def table_state(cache: Place, recipe: Recipe) -> TableState:
    """What is committed of a table in a folder of its own."""
    folder = cache / recipe.directory
    commits = read_commits(folder, recipe)
    return TableState(
        recipe=recipe,
        stored=stored_rows(folder, commits, recipe),
        rejections=tuple(rejection for commit in commits for rejection in commit.rejected),
        next_shard=next_shard(commits),
        provenance=provenance_of(commits),
        judged_by=judges(commits),
    )


def judges(commits: Sequence[Commit]) -> dict[str, Mapping[str, str]]:
    """By the key (hex) of each rejection, what it was made with; of a key that was rejected twice, the last time."""
    return {rejection.key: commit.provenance for commit in commits for rejection in commit.rejected}


def provenance_of(commits: Sequence[Commit]) -> dict[str, str]:
    """What the rows of several shards were made with; where they differ, the last one counts."""
    return {name: value for commit in commits for name, value in commit.provenance.items()}


def index_arrays(samples: Sequence[Sample], tables: Mapping[str, TableState], wants: Wants) -> dict[str, Rows]:
    """What `write_index` writes for samples with sizes whose rows are all in `tables`; raises CacheIncompleteError."""
    columns = Samples.of(samples)
    bounds = columns.caption_bounds if TEXT.name in tables else np.zeros(len(columns) + 1, np.int64)
    arrays = {CAPTION_BOUNDS: in_memory(bounds)}
    for name, state in tables.items():
        for array, keys in wants.indexed(name, columns).items():
            positions = state.stored.find(keys)
            if lacking := int((positions < 0).sum()):
                raise CacheIncompleteError(
                    f"{name} lacks {lacking} of {len(keys)} rows that were thought stored; build again"
                )
            arrays[array] = Rows(state.stored.entries.dtype, len(positions), _entries(state.stored.entries, positions))
    orders = order_arrays(wants.sets, columns)
    return arrays | {name: in_memory(array) for name, array in orders.items()}


def _entries(stored: np.ndarray, positions: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, len(positions), _TOGETHER):
        yield stored[positions[first : first + _TOGETHER]]


def token_counts(recipes: Mapping[str, Recipe], index: Mapping[str, np.ndarray]) -> np.ndarray:
    """Valid tokens of each caption, the reserved row's left out; empty where there is no text."""
    recipe = recipes.get(TEXT.name)
    ragged = [field for field in recipe.fields if field.ragged] if recipe else []
    if recipe is None or not ragged:
        return np.empty(0, np.int64)
    return index[TEXT.name][ragged[0].name]["length"][:-1] // unit_bytes(ragged[0], np.dtype(recipe.stored_dtype))


def tally_of(cache: Place, manifest: Manifest, index: Mapping[str, np.ndarray]) -> Tally:
    """Counts of what trains otherwise than one may think, of a whole finished cache; raises CacheCorruptError."""
    recipes = {name: entry.recipe for name, entry in manifest.tables.items()}
    tokens, cut = token_counts(recipes, index), read_cut(cache, manifest)
    longest = recipes[TEXT.name].batch_shape[1] if len(tokens) else 0
    rows, full = index[TEXT.name][:-1] if len(tokens) else tokens, tokens == longest
    # What the reserved row, of the empty caption, has: a begin and an end.
    wordless = token_counts(recipes, {TEXT.name: index[TEXT.name][[-1, -1]]}) if len(tokens) else tokens
    short = short_sides(cache, manifest)
    squares = [each.resolution for each in manifest.shape_sets if each.is_square]
    of_all = [name for name in recipes if kind_of(name).per == "image" and len(index[name]) >= manifest.samples]
    images = next((index[name][: manifest.samples] for name in of_all), short)
    return Tally(
        captions=len(tokens),
        captions_empty=int((tokens == wordless).sum()),
        captions_cut=sum(tokens > 0 for tokens in cut.values()),
        tokens_cut=sum(cut.values()),
        captions_full=max(0, _distinct(rows[full]) - len(cut)),
        longest=longest,
        samples=manifest.samples,
        samples_alike=manifest.samples - _distinct(images),
        pictures_small={side: int((short < side).sum()) for side in squares},
    )


def _distinct(entries: np.ndarray) -> int:
    """How many different rows index entries point to, or how many different numbers there are."""
    if entries.dtype.names is None:
        return len(np.unique(entries))
    # Where a row's first field stands tells it from others: numbers are sorted in a tenth of the time of entries.
    shards, offsets = entries["shard"].astype(np.uint64), entries[entries.dtype.names[1]]["offset"]
    fits = not len(offsets) or int(offsets.max()) < 1 << 40 > int(shards.max()) << 16
    return len(np.unique(shards << np.uint64(40) | offsets)) if fits else len(np.unique(entries))


def statistics(values: np.ndarray) -> dict[str, float] | None:
    """Smallest, mean, percentiles and largest; None where there are no values."""
    if not len(values) or not values.any():
        return None
    percentiles = {f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 99)}
    return {"min": int(values.min()), "mean": float(values.mean()), **percentiles, "max": int(values.max())}
