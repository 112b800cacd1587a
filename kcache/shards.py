"""A shard: an immutable run of rows of one table, which exists exactly when its commit record does.

In a table's folder, shard 00042 is three things: `00042/` (the data, a zarr group), `00042.rows.npy` (key, offset,
length and crc32c of every row and field) and `00042.json` (the commit record, written last).
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from crc32c import crc32c

from kcache.durable import publish, remove, temporary_path, write_json, write_npy
from kcache.errors import CacheCorruptError
from kcache.formats import zarr
from kcache.recipe import SCHEMA_VERSION, Field, Recipe

__all__ = [
    "LOCATOR",
    "OFFSETS",
    "Commit",
    "CommittedFile",
    "Rejection",
    "RowBlock",
    "commit_shard",
    "discard_uncommitted",
    "next_shard",
    "read_commits",
    "read_side_file",
    "record_commit",
    "side_dtype",
    "side_name",
]

OFFSETS = "text_offsets"
"""Name of the array that says where each row's tokens start in a ragged field."""

LOCATOR = np.dtype([("offset", "<u8"), ("length", "<u4"), ("crc32c", "<u4")])
"""Where one row of one field stands in its file: offset and payload length in bytes, crc32c of the payload."""


def side_dtype(fields: Sequence[Field]) -> np.dtype[np.void]:
    """Dtype of a side file's rows: the key, then a locator per field."""
    return np.dtype([("key", "u1", (16,)), *[(field.name, LOCATOR) for field in fields]])


@dataclass(frozen=True, kw_only=True, slots=True)
class RowBlock:
    """The rows of one shard in memory, in plan order."""

    keys: np.ndarray
    """(n, 16) uint8: the key of each row."""
    arrays: Mapping[str, np.ndarray]
    """Per field: (n, …) for fixed rows, (T, …) with all rows' tokens behind each other for ragged ones."""
    offsets: np.ndarray | None = None
    """(n + 1,) int64: row i of a ragged field is tokens offsets[i] to offsets[i + 1]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejection:
    """An input that cannot be a row: its key in hex, the stage that refused it and why."""

    key: str
    stage: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CommittedFile:
    """A file of a shard as it was committed."""

    path: str
    """Relative to the table's folder."""
    bytes: int
    crc32c: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """What a commit record says."""

    name: str
    """Number of the shard in its table, five digits or more."""
    fingerprint: str
    rows: int
    data: str | None
    """Folder or tar with the data; None when every input was rejected."""
    files: tuple[CommittedFile, ...]
    rejected: tuple[Rejection, ...]
    absent: tuple[str, ...]
    """Keys (hex) that the plan wanted but the source no longer had: neither stored nor rejected."""
    provenance: Mapping[str, str]

    def holds(self, part: str) -> bool:
        """Whether the shard has rows of the table `part`, which shards of one table ("") always have."""
        return any(file.path == side_name(self.name, part) for file in self.files)

    @property
    def bytes(self) -> int:
        """Size of the shard's files, the commit record not counted."""
        return sum(file.bytes for file in self.files)


def commit_shard(
    folder: Path,
    name: str,
    recipe: Recipe,
    block: RowBlock,
    *,
    rejected: Sequence[Rejection] = (),
    absent: Sequence[str] = (),
    provenance: Mapping[str, str],
) -> Commit:
    """Write a shard's data and side file, each under a temporary name first, and last its commit record."""
    if not len(block.keys):
        return record_commit(folder, name, recipe, rejected=rejected, absent=absent, provenance=provenance)
    discard_uncommitted(folder, name)
    temporary = temporary_path(folder)
    try:
        zarr.write_group(temporary, _group_arrays(block), _group_dimensions(recipe, block))
        publish(temporary, folder / name)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    write_npy(folder / side_name(name), _side_rows(recipe, block))
    paths = [path for path in sorted((folder / name).rglob("*")) if path.is_file()]
    return record_commit(
        folder, name, recipe, rows=len(block.keys), data=name, paths=[*paths, folder / side_name(name)],
        rejected=rejected, absent=absent, provenance=provenance,
    )  # fmt: skip


def record_commit(
    folder: Path,
    name: str,
    recipe: Recipe,
    *,
    rows: int = 0,
    data: str | None = None,
    paths: Sequence[Path] = (),
    rejected: Sequence[Rejection] = (),
    absent: Sequence[str] = (),
    provenance: Mapping[str, str],
) -> Commit:
    """Write a shard's commit record, which makes the files at `paths` a shard."""
    commit = Commit(
        name=name,
        fingerprint=recipe.fingerprint,
        rows=rows,
        data=data,
        files=tuple(_committed(path, folder) for path in paths),
        rejected=tuple(rejected),
        absent=tuple(absent),
        provenance=dict(provenance),
    )
    write_json(folder / f"{name}.json", {"schema_version": SCHEMA_VERSION, **asdict(commit)})
    return commit


def side_name(shard: str, part: str = "") -> str:
    """Name of a shard's side file; `part` names the table where shards hold several."""
    return f"{shard}.{part}.rows.npy" if part else f"{shard}.rows.npy"


def read_commits(folder: Path, recipe: Recipe) -> list[Commit]:
    """The commits of a table in order of shard number; raises CacheCorruptError for a damaged or foreign record."""
    if not folder.is_dir():
        return []
    names = sorted((int(path.stem), path) for path in folder.glob("*.json") if path.stem.isdecimal())
    return [_read_commit(path, recipe) for _, path in names]


def next_shard(commits: Sequence[Commit]) -> int:
    """Number of the shard after the last of `commits`."""
    return 1 + max((int(commit.name) for commit in commits), default=-1)


def read_side_file(folder: Path, commit: Commit, recipe: Recipe, part: str = "") -> np.ndarray:
    """Key and locators of a shard's rows (of the table `part`), checked against the commit record."""
    dtype = side_dtype(recipe.fields)
    path = folder / side_name(commit.name, part)
    record = next((file for file in commit.files if file.path == path.name), None)
    try:
        content = path.read_bytes()
        rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise CacheCorruptError(
            f"{path} cannot be read ({error}); remove {commit.name}.json beside it and build again"
        ) from error
    if record is None or len(content) != record.bytes or crc32c(content) != record.crc32c:
        raise CacheCorruptError(
            f"{path} differs from what was committed (found {len(content)} bytes, crc32c {crc32c(content):08x}); "
            f"remove {commit.name}.json beside it and build again to encode its rows anew"
        )
    if rows.dtype != dtype or rows.ndim != 1:
        raise CacheCorruptError(f"{path} holds {rows.shape} of {rows.dtype}; expected rows of {dtype}")
    return rows


def _read_commit(path: Path, recipe: Recipe) -> Commit:
    try:
        data = json.loads(path.read_bytes())
        if data.pop("schema_version") != SCHEMA_VERSION:
            raise ValueError("written by another version of kcache")
        data["files"] = tuple(CommittedFile(**file) for file in data["files"])
        data["rejected"] = tuple(Rejection(**rejection) for rejection in data["rejected"])
        data["absent"] = tuple(data["absent"])
        commit = Commit(**data)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CacheCorruptError(f"commit record {path} cannot be read ({error}); remove it and build again") from error
    if commit.name != path.stem or commit.fingerprint != recipe.fingerprint:
        raise CacheCorruptError(
            f"commit record {path} is of shard {commit.name}, fingerprint {commit.fingerprint[:8]}; "
            f"expected {path.stem}, {recipe.fingerprint[:8]}; remove it and build again"
        )
    return commit


def discard_uncommitted(folder: Path, name: str) -> None:
    """Remove what a killed builder renamed into place but did not commit."""
    for path in [folder / name, *folder.glob(f"{name}.*")]:
        remove(path)


def _group_arrays(block: RowBlock) -> dict[str, np.ndarray]:
    arrays = {"keys": block.keys, **block.arrays}
    if block.offsets is not None:
        arrays[OFFSETS] = block.offsets
    return arrays


def _group_dimensions(recipe: Recipe, block: RowBlock) -> dict[str, tuple[str, ...]]:
    names = {field.name: zarr.field_dimensions(field) for field in recipe.fields}
    return {**names, "keys": ("row", "key_byte"), OFFSETS: ("row_bound",)}


def _side_rows(recipe: Recipe, block: RowBlock) -> np.ndarray:
    side = np.zeros(len(block.keys), side_dtype(recipe.fields))
    side["key"] = block.keys
    for field in recipe.fields:
        array = block.arrays[field.name]
        flat = array.reshape(len(array), -1).view(np.uint8)
        row_bytes = flat.shape[1]
        bounds = block.offsets if field.ragged and block.offsets is not None else np.arange(len(side) + 1)
        side[field.name]["offset"] = zarr.row_spans(bounds[:-1], row_bytes)
        side[field.name]["length"] = np.diff(bounds) * row_bytes
        side[field.name]["crc32c"] = [crc32c(flat[a:b].reshape(-1)) for a, b in pairwise(bounds)]
    return side


def _committed(path: Path, folder: Path) -> CommittedFile:
    content = np.fromfile(path, np.uint8)
    return CommittedFile(path=path.relative_to(folder).as_posix(), bytes=content.size, crc32c=crc32c(content))
