"""A shard: an immutable run of rows of one table, which exists exactly when its commit record does.

In a table's folder, shard 00042 is three things: `00042/` (the data, a zarr group), `00042.rows.npy` (key, offset,
length and crc32c of every row and field) and `00042.json` (the commit record, written last). Where whole samples make
a shard, its data is `00042.tar`, with a side file per table. Tables of pictures have `00042.sizes.npy`, too.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from kcache.disk.durable import publish, read_npy, remove, temporary_folder, write_json, write_npy, writing
from kcache.errors import CacheCorruptError
from kcache.foreign import corrupt
from kcache.store.checksums import crc32c
from kcache.store.digests import pack_keys
from kcache.store.formats import zarr
from kcache.store.manifest import SHARD_NAME, check_count
from kcache.store.recipe import SCHEMA_VERSION, Field, Recipe, canonical_json, json_digest

OFFSETS = "text_offsets"
"""Name of the array that says where each row's tokens start in a ragged field."""

LOCATOR = np.dtype([("offset", "<u8"), ("length", "<u4"), ("crc32c", "<u4")])
"""Where one row of one field stands in its file: offset and payload length in bytes, crc32c of the payload."""

DECODER = ("kcache", "pillow", "formats")
"""What of the provenance decides which inputs can be decoded."""
SIZES = np.dtype([("key", "u1", (16,)), ("width", "<i4"), ("height", "<i4")])
"""The key of a row, and the size in pixels of its picture as it was decoded, upright; 0 for the reserved row."""

_HEX_KEY = re.compile(r"[0-9a-f]{32}")
_FILE_PATH = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")


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
    sizes: np.ndarray | None = None
    """(n,) of SIZES, where rows are of pictures."""


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
    """Write a shard's data and side file, each under a temporary name first, and last its commit record.

    A shard that is committed already stays as it is: another builder had the same work, and came first.
    """
    if (folder / f"{name}.json").exists():
        return read_commit(folder / f"{name}.json")
    if not len(block.keys):
        return record_commit(folder, name, recipe, rejected=rejected, absent=absent, provenance=provenance)
    discard_uncommitted(folder, name)
    arrays = {"keys": block.keys, **block.arrays}
    if block.offsets is not None:
        arrays[OFFSETS] = block.offsets
    dimensions = {field.name: zarr.field_dimensions(field) for field in recipe.fields}
    dimensions |= {"keys": ("row", "key_byte"), OFFSETS: ("row_bound",)}
    with writing(folder / name, sum(array.nbytes for array in arrays.values())), temporary_folder(folder) as temporary:
        zarr.write_group(temporary, arrays, dimensions)
        publish(temporary, folder / name)
    sides = {folder / side_name(name): _side_rows(recipe, block)}
    if block.sizes is not None:
        sides[folder / sizes_name(name)] = block.sizes
    for path, rows in sides.items():
        write_npy(path, rows)
    paths = [path for path in sorted((folder / name).rglob("*")) if path.is_file()]
    return record_commit(
        folder, name, recipe, rows=len(block.keys), data=name, paths=[*paths, *sides],
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
    write_commit(folder, commit)
    return commit


def write_commit(folder: Path, commit: Commit) -> None:
    """Write a commit record, which makes the files that it names a shard."""
    write_json(folder / f"{commit.name}.json", record_json(commit))


def record_json(commit: Commit) -> dict[str, Any]:
    """The commit record as it stands on disk, with the sha256 of all that it says."""
    body = json.loads(canonical_json({"schema_version": SCHEMA_VERSION, **asdict(commit)}))
    return {**body, "digest": json_digest(body)}


def record_rejections(
    folder: Path, recipe: Recipe, rejected: Sequence[Rejection], provenance: Mapping[str, str]
) -> None:
    """Commit, as a shard without rows, the rejections by this decoder that commit records in `folder` lack."""
    commits = read_commits(folder, recipe)
    alike = [c for c in commits if all(c.provenance.get(name) == provenance.get(name) for name in DECODER)]
    known = {rejection.key: rejection for commit in alike for rejection in commit.rejected}
    new = {rejection.key: rejection for rejection in rejected if rejection != known.get(rejection.key)}
    if new:
        folder.mkdir(exist_ok=True)
        rejections = [new[key] for key in sorted(new)]
        record_commit(folder, f"{next_shard(commits):05d}", recipe, rejected=rejections, provenance=provenance)


def side_name(shard: str, part: str = "") -> str:
    """Name of a shard's side file; `part` names the table where shards hold several."""
    return f"{shard}.{part}.rows.npy" if part else f"{shard}.rows.npy"


def sizes_name(shard: str) -> str:
    """Name of the file with the sizes of the pictures behind a shard's rows."""
    return f"{shard}.sizes.npy"


def size_rows(keys: Sequence[bytes], sizes: Mapping[bytes, tuple[int, int]]) -> np.ndarray:
    """(n,) of SIZES for the rows of `keys`, 0 where `sizes`, width and height by key, have none."""
    rows = np.zeros(len(keys), SIZES)
    rows["key"] = pack_keys(keys)
    rows["width"], rows["height"] = np.array([sizes.get(key, (0, 0)) for key in keys], np.int32).reshape(-1, 2).T
    return rows


def read_commits(folder: Path, recipe: Recipe) -> list[Commit]:
    """The commits of a table in order of shard number; raises CacheCorruptError for a damaged or foreign record."""
    if not folder.is_dir():
        return []
    names = sorted((int(path.stem), path) for path in folder.glob("*.json") if SHARD_NAME.fullmatch(path.stem))
    commits = []
    for _, path in names:
        commit = read_commit(path)
        if commit.fingerprint != recipe.fingerprint:
            raise CacheCorruptError(
                f"commit record {path} is of a table with fingerprint {commit.fingerprint[:8]}; "
                f"expected {recipe.fingerprint[:8]}; remove it and build again"
            )
        commits.append(commit)
    return commits


def next_shard(commits: Sequence[Commit]) -> int:
    """Number of the shard after the last of `commits`."""
    return 1 + max((int(commit.name) for commit in commits), default=-1)


def read_side_file(folder: Path, commit: Commit, recipe: Recipe, part: str = "") -> np.ndarray:
    """Key and locators of a shard's rows (of the table `part`), checked against the commit record."""
    dtype = side_dtype(recipe.fields)
    path = folder / side_name(commit.name, part)
    record = next((file for file in commit.files if file.path == path.name), None)
    try:
        content, rows = path.read_bytes(), read_npy(path)
    except (OSError, ValueError) as error:
        raise corrupt(error, path, f"remove {commit.name}.json beside it and build again") from error
    if record is None or len(content) != record.bytes or crc32c(content) != record.crc32c:
        raise CacheCorruptError(
            f"{path} differs from what was committed (found {len(content)} bytes, crc32c {crc32c(content):08x}); "
            f"remove {commit.name}.json beside it and build again to encode its rows anew"
        )
    if rows.dtype != dtype or rows.ndim != 1:
        raise CacheCorruptError(f"{path} holds {rows.shape} of {rows.dtype}; expected rows of {dtype}")
    return rows


def read_commit(path: Path) -> Commit:
    """The commit record at `path`; raises CacheCorruptError when it is not as it was written."""
    try:
        data = json.loads(path.read_bytes())
        if data.pop("digest") != json_digest(data):
            raise ValueError("its digest does not match its content")
        if data.pop("schema_version") != SCHEMA_VERSION:
            raise ValueError("written by another version of kcache")
        data["files"] = tuple(CommittedFile(**file) for file in data["files"])
        data["rejected"] = tuple(Rejection(**rejection) for rejection in data["rejected"])
        data["absent"] = tuple(data["absent"])
        commit = Commit(**data)
        _check(commit)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise corrupt(error, path, "remove this commit record and build again") from error
    if commit.name != path.stem:
        raise CacheCorruptError(f"commit record {path} is of shard {commit.name}; remove it and build again")
    return commit


def _check(commit: Commit) -> None:
    """Raise ValueError or TypeError for a record that could lead out of the folder, or is not of the right types."""
    name = commit.name
    if not SHARD_NAME.fullmatch(name) or commit.data not in (None, name, f"{name}.tar"):
        raise ValueError(f"shard {name!a} with data in {commit.data!a}")
    check_count(commit.rows, *(count for file in commit.files for count in (file.bytes, file.crc32c)))
    for path in (file.path for file in commit.files):
        if not _FILE_PATH.fullmatch(path) or ".." in path.split("/"):
            raise ValueError(f"{path!a} is no file of a shard")
    for key in (*commit.absent, *(rejection.key for rejection in commit.rejected)):
        if not _HEX_KEY.fullmatch(key):
            raise ValueError(f"{key!a} is no key")
    texts = [commit.fingerprint, *commit.provenance.values()]
    texts += [text for rejection in commit.rejected for text in (rejection.stage, rejection.reason)]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("its fingerprint, provenance, stages or reasons are not text")


def discard_uncommitted(folder: Path, name: str) -> None:
    """Remove what a killed builder renamed into place but did not commit."""
    for path in [folder / name, *folder.glob(f"{name}.*")]:
        remove(path)


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
