"""The index, made once per build: memory-mapped arrays that say, for every sample, where each of its rows stands.

`index-<digest>/<table>.npy` holds one entry per sample (per caption for `text`), in sample order: the shard's position
in the manifest and a locator per field. The last entry of `image_embeds` is the all-zero image, that of `text` the
empty caption. `captions.npy` (N + 1,) int64 says that sample i has the captions captions[i] to captions[i + 1]. It is
made of `TableState`s: what is committed of each table, read from the side files of its shards.
"""

import dataclasses
import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from kcache.disk.durable import read_npy, write_npy
from kcache.disk.filesystems import mapped
from kcache.foreign import corrupt
from kcache.places import Place
from kcache.places.effects import publish, remove, temporary_folder
from kcache.store.checksums import crc32c
from kcache.store.digests import own_folder
from kcache.store.formats.side_files import LOCATOR
from kcache.store.manifest import Manifest, ShardEntry, TableEntry
from kcache.store.recipe import TEXT, Field, Recipe, json_digest, kind_of, sides_of
from kcache.store.rows import unit_bytes
from kcache.store.samples import read_cut, short_sides
from kcache.store.shards import Commit, Rejection, next_shard, read_commits, read_side_files
from kcache.tally import Tally

CAPTION_BOUNDS = "captions"


def index_dtype(fields: Sequence[Field]) -> np.dtype[np.void]:
    """Dtype of an index entry: position of the shard in the manifest, then a locator per field."""
    return np.dtype([("shard", "<u4"), *[(field.name, LOCATOR) for field in fields]])


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
        wanted = np.frombuffer(b"".join(keys), "S16") if keys else np.empty(0, "S16")
        if not len(self.keys):
            return np.full(len(wanted), -1)
        position = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.where(self.keys[position] == wanted, position, -1)

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
    unique, latest = np.unique(np.concatenate(keys)[::-1], return_index=True)
    return StoredRows(np.concatenate(entries)[::-1][latest], unique, tuple(shards))


def write_index(cache: Place, arrays: Mapping[str, np.ndarray]) -> str:
    """Write the index arrays under the name that their digest gives; returns the digest (sha256 hex)."""
    with temporary_folder(cache) as temporary:
        for name, array in arrays.items():
            write_npy(temporary / f"{name}.npy", array)
        digest = _index_digest(temporary, sorted(arrays))
        final = cache / f"index-{digest[:16]}"
        if _holds(final, sorted(arrays), digest):
            remove(temporary)
        else:
            remove(final)  # damaged, if there is anything
            publish(temporary, final)
    return digest


def _holds(folder: Place, names: Sequence[str], digest: str) -> bool:
    try:
        return _index_digest(_at_hand(folder, names), names) == digest
    except (OSError, ValueError):
        return False


def open_index(cache: Place, manifest: Manifest) -> dict[str, np.ndarray]:
    """The index arrays, memory-mapped and checked against the manifest; raises CacheCorruptError."""
    names = sorted([*manifest.tables, CAPTION_BOUNDS])
    folder = cache / manifest.index_folder
    try:
        folder = _at_hand(folder, names)
        digest = _index_digest(folder, names)
        if digest != manifest.index_digest:
            raise ValueError(f"their digest is {digest[:16]}, the manifest says {manifest.index_digest[:16]}")
        # Plain views of the mapped arrays: a batch takes them apart several times, 3 µs each where they are np.memmap.
        arrays = {name: np.asarray(read_npy(folder / f"{name}.npy", mapped=True)) for name in names}
        _check_lengths(manifest, arrays)
        for name, entry in manifest.tables.items():
            _check_entries(name, entry, arrays[name])
        return arrays
    except (OSError, ValueError) as error:
        do = "build the cache again with its source to write these index arrays anew: no row is encoded for that"
        raise corrupt(error, folder, do) from error


def _at_hand(folder: Place, names: Sequence[str]) -> Path:
    """Where on this machine the index arrays of `folder` lie; those of a bucket are fetched, once."""
    if isinstance(folder, Path):
        return folder
    kept = own_folder() / "index"
    final = kept / folder.name
    if not final.is_dir():
        kept.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept, prefix=".tmp-") as made:
            for name in names:
                (Path(made) / f"{name}.npy").write_bytes((folder / f"{name}.npy").read_bytes())
            with suppress(OSError):  # another process was faster
                Path(made).rename(final)
                Path(made).mkdir()  # what the block removes
    return final


def _check_lengths(manifest: Manifest, arrays: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError when there are not as many entries as the numbers of samples and captions say."""
    bounds = arrays[CAPTION_BOUNDS]
    # Where there are texts every sample has one or more; else none has any.
    fits = np.greater if TEXT.name in manifest.tables else np.equal
    well_formed = bounds.dtype == np.int64 and bounds.shape == (manifest.samples + 1,) and bounds[0] == 0
    if not well_formed or not fits(bounds[1:], bounds[:-1]).all():
        raise ValueError(f"{CAPTION_BOUNDS}.npy does not bound the captions of {manifest.samples} samples")
    for name in manifest.tables:
        kind = kind_of(name)
        rows = int(bounds[-1]) if kind.per == "caption" else manifest.samples
        expected = rows + (kind.reserved is not None)
        if arrays[name].shape != (expected,):
            raise ValueError(f"{name}.npy has shape {arrays[name].shape} instead of ({expected},)")


def _check_entries(name: str, entry: TableEntry, array: np.ndarray) -> None:
    """Raise ValueError when entries name shards that are none, or rows of another size than the recipe's."""
    recipe = entry.recipe
    if array.dtype != index_dtype(recipe.fields):
        raise ValueError(f"{name}.npy has dtype {array.dtype} instead of {index_dtype(recipe.fields)}")
    if len(array) and array["shard"].max() >= len(entry.shards):
        raise ValueError(f"{name}.npy names shard {array['shard'].max()} of {len(entry.shards)}")
    for field in recipe.fields:
        size = math.prod(field.shape) * np.dtype(recipe.stored_dtype).itemsize
        lengths = array[field.name]["length"]
        if size >= 1 << 32 or (lengths % size).any() or (not field.ragged and (lengths != size).any()):
            raise ValueError(f"{name}.npy has rows of {field.name} that are not {field.shape} of {recipe.stored_dtype}")


def _index_digest(folder: Path, names: Sequence[str]) -> str:
    sums = []
    for name in names:
        content = np.frombuffer(mapped(folder / f"{name}.npy"), np.uint8)
        sums.append([name, content.size, crc32c(content)])
    return json_digest(sums)


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
        stored = self.stored.key_set
        by_key = {bytes.fromhex(rejection.key): rejection for rejection in self.rejections}
        return {key: rejection for key, rejection in by_key.items() if key not in stored}


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
    first = np.unique(rows, return_index=True)[1]
    short = short_sides(cache, manifest)
    images = next((index[name][: manifest.samples] for name in recipes if kind_of(name).per == "image"), short)
    return Tally(
        captions=len(tokens),
        captions_empty=int((tokens == wordless).sum()),
        captions_cut=sum(tokens > 0 for tokens in cut.values()),
        tokens_cut=sum(cut.values()),
        captions_full=max(0, int(full[first].sum()) - len(cut)),
        longest=longest,
        samples=manifest.samples,
        samples_alike=manifest.samples - len(np.unique(images)) if manifest.samples else 0,
        pictures_small={side: int((short < side).sum()) for side in sides_of(recipes)},
    )


def statistics(values: np.ndarray) -> dict[str, float] | None:
    """Smallest, mean, percentiles and largest; None where there are no values."""
    if not len(values) or not values.any():
        return None
    percentiles = {f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 99)}
    return {"min": int(values.min()), "mean": float(values.mean()), **percentiles, "max": int(values.max())}
