"""The webdataset form: rows that were encoded into tables, joined into tars of whole samples.

A build encodes what no table and no tar has yet into tables, as for zarr; here whole samples are packed into the tars
of `samples-<fp8>/`, and the tables go when the manifest refers to the tars. Rows of samples that were packed before are
taken over from their tars: only what is new was encoded. The reserved rows stand in a tar of their own,
`reserved-<fp8>/`.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kcache.build.finish import Candidate
from kcache.build.plan import Plan, PlannedShard, plan_table
from kcache.durable import publish, read_npy, temporary_path, write_npy, writing
from kcache.errors import CacheCorruptError, CacheIncompleteError
from kcache.store.checksums import crc32c
from kcache.store.digests import EMPTY_CAPTION_KEY, ZERO_IMAGE_KEY, content_key
from kcache.store.formats.webdataset import JoinedSample, write_tar
from kcache.store.index import StoredRows, TableState, merged_rows, stored_rows, table_state
from kcache.store.recipe import Field, Recipe, canonical_json
from kcache.store.rows import FieldFiles, field_files, gather
from kcache.store.samples import sample_ids
from kcache.store.shards import (
    Commit,
    Rejection,
    discard_uncommitted,
    next_shard,
    read_commits,
    record_commit,
    side_dtype,
    side_name,
)

SAMPLES = "samples"
"""Name of the folder with the tars of the samples, before its fingerprint."""
RESERVED = "reserved"
"""The same for the reserved rows; also the id of the one sample that they make."""
_RESERVED_KEY = content_key(RESERVED.encode())


def joined_recipe(name: str, recipes: Mapping[str, Recipe]) -> Recipe:
    """What decides the bytes of joined tars: the recipes of all tables that are joined."""
    fingerprints = {table: recipe.fingerprint for table, recipe in sorted(recipes.items())}
    fields = tuple(field for _, recipe in sorted(recipes.items()) for field in recipe.fields)
    stored = sorted({recipe.stored_dtype for recipe in recipes.values()})
    return Recipe(
        table=name, encoder="joined", weights="", config="", preprocess=fingerprints, compute_dtype="",
        batch_shape=(), stored_dtype=",".join(stored), fields=fields,
    )  # fmt: skip


def joined_keys(candidates: Sequence[Candidate]) -> list[bytes]:
    """A key per sample that changes when its id, name, image or captions do."""
    ids = sample_ids([candidate.image_key for candidate in candidates])
    return [
        content_key(canonical_json([i, c.name, [key.hex() for key in c.caption_keys]]).encode())
        for i, c in zip(ids, candidates, strict=True)
    ]


def packed_states(cache: Path, recipes: Mapping[str, Recipe], earlier: Mapping[str, Recipe]) -> dict[str, TableState]:
    """The rows of each table of `recipes` in tars of the cache, packed for these recipes or for `earlier`."""
    parts: dict[str, list[StoredRows]] = {name: [] for name in recipes}
    rejections: list[Rejection] = []
    for tables in [earlier, recipes] if dict(earlier) != dict(recipes) else [recipes]:
        for kind in (RESERVED, SAMPLES):
            recipe = joined_recipe(kind, tables)
            folder = cache / recipe.directory
            commits = read_commits(folder, recipe)
            same = [name for name in tables if name in recipes and tables[name] == recipes[name]]
            for name in same:
                parts[name].append(stored_rows(folder, commits, tables[name], name))
            if len(same) == len(tables):
                rejections += [rejection for commit in commits for rejection in commit.rejected]
    return {
        name: TableState(recipe=recipe, stored=merged_rows(recipe, parts[name]), rejections=tuple(rejections))
        for name, recipe in recipes.items()
    }


def plan_packing(
    cache: Path, recipes: Mapping[str, Recipe], candidates: Sequence[Candidate], rows_per_shard: int
) -> Plan:
    """The plan for the tars of all `candidates` that are in none yet."""
    tables = []
    for kind, wanted in ((RESERVED, [_RESERVED_KEY]), (SAMPLES, joined_keys(candidates))):
        recipe = joined_recipe(kind, recipes)
        commits = read_commits(cache / recipe.directory, recipe)
        packed = {key for commit in commits for key in packed_keys(cache / recipe.directory, commit)}
        first = next_shard(commits)
        tables.append(plan_table(recipe, wanted, packed, (), rows_per_shard=rows_per_shard, first_shard=first))
    return Plan(tables=tuple(tables))


def packed_keys(folder: Path, commit: Commit) -> list[bytes]:
    """The joined keys of the samples in a tar, in order; [] for a record of rejections."""
    if commit.data is None:
        return []
    path = folder / side_name(commit.name)
    try:
        content = read_npy(path).tobytes()
    except (OSError, ValueError) as error:
        raise CacheCorruptError(
            f"{path} cannot be read ({error}); remove {commit.name}.json beside it and build again"
        ) from error
    return [content[i : i + 16] for i in range(0, len(content), 16)]


class TarPacker:
    """Packs samples into committed tars of `cache`, reading their rows from wherever they stand in `rows_from`."""

    def __init__(
        self,
        cache: Path,
        recipes: Mapping[str, Recipe],
        stored: Mapping[str, StoredRows],
        rows_from: Path | None = None,
    ) -> None:
        """`stored` are the rows in the cache at `rows_from`, None being the one that is written."""
        self._cache = cache
        self._recipes = dict(sorted(recipes.items()))
        self._stored = stored
        self._files: dict[tuple[str, str], FieldFiles] = {
            (table, field.name): field_files(
                rows_from or cache, field, np.dtype(recipe.stored_dtype), stored[table].shards
            )
            for table, recipe in self._recipes.items()
            for field in recipe.fields
        }

    def pack_samples(
        self,
        shard: PlannedShard,
        candidates: Mapping[bytes, tuple[str, Candidate]],
        sizes: Mapping[bytes, tuple[int, int]],
        provenance: Mapping[str, str],
    ) -> None:
        """Write and commit the tar of a planned shard; `candidates` gives id and sample by joined key.

        Keys that no candidate has any more are recorded as absent. `sizes` are width and height by image key.
        """
        present = [(key, *candidates[key]) for key in shard.keys if key in candidates]
        absent = [key.hex() for key in shard.keys if key not in candidates]
        samples = [self._sample(i, c, sizes[c.image_key]) for _, i, c in present]
        keys = [{"image": [c.image_key], "text": list(c.caption_keys)} for _, _, c in present]
        recipe = joined_recipe(SAMPLES, self._recipes)
        self._commit(recipe, shard.name, samples, keys, [key for key, _, _ in present], absent, provenance)

    def pack_reserved(self, name: str, provenance: Mapping[str, str]) -> None:
        """Write and commit the tar with the rows of the empty caption and of the all-zero image."""
        rows: dict[str, list[np.ndarray]] = {}
        for table, recipe in self._recipes.items():
            if key := _reserved_key(table):
                rows |= {_member(recipe, f, self._recipes): [self._row(table, f, key)] for f in recipe.fields}
        sample = JoinedSample(id=RESERVED, captions=("",), info={"reserved": True}, rows=rows)
        keys = [{"image": [ZERO_IMAGE_KEY], "text": [EMPTY_CAPTION_KEY]}]
        recipe = joined_recipe(RESERVED, self._recipes)
        self._commit(recipe, name, [sample], keys, [_RESERVED_KEY], (), provenance)

    def _sample(self, sample_id: str, candidate: Candidate, size: tuple[int, int]) -> JoinedSample:
        rows = {}
        for table, recipe in self._recipes.items():
            keys = candidate.caption_keys if table == "text" else (candidate.image_key,)
            for f in recipe.fields:
                rows[_member(recipe, f, self._recipes)] = [self._row(table, f, key) for key in keys]
        info: dict[str, Any] = {
            "id": sample_id,
            "name": candidate.name,
            "image_key": candidate.image_key.hex(),
            "captions": list(candidate.captions),
            "caption_keys": [key.hex() for key in candidate.caption_keys],
            "width": size[0],
            "height": size[1],
        }
        return JoinedSample(id=sample_id, captions=candidate.captions, info=info, rows=rows)

    def _row(self, table: str, field: Field, key: bytes) -> np.ndarray:
        [position] = self._stored[table].find([key])
        if position < 0:
            raise CacheIncompleteError(f"{self._cache}: {table} lacks the row {key.hex()}; build again to encode it")
        rows, _ = gather(self._files[table, field.name], self._stored[table].entries[[position]], np.empty)
        return rows if field.ragged else rows[0]

    def _commit(
        self,
        recipe: Recipe,
        name: str,
        samples: Sequence[JoinedSample],
        keys: Sequence[Mapping[str, Sequence[bytes]]],
        joined: Sequence[bytes],
        absent: Sequence[str],
        provenance: Mapping[str, str],
    ) -> None:
        folder = self._cache / recipe.directory
        folder.mkdir(exist_ok=True)
        if not samples:
            record_commit(folder, name, recipe, absent=absent, provenance=provenance)
            return
        discard_uncommitted(folder, name)
        temporary = temporary_path(folder)
        size = sum(row.nbytes for sample in samples for rows in sample.rows.values() for row in rows)
        with writing(folder / f"{name}.tar", size):
            try:
                placed = write_tar(temporary, samples)
                publish(temporary, folder / f"{name}.tar")
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        paths = [folder / f"{name}.tar", folder / side_name(name)]
        write_npy(paths[1], np.frombuffer(b"".join(joined), np.uint8).reshape(-1, 16))
        for table, table_recipe in self._recipes.items():
            side = _side_rows(table_recipe, self._recipes, samples, keys, placed)
            if side is not None:
                paths.append(folder / side_name(name, table))
                write_npy(paths[-1], side)
        record_commit(
            folder,
            name,
            recipe,
            rows=len(samples),
            data=f"{name}.tar",
            paths=paths,
            absent=absent,
            provenance=provenance,
        )


def _reserved_key(table: str) -> bytes | None:
    return {"text": EMPTY_CAPTION_KEY, "image_embeds": ZERO_IMAGE_KEY}.get(table)


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
    if not all(member in sample.rows for sample in samples for member in members.values()):
        return None
    own = [sample_keys["text" if recipe.table == "text" else "image"] for sample_keys in keys]
    flat = [key for sample_keys in own for key in sample_keys]
    side = np.zeros(len(flat), side_dtype(recipe.fields))
    side["key"] = np.frombuffer(b"".join(flat), np.uint8).reshape(-1, 16)
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


def table_states(cache: Path, form: str, recipes: Mapping[str, Recipe]) -> dict[str, TableState]:
    """What is committed of each table of a cache of the form `form`."""
    if form == "zarr":
        return {name: table_state(cache, recipe) for name, recipe in recipes.items()}
    return packed_states(cache, recipes, recipes)


def shard_recipes(form: str, recipes: Mapping[str, Recipe]) -> list[Recipe]:
    """The recipes that a cache's shard folders are named after: the tables' own, or those of the joined tars."""
    if form == "zarr":
        return list(recipes.values())
    return [joined_recipe(kind, recipes) for kind in (RESERVED, SAMPLES)]
