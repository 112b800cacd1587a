"""The index, made once per build: memory-mapped arrays that say, for every sample, where each of its rows stands.

`index-<digest>/<table>.npy` holds one entry per sample (per caption for `text`), in sample order: the shard's position
in the manifest and a locator per field. The last entry of `image_embeds` is the all-zero image, that of `text` the
empty caption. `captions.npy` (N + 1,) int64 says that sample i has the captions captions[i] to captions[i + 1]. What
samples count is in `kcache.store.formats.sample_extras`. It is made of `TableState`s: what is committed of each table,
read from the side files of its shards.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kcache.disk.scratch import Pile, kept, release, spans
from kcache.errors import CacheIncompleteError
from kcache.places import Place
from kcache.store.digests import KEY_BYTES, Keys, latest
from kcache.store.formats.columns import Sample, Samples
from kcache.store.formats.index_files import CAPTION_BOUNDS as CAPTION_BOUNDS
from kcache.store.formats.index_files import bytes_of as bytes_of
from kcache.store.formats.index_files import index_dtype as index_dtype
from kcache.store.formats.index_files import open_index as open_index
from kcache.store.formats.index_files import write_index as write_index
from kcache.store.formats.parts import Rows, in_memory
from kcache.store.formats.sample_extras import count_arrays
from kcache.store.manifest import Manifest, ShardEntry
from kcache.store.recipe import TEXT, Recipe, kind_of
from kcache.store.rows import unit_bytes
from kcache.store.samples import read_cut, short_sides
from kcache.store.shaped.standing import order_arrays
from kcache.store.shaped.wants import Wants
from kcache.store.shards import Commit, Rejection, next_shard, read_commits, read_side_files
from kcache.tally import Tally

_TOGETHER = 1 << 20
"""Entries that are looked at, or moved, together."""


@dataclass(frozen=True)
class StoredRows:
    """The committed rows of one table, findable by key, and the shards that they stand in; many are kept in files."""

    entries: np.ndarray
    """Of `index_dtype`: the rows of all shards, those whose keys were committed again later included."""
    keys: np.ndarray
    """(R,) S16, sorted, no key twice."""
    shards: tuple[ShardEntry, ...]
    """What the `shard` of an entry is a position in."""
    places: np.ndarray | None = None
    """(R,) int64: where in `entries` the row of each key is; None for where the key itself is."""

    def find(self, keys: Sequence[bytes]) -> np.ndarray:
        """Positions in `entries` of `keys`, (n,) int64, -1 where a key is not stored."""
        found = self.known.find(Keys.of(keys))
        if self.places is not None:
            there = found >= 0
            found[there] = self.places[found[there]]
            release(self.places)
        return found

    def entries_of(self, span: slice) -> np.ndarray:
        """The entries of some of `keys`."""
        found = self.entries[span if self.places is None else self.places[span]]
        release(self.entries)
        return found

    @cached_property
    def known(self) -> Keys:
        """All keys, sorted."""
        return Keys(self.keys.view(np.uint8).reshape(-1, KEY_BYTES))

    def used(self, keys: Sequence[bytes]) -> int:
        """How many rows the `keys` stand for, each counted once."""
        found = np.zeros(len(self.keys) + 1, np.bool_)
        for _, at in self.known.looked_up(Keys.of(keys)):
            found[at] = True
        return int(found[:-1].sum())


def stored_rows(folder: Place, commits: Sequence[Commit], recipe: Recipe, part: str = "") -> StoredRows:
    """The rows of a table's commits in `folder`; `part` names the table where shards hold several.

    Of a key that was committed twice the later row counts.
    """
    entries, keys = Pile(np.empty(0, index_dtype(recipe.fields))), Pile(np.empty((0, KEY_BYTES), np.uint8))
    shards: list[ShardEntry] = []
    held = [commit for commit in commits if commit.data is not None and commit.holds(part)]
    for commit, side in zip(held, read_side_files(folder, held, recipe, part), strict=True):
        found = np.empty(len(side), index_dtype(recipe.fields))
        found["shard"] = len(shards)
        for field in recipe.fields:
            found[field.name] = side[field.name]
        entries.add(found)
        keys.add(np.ascontiguousarray(side["key"]))
        size = sum(int(side[field.name]["length"].sum(dtype=np.int64)) for field in recipe.fields)
        shards.append(ShardEntry(name=commit.name, data=f"{folder.name}/{commit.data}", rows=len(side), bytes=size))
    return _latest(entries.array(), Keys(keys.array()), None, shards)


def merged_rows(recipe: Recipe, parts: Sequence[StoredRows]) -> StoredRows:
    """The rows of several places as one; of a key that is in two of them the later place's counts."""
    if len(parts) == 1:
        return parts[0]
    entries, keys = Pile(np.empty(0, index_dtype(recipe.fields))), Pile(np.empty((0, KEY_BYTES), np.uint8))
    places = Pile(np.empty(0, np.int64))
    shards: list[ShardEntry] = []
    before = 0
    for part in parts:
        for span in spans(len(part.entries), _TOGETHER):
            moved = part.entries[span].copy()
            moved["shard"] += len(shards)
            entries.add(moved)
        for span in spans(len(part.keys), _TOGETHER):
            keys.add(part.known.packed[span])
            own = np.arange(span.start, span.stop) if part.places is None else part.places[span]
            places.add(own + before)
        before += len(part.entries)
        shards += part.shards
    return _latest(entries.array(), Keys(keys.array()), places.array(), shards)


def _latest(entries: np.ndarray, keys: Keys, places: np.ndarray | None, shards: Sequence[ShardEntry]) -> StoredRows:
    """The rows whose keys do not come again later; `places` says where in `entries` each is, None for with its key."""
    last = latest(*keys.in_order())
    runs = (last[span] if places is None else places[last[span]] for span in spans(len(last), _TOGETHER))
    return StoredRows(
        entries, keys.taken(last).packed.view("S16").reshape(-1), tuple(shards), kept(runs, np.empty(0, np.int64))
    )


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
    """What `write_index` writes for samples with sizes whose rows are all in `tables`.

    Taking it raises CacheIncompleteError.
    """
    columns = Samples.of(samples)
    bounds = columns.caption_bounds if TEXT.name in tables else np.zeros(len(columns) + 1, np.int64)
    arrays = {CAPTION_BOUNDS: in_memory(bounds)}
    for name, state in tables.items():
        for array, keys in wants.indexed(name, columns).items():
            arrays[array] = Rows(state.stored.entries.dtype, len(keys), _entries(name, state.stored, keys))
    orders = order_arrays(wants.sets, columns)
    return arrays | {name: in_memory(array) for name, array in orders.items()} | count_arrays(columns)


def _entries(name: str, stored: StoredRows, keys: Keys) -> Iterator[np.ndarray]:
    """The entries of `keys`, which are looked for when the first one is asked for: one table's at a time."""
    positions = stored.find(keys)
    if lacking := int((positions < 0).sum()):
        raise CacheIncompleteError(f"{name} lacks {lacking} of {len(keys)} rows that were thought stored; build again")
    for span in spans(len(keys), _TOGETHER):
        yield stored.entries[positions[span]]
        release(stored.entries)


def token_counts(recipes: Mapping[str, Recipe], index: Mapping[str, np.ndarray]) -> np.ndarray:
    """Valid tokens of each caption, the reserved row's left out; empty where there is no text."""
    recipe = recipes.get(TEXT.name)
    return np.empty(0, np.int64) if recipe is None else tokens_of(recipe, index[TEXT.name])[:-1]


def tokens_of(recipe: Recipe, entries: np.ndarray) -> np.ndarray:
    """(n,) valid tokens of the rows of texts that index entries point to; empty for a recipe without tokens."""
    ragged = [field for field in recipe.fields if field.ragged]
    if not ragged:
        return np.empty(0, np.int64)
    return entries[ragged[0].name]["length"] // unit_bytes(ragged[0], np.dtype(recipe.stored_dtype))


def full_texts(text: TableState) -> Keys:
    """The keys of the texts that fill the text encoder's input, sorted."""
    stored, longest = text.stored, text.recipe.batch_shape[1]
    full = np.zeros(len(stored.keys), np.bool_)
    for span in spans(len(stored.keys), _TOGETHER):
        if len(tokens := tokens_of(text.recipe, stored.entries_of(span))):
            np.equal(tokens, longest, out=full[span])
    return stored.known.where(full)


def tally_of(cache: Place, manifest: Manifest, index: Mapping[str, np.ndarray]) -> Tally:
    """Counts of what trains otherwise than one may think, of a whole finished cache; raises CacheCorruptError."""
    recipes = {name: entry.recipe for name, entry in manifest.tables.items()}
    captions, empty, longest, full = 0, 0, 0, list[np.ndarray]()
    if TEXT.name in recipes and len(wordless := tokens_of(recipes[TEXT.name], index[TEXT.name][-1:])):
        # The last is that of the empty caption, which has a begin and an end.
        captions, longest = len(index[TEXT.name]) - 1, recipes[TEXT.name].batch_shape[1]
        for span in spans(captions, _TOGETHER):
            entries = index[TEXT.name][span]
            tokens = tokens_of(recipes[TEXT.name], entries)
            empty += int((tokens == wordless).sum())
            full.append(entries[tokens == longest])
    cut, short = read_cut(cache, manifest), short_sides(cache, manifest)
    squares = [each.resolution for each in manifest.shape_sets if each.is_square]
    of_all = [name for name in recipes if kind_of(name).per == "image" and len(index.get(name, ())) >= manifest.samples]
    images = next(index[name] for name in of_all)
    return Tally(
        captions=captions,
        captions_empty=empty,
        captions_cut=sum(tokens > 0 for tokens in cut.values()),
        tokens_cut=sum(cut.values()),
        captions_full=max(0, _distinct(full) - len(cut)),
        longest=longest if captions else 0,
        samples=manifest.samples,
        samples_alike=manifest.samples - _distinct(images[span] for span in spans(manifest.samples, _TOGETHER)),
        pictures_small={side: int((short < side).sum()) for side in squares},
    )


def _distinct(runs: Iterable[np.ndarray]) -> int:
    """How many different rows index entries point to.

    Where the first field of a row stands tells it from others, in one number: no file of rows has a terabyte.
    """
    places = [np.empty(0, np.uint64)]
    for entries in runs:
        offsets = entries[(entries.dtype.names or ())[1]]["offset"]
        places.append(entries["shard"].astype(np.uint64) << np.uint64(40) | offsets)
    together = np.concatenate(places)
    together.sort()
    return int((together[1:] != together[:-1]).sum()) + bool(len(together))


def statistics(values: np.ndarray) -> dict[str, float] | None:
    """Smallest, mean, percentiles and largest; None where there are no values."""
    if not len(values) or not values.any():
        return None
    percentiles = {f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 99)}
    return {"min": int(values.min()), "mean": float(values.mean()), **percentiles, "max": int(values.max())}
