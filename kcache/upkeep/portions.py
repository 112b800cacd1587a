"""Portions: shards to be copied, each with all that has to be known of its rows, and the rows left where they stand.

A portion is cut out of a whole cache and knows nothing of the rest of it, so it may travel to whoever copies it: it is
some fifty bytes for each row, of a shard of about 256 MB at most a few MB.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from kcache.build.joined_tars import TarWriter, tar_keys
from kcache.build.plan import PlannedShard
from kcache.errors import CacheCorruptError
from kcache.places import Place
from kcache.places.effects import make_folder
from kcache.store.digests import Keys, Positions, pack_keys
from kcache.store.formats.columns import Samples
from kcache.store.formats.side_files import SIZES
from kcache.store.index import StoredRows, TableState
from kcache.store.recipe import RESERVED, Recipe, kind_of
from kcache.store.rows import field_files, gather
from kcache.store.samples import Sample
from kcache.store.shaped.wants import Wants
from kcache.store.shards import RowBlock, commit_shard


@dataclass(frozen=True, kw_only=True, slots=True)
class Portion:
    """A shard to be copied, and what it is copied from."""

    cache: Place
    """Where the rows stand."""
    target: Place
    """The cache that gets the shard."""
    recipe: Recipe
    """What the shard is of."""
    shard: PlannedShard
    tables: Mapping[str, TableState]
    """Of each table that the shard has rows of, those rows and the shards that they stand in."""
    samples: Samples
    """Those that are in a tar; none where the shard is of a table."""
    sizes: np.ndarray | None
    """(n,) of `SIZES`, where the rows are of pictures and of a table."""
    provenance: Mapping[str, str]
    wants: Wants
    """Which rows the tables have of the samples."""

    def commit(self) -> None:
        """Copy the rows, each checked on the way, and commit the shard; raises CacheCorruptError for a damaged row."""
        if self.recipe.of_tars:
            writer = TarWriter(self.target, self.tables, self.provenance, self.cache, self.wants)
            writer.write(self.recipe.table, [self.shard], lambda _: self._by_key())
        else:
            self._commit_rows()

    def _by_key(self) -> dict[bytes, Sample]:
        return dict(zip(tar_keys(self.samples, self.wants), self.samples, strict=True))

    def _commit_rows(self) -> None:
        recipe, folder = self.recipe, self.target / self.recipe.directory
        stored, dtype = self.tables[recipe.table].stored, np.dtype(recipe.stored_dtype)
        entries = stored.entries[stored.find(self.shard.keys)]
        arrays, offsets = {}, None
        for field in recipe.fields:
            files = field_files(self.cache, field, dtype, stored.shards)
            arrays[field.name], bounds = gather(files, entries, np.empty)
            offsets = offsets if bounds is None else bounds
        make_folder(folder)
        block = RowBlock(keys=pack_keys(self.shard.keys), arrays=arrays, offsets=offsets, sizes=self.sizes)
        commit_shard(folder, self.shard.name, recipe, block, provenance=self.provenance)


class PictureSizes:
    """Width and height of the pictures of samples, looked up where the samples are kept."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    @cached_property
    def _positions(self) -> Positions:
        return Positions(self._samples.image_keys)

    def of(self, keys: Sequence[bytes]) -> np.ndarray:
        """(n,) of `SIZES`: those of `keys`, 0 where no sample has such a picture."""
        rows = np.zeros(len(keys), SIZES)
        rows["key"] = pack_keys(keys)
        numbers = self._positions.find(keys)
        known = self._samples.at(numbers[numbers >= 0])
        for name in ("width", "height"):
            rows[name][numbers >= 0] = np.concatenate([np.empty(0, "<i4"), *(t[name].to_numpy() for t in known.tables)])
        return rows


def of_rows(
    cache: Place,
    target: Place,
    recipe: Recipe,
    stored: StoredRows,
    shard: PlannedShard,
    sizes: PictureSizes,
    provenance: Mapping[str, str],
    wants: Wants,
) -> Portion:
    """The portion of a shard of a table, whose rows are among those `stored` in `cache`; raises CacheCorruptError."""
    rows = TableState(recipe=recipe, stored=_standing(stored, shard.keys, recipe), provenance=provenance)
    return Portion(
        cache=_anywhere(cache), target=_anywhere(target), recipe=recipe, shard=shard, tables={recipe.table: rows},
        samples=Samples(()), sizes=sizes.of(shard.keys) if kind_of(recipe.table).per == "image" else None,
        provenance=provenance, wants=wants,
    )  # fmt: skip


def of_samples(
    cache: Place,
    target: Place,
    tables: Mapping[str, TableState],
    recipe: Recipe,
    shard: PlannedShard,
    samples: Samples,
    provenance: Mapping[str, str],
    wants: Wants,
) -> Portion:
    """The portion of a tar of whole `samples`, or of the reserved rows, of all `tables`; raises CacheCorruptError."""
    rows = {}
    for name, state in tables.items():
        reserved = kind_of(name).reserved
        own = Keys.of([] if reserved is None else [reserved])
        keys = own if recipe.table == RESERVED else wants.keys(name, samples)
        rows[name] = replace(state, stored=_standing(state.stored, keys, state.recipe), rejections=(), judged_by={})
    return Portion(
        cache=_anywhere(cache), target=_anywhere(target), recipe=recipe, shard=shard, tables=rows, samples=samples,
        sizes=None, provenance=provenance, wants=wants,
    )  # fmt: skip


def find_all(stored: StoredRows, keys: Sequence[bytes], recipe: Recipe) -> np.ndarray:
    """The positions of `keys` in `stored`, in their order; raises CacheCorruptError when one is not stored."""
    positions = stored.find(keys)
    if (positions < 0).any():
        raise CacheCorruptError(
            f"{int((positions < 0).sum())} rows of {recipe.table} that samples use are in no shard of "
            f"{recipe.directory}; build the cache again with its source to encode them anew"
        )
    return positions


def _standing(stored: StoredRows, keys: Sequence[bytes], recipe: Recipe) -> StoredRows:
    """The rows of `keys` alone, and the shards that they stand in."""
    packed = Keys.of(keys)
    order, new = packed.in_order()
    own = packed[order[new]]
    entries = stored.entries[find_all(stored, own, recipe)]
    used, entries["shard"] = np.unique(entries["shard"], return_inverse=True)
    shards = tuple(stored.shards[number] for number in used.tolist())
    return StoredRows(entries, own.packed.view("S16").reshape(-1), shards)


def _anywhere(place: Place) -> Place:
    """The same place, whatever folder somebody works in."""
    return place.absolute() if isinstance(place, Path) else place
