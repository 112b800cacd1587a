"""The webdataset form: rows that were encoded into tables, joined into tars of whole samples.

A build encodes what no table and no tar has yet into tables, as for zarr; here whole samples are written into the tars
of `samples-<fp8>/`, and the tables go when the manifest refers to the tars. Rows of samples that were written before
are taken over from their tars: only what is new was encoded. The reserved rows stand in a tar of their own,
`reserved-<fp8>/`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice, repeat
from operator import add
from typing import Any

import numpy as np

from kcache.build.plan import Plan, PlannedShard, plan_table
from kcache.disk.durable import npy_of, writing
from kcache.disk.fetched import read_listed
from kcache.errors import CacheIncompleteError
from kcache.foreign import corrupt
from kcache.places import Place
from kcache.places.effects import make_folder, temporary_folder, write_npy
from kcache.store.digests import Keys, content_key, pack_keys
from kcache.store.formats.checksums import crc32c
from kcache.store.formats.columns import Samples
from kcache.store.formats.shard_files import DRAFT, publish_shard
from kcache.store.formats.side_files import side_dtype, side_name
from kcache.store.formats.webdataset import JoinedSample, write_tar
from kcache.store.index import TableState
from kcache.store.manifest import shapes_to_note
from kcache.store.recipe import RESERVED, SAMPLES, Field, Recipe, controls_of, kind_of
from kcache.store.rows import FieldFiles, field_files, gather
from kcache.store.samples import Sample, identities_of
from kcache.store.shaped.wants import Wants, squares_of
from kcache.store.shards import Commit, next_shard, read_commits, record_commit

RESERVED_KEY = content_key(RESERVED.encode())


def tar_recipe(name: str, recipes: Mapping[str, Recipe]) -> Recipe:
    """What decides the bytes of the tars called `name`, SAMPLES or RESERVED: the recipes of all tables in them."""
    fingerprints = {table: recipe.fingerprint for table, recipe in sorted(recipes.items())}
    fields = tuple(field for _, recipe in sorted(recipes.items()) for field in recipe.fields)
    stored = sorted({recipe.stored_dtype for recipe in recipes.values()})
    return Recipe(
        table=name, encoder="joined", weights="", config="", preprocess=fingerprints, compute_dtype="",
        batch_shape=(), stored_dtype=",".join(stored), fields=fields,
    )  # fmt: skip


def shard_recipes(form: str, recipes: Mapping[str, Recipe]) -> list[Recipe]:
    """The recipes that a cache's shard folders are named after: the tables' own, or those of the tars."""
    if form == "zarr":
        return list(recipes.values())
    return [tar_recipe(name, recipes) for name in (RESERVED, SAMPLES)]


def tar_keys(samples: Sequence[Sample], wants: Wants) -> Keys:
    """A key per sample, which has its id, that changes with that, its name, image, captions, and which rows it has."""
    columns = Samples.of(samples)
    rows = _rows_told(columns, wants)
    told = (map(add, identities, rows) for identities in identities_of(columns))
    return Keys.joined(pack_keys(map(content_key, each)) for each in told)


def _rows_told(samples: Samples, wants: Wants) -> Iterator[bytes]:
    """What decides which rows each sample has: shapes, and whether of its mirror image; nothing for plain squares."""
    if not shapes_to_note(wants.sets) and not wants.flip:
        return repeat(b"")
    told: list[Iterator[bytes]] = [repeat(b"mirrored" if wants.flip else b"")]
    for each in wants.sets:
        names = [*(f"{tall}x{wide}".encode() for tall, wide in each.shapes), b"none"]  # the last, as NO_SHAPE is -1
        told.append(map(names.__getitem__, samples.in_shapes(each).tolist()))
    return map(b" ".join, zip(*told, strict=False))


def committed_tar_keys(folder: Place, commit: Commit) -> Keys:
    """The keys of the samples in a tar, in order; none for a record of rejections."""
    return Keys.joined(_committed_tar_keys(folder, [commit]))


def _committed_tar_keys(folder: Place, commits: Sequence[Commit]) -> Iterator[np.ndarray]:
    """The keys of the samples in tars, packed, tar by tar."""
    held = [commit for commit in commits if commit.data is not None]
    paths = [folder / side_name(commit.stem) for commit in held]
    contents = read_listed(folder, [path.name for path in paths])
    for path, commit in zip(paths, held, strict=True):
        try:
            keys = Keys.checked(npy_of(next(contents), path.name))
        except (OSError, ValueError) as error:
            raise corrupt(error, path, f"remove {commit.name}.json beside it and build again") from error
        yield keys.packed


def plan_tars(
    cache: Place, recipes: Mapping[str, Recipe], samples: Sequence[Sample], rows_per_shard: int, wants: Wants
) -> Plan:
    """The plan for the tars of all `samples`, which have their ids, that are in none yet."""
    tables = []
    for name, wanted in ((RESERVED, [RESERVED_KEY]), (SAMPLES, tar_keys(samples, wants))):
        recipe = tar_recipe(name, recipes)
        commits = read_commits(cache / recipe.directory, recipe)
        there = Keys.joined(_committed_tar_keys(cache / recipe.directory, commits))
        first = next_shard(commits)
        tables.append(plan_table(recipe, wanted, there, (), rows_per_shard=rows_per_shard, first_shard=first))
    return Plan(tables=tuple(tables), shapes=shapes_to_note(wants.sets), flip=wants.flip)


class TarWriter:
    """Writes samples into committed tars of `cache`, reading their rows from wherever they stand in `rows_from`."""

    def __init__(
        self,
        cache: Place,
        tables: Mapping[str, TableState],
        provenance: Mapping[str, str],
        rows_from: Place | None = None,
        wants: Wants | None = None,
    ) -> None:
        """`tables` are the rows in the cache at `rows_from`, None being the one that is written.

        `wants` says which of them a sample has, None being those of a cache of squares.
        """
        self._wants = wants or Wants(squares_of(tables), controls=controls_of(tables))
        self._cache = cache
        self._provenance = provenance
        self._recipes = {name: state.recipe for name, state in sorted(tables.items())}
        self._stored = {name: state.stored for name, state in tables.items()}
        self._files: dict[tuple[str, str], FieldFiles] = {
            (table, field.name): field_files(
                rows_from or cache, field, np.dtype(recipe.stored_dtype), self._stored[table].shards
            )
            for table, recipe in self._recipes.items()
            for field in recipe.fields
        }

    def write(
        self,
        name: str,
        shards: Iterable[PlannedShard],
        samples: Callable[[Sequence[bytes]], Mapping[bytes, Sample]],
        kept: Callable[[PlannedShard], bool] = lambda _: True,
    ) -> None:
        """Write and commit the tars called `name` of planned shards.

        `samples` gives, of the keys of a shard, those that are samples still, with ids and sizes; the other keys are
        recorded as absent. What `kept` denies in the end is not written. Raises CacheIncompleteError where a row is
        stored nowhere.
        """
        for shard in shards:
            there = {} if name == RESERVED else samples(shard.keys)
            if not kept(shard):
                continue
            if name == RESERVED:
                self._write_reserved(shard.name)
            else:
                self._write_samples(shard, there)

    def _write_samples(self, shard: PlannedShard, samples: Mapping[bytes, Sample]) -> None:
        present = [key for key in shard.keys if key in samples]
        given = Samples.of([samples[key] for key in present])
        by_table = {table: self._wants.by_sample(table, given) for table in self._recipes}
        keys = [{table: by_table[table][number] for table in self._recipes} for number in range(len(present))]
        joined = [self._joined(samples[key], rows) for key, rows in zip(present, self._rows(keys), strict=True)]
        absent = [key.hex() for key in shard.keys if key not in samples]
        self._commit(tar_recipe(SAMPLES, self._recipes), shard.name, joined, keys, present, absent)

    def _write_reserved(self, name: str) -> None:
        """The tar with the rows of no input: of the empty caption, of the all-zero image, of no mask."""
        keys = {table: [key] if (key := kind_of(table).reserved) else [] for table in self._recipes}
        sample = JoinedSample(id=RESERVED, captions=("",), info={"reserved": True}, rows=self._rows([keys])[0])
        self._commit(tar_recipe(RESERVED, self._recipes), name, [sample], [keys], [RESERVED_KEY], ())

    def _joined(self, sample: Sample, rows: Mapping[str, Sequence[np.ndarray]]) -> JoinedSample:
        info: dict[str, Any] = {
            "id": sample.id,
            "name": sample.name,
            "image_key": sample.image_key.hex(),
            "captions": list(sample.captions),
            "caption_keys": [key.hex() for key in sample.caption_keys],
            "width": sample.width,
            "height": sample.height,
        }
        return JoinedSample(id=sample.id, captions=sample.captions, info=info, rows=rows)

    def _rows(self, keys: Sequence[Mapping[str, Sequence[bytes]]]) -> list[dict[str, list[np.ndarray]]]:
        """The rows of each sample's `keys`, by member; of tables without any, nothing.

        Those of all samples are read together, as each reading may be a request.
        """
        rows = [dict[str, list[np.ndarray]]() for _ in keys]
        for table, recipe in self._recipes.items():
            if not (wanted := [key for own in keys for key in own[table]]):
                continue
            entries = self._entries(table, wanted)
            for field in recipe.fields:
                found, bounds = gather(self._files[table, field.name], entries, np.empty)
                each = iter(found if bounds is None else np.split(found, bounds[1:-1]))
                member = _member(recipe, field, self._recipes)
                for own, of_sample in zip(keys, rows, strict=True):
                    if own[table]:
                        of_sample[member] = list(islice(each, len(own[table])))
        return rows

    def _entries(self, table: str, keys: Sequence[bytes]) -> np.ndarray:
        positions = self._stored[table].find(keys)
        if (positions < 0).any():
            lacking = keys[int(np.argmin(positions))].hex()
            raise CacheIncompleteError(f"{self._cache}: {table} lacks the row {lacking}; build again to encode it")
        return self._stored[table].entries[positions]

    def _commit(
        self,
        recipe: Recipe,
        name: str,
        samples: Sequence[JoinedSample],
        keys: Sequence[Mapping[str, Sequence[bytes]]],
        joined: Sequence[bytes],
        absent: Sequence[str],
    ) -> None:
        folder = self._cache / recipe.directory
        make_folder(folder)
        if (folder / f"{name}.json").is_file():  # by another builder that had the same work, and came first
            return
        if not samples:
            record_commit(folder, name, recipe, absent=absent, provenance=self._provenance)
            return
        size = sum(row.nbytes for sample in samples for rows in sample.rows.values() for row in rows)
        with temporary_folder(folder) as temporary:
            tar = temporary / f"{DRAFT}.tar"
            with writing(tar, size):
                placed = write_tar(tar, samples)
            write_npy(temporary / side_name(DRAFT), pack_keys(joined))
            for table, table_recipe in self._recipes.items():
                side = _side_rows(table_recipe, self._recipes, samples, keys, placed)
                if side is not None:
                    write_npy(temporary / side_name(DRAFT, table), side)
            stem, files = publish_shard(temporary, folder, name)
        record_commit(
            folder,
            name,
            recipe,
            rows=len(samples),
            data=f"{stem}.tar",
            files=files,
            absent=absent,
            provenance=self._provenance,
        )


def _member(recipe: Recipe, field: Field, recipes: Mapping[str, Recipe]) -> str:
    """Name of a field's members: the field's, or the table's where several tables have that field."""
    alike = [other for other in recipes.values() if any(f.name == field.name for f in other.fields)]
    return field.name if len(alike) == 1 else recipe.table


def _side_rows(
    recipe: Recipe,
    recipes: Mapping[str, Recipe],
    samples: Sequence[JoinedSample],
    keys: Sequence[Mapping[str, Sequence[bytes]]],
    placed: Sequence[Mapping[str, Sequence[int]]],
) -> np.ndarray | None:
    """Key and locators of one table's rows in a tar, sample by sample; None for a table that has none there."""
    members = {field.name: _member(recipe, field, recipes) for field in recipe.fields}
    having = [number for number, sample in enumerate(samples) if all(m in sample.rows for m in members.values())]
    if not having:
        return None
    samples, keys = [samples[number] for number in having], [keys[number] for number in having]
    placed = [placed[number] for number in having]
    flat = [key for sample_keys in keys for key in sample_keys[recipe.table]]
    side = np.zeros(len(flat), side_dtype(recipe.fields))
    side["key"] = pack_keys(flat)
    for field, member in members.items():
        rows = list(_rows(samples, member))
        side[field]["offset"] = [offset for offsets in placed for offset in offsets[member]]
        side[field]["length"] = [row.nbytes for row in rows]
        contents = [np.ascontiguousarray(row).reshape(-1).view(np.uint8) for row in rows]
        side[field]["crc32c"] = [crc32c(content) for content in contents]
    return side


def _rows(samples: Sequence[JoinedSample], member: str) -> Iterator[np.ndarray]:
    for sample in samples:
        yield from sample.rows[member]
