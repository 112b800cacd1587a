"""A shard: an immutable run of rows of one table, which exists exactly when its commit record does.

In a table's folder, shard 00042 is three things: `00042-H/` (the data, a zarr group), `00042-H.rows.npy` (key, offset,
length and crc32c of every row and field) and `00042.json` (the commit record, created last and by one writer only). H
is a digest of all but the record: no name ever has two contents. Where whole samples make a shard, its data is
`00042-H.tar`, with a side file per table. Tables of pictures have `00042-H.sizes.npy`, too. Older shards lack the `-H`.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from kcache.disk.durable import json_bytes, npy_of, writing
from kcache.disk.fetched import read_listed
from kcache.errors import CacheBusyError, CacheCorruptError, CacheMismatchError
from kcache.foreign import corrupt
from kcache.places import Place
from kcache.places.effects import create_bytes, remove, temporary_folder, write_npy
from kcache.store.formats import zarr
from kcache.store.formats.checksums import crc32c
from kcache.store.formats.shard_files import DRAFT, CommittedFile, publish_shard
from kcache.store.formats.side_files import side_dtype, side_name, side_rows, sizes_name
from kcache.store.manifest import DATA_NAME, SCHEMA_VERSION, SHARD_NAME, check_count, check_version
from kcache.store.recipe import Recipe, canonical_json, json_digest

logger = logging.getLogger(__name__)

OFFSETS = "text_offsets"
"""Name of the array that says where each row's tokens start in a ragged field."""

_HEX_KEY = re.compile(r"[0-9a-f]{32}")
_FILE_PATH = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")


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
    schema_version: int = SCHEMA_VERSION

    @property
    def stem(self) -> str:
        """What the names of its files begin with."""
        return (self.data or self.name).removesuffix(".tar")

    def holds(self, part: str) -> bool:
        """Whether the shard has rows of the table `part`, which shards of one table ("") always have."""
        return any(file.path == side_name(self.stem, part) for file in self.files)

    @property
    def bytes(self) -> int:
        """Size of the shard's files, the commit record not counted."""
        return sum(file.bytes for file in self.files)


def commit_shard(
    folder: Place,
    name: str,
    recipe: Recipe,
    block: RowBlock,
    *,
    rejected: Sequence[Rejection] = (),
    absent: Sequence[str] = (),
    provenance: Mapping[str, str],
) -> Commit:
    """Write a shard's data and side file, named by what is in them, and last its commit record.

    A shard that is committed already stays as it is: another builder had the same work, and came first.
    """
    if (folder / f"{name}.json").is_file():
        return read_commit(folder / f"{name}.json")
    record = partial(record_commit, folder, name, recipe, rejected=rejected, absent=absent, provenance=provenance)
    if not len(block.keys):
        return record()
    arrays = {"keys": block.keys, **block.arrays}
    if block.offsets is not None:
        arrays[OFFSETS] = block.offsets
    dimensions = {field.name: zarr.field_dimensions(field) for field in recipe.fields}
    dimensions |= {"keys": ("row", "key_byte"), OFFSETS: ("row_bound",)}
    with temporary_folder(folder) as temporary:
        with writing(temporary / DRAFT, sum(array.nbytes for array in arrays.values())):
            (temporary / DRAFT).mkdir()
            zarr.write_group(temporary / DRAFT, arrays, dimensions)
        write_npy(temporary / side_name(DRAFT), side_rows(recipe.fields, block.keys, block.arrays, block.offsets))
        if block.sizes is not None:
            write_npy(temporary / sizes_name(DRAFT), block.sizes)
        stem, files = publish_shard(temporary, folder, name)
    return record(rows=len(block.keys), data=stem, files=files)


def record_commit(
    folder: Place,
    name: str,
    recipe: Recipe,
    *,
    rows: int = 0,
    data: str | None = None,
    files: Sequence[CommittedFile] = (),
    rejected: Sequence[Rejection] = (),
    absent: Sequence[str] = (),
    provenance: Mapping[str, str],
) -> Commit:
    """`write_commit` of the record of a shard of `recipe` that consists of `files`, which are in `folder`."""
    commit = Commit(
        name=name, fingerprint=recipe.fingerprint, rows=rows, data=data, files=tuple(files),
        rejected=tuple(rejected), absent=tuple(absent), provenance=dict(provenance),
    )  # fmt: skip
    return write_commit(folder, commit)


def write_commit(folder: Place, commit: Commit) -> Commit:
    """Create a commit record, which makes the files that it names a shard; returns the one that is there then.

    That is another writer's who came first: its shard stays, and what this one made of it is no part of the cache.
    """
    path = folder / f"{commit.name}.json"
    if create_bytes(path, json_bytes(record_json(commit))):
        if all((folder / file.path).is_file() for file in commit.files):
            return commit
        remove(path)
        raise CacheBusyError(
            f"files of {folder / commit.stem} were removed before they were committed; expected no `kcache cache-gc` a "
            "day after they were made; start again"
        )
    first = read_commit(path)
    if first.data != commit.data:
        told = "%s was committed by another builder first and stays; `kcache cache-gc` removes what this one made, %s"
        logger.warning(told, path, commit.data)
    return first


def record_json(commit: Commit) -> dict[str, Any]:
    """The commit record as it stands in its file, with the sha256 of all that it says."""
    body = json.loads(canonical_json(asdict(commit)))
    return {**body, "digest": json_digest(body)}


def read_commits(folder: Place, recipe: Recipe) -> list[Commit]:
    """The commits of a table in order of shard number; raises CacheCorruptError for a damaged or foreign record."""
    if not folder.is_dir():
        return []
    paths = [path for path in folder.glob("*.json") if SHARD_NAME.fullmatch(path.stem)]
    paths.sort(key=lambda path: int(path.stem))
    contents = read_listed(folder, [path.name for path in paths])
    commits = []
    for path in paths:
        commit = _parsed(path, partial(next, contents))
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


def read_side_files(folder: Place, commits: Sequence[Commit], recipe: Recipe, part: str = "") -> Iterator[np.ndarray]:
    """Key and locators of each shard's rows (of the table `part`), checked against the commit records."""
    dtype = side_dtype(recipe.fields)
    paths = [folder / side_name(commit.stem, part) for commit in commits]
    contents = read_listed(folder, [path.name for path in paths])
    for path, commit in zip(paths, commits, strict=True):
        record = next((file for file in commit.files if file.path == path.name), None)
        try:
            content = next(contents)
            rows = npy_of(content, path.name)
        except (OSError, ValueError) as error:
            raise corrupt(error, path, f"remove {commit.name}.json beside it and build again") from error
        if record is None or len(content) != record.bytes or crc32c(content) != record.crc32c:
            raise CacheCorruptError(
                f"{path} differs from what was committed (found {len(content)} bytes, crc32c {crc32c(content):08x}); "
                f"remove {commit.name}.json beside it and build again to encode its rows anew"
            )
        if rows.dtype != dtype or rows.ndim != 1:
            raise CacheCorruptError(f"{path} holds {rows.shape} of {rows.dtype}; expected rows of {dtype}")
        yield rows


def read_commit(path: Place) -> Commit:
    """The commit record at `path`; raises CacheCorruptError when it is not as it was written."""
    return _parsed(path, path.read_bytes)


def _parsed(path: Place, read: Callable[[], bytes]) -> Commit:
    try:
        data = json.loads(read())
        if data.pop("digest") != json_digest(data):
            raise ValueError("its digest does not match its content")
        check_version(path, data["schema_version"])
        data["files"] = tuple(CommittedFile(**file) for file in data["files"])
        data["rejected"] = tuple(Rejection(**rejection) for rejection in data["rejected"])
        data["absent"] = tuple(data["absent"])
        commit = Commit(**data)
        _check(commit)
    except CacheMismatchError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise corrupt(error, path, "remove this commit record and build again") from error
    if commit.name != path.stem:
        raise CacheCorruptError(f"commit record {path} is of shard {commit.name}; remove it and build again")
    return commit


def _check(commit: Commit) -> None:
    """Raise ValueError or TypeError for a record that could lead out of the folder, or is not of the right types."""
    named = None if commit.data is None else DATA_NAME.fullmatch(commit.data)
    by_number = named is not None and (named[1] == commit.name and (named[2] is None) == (commit.schema_version == 1))
    if not SHARD_NAME.fullmatch(commit.name) or not (commit.data is None or by_number):
        raise ValueError(f"shard {commit.name!a} with data in {commit.data!a}")
    check_count(commit.rows, *(count for file in commit.files for count in (file.bytes, file.crc32c)))
    own = (f"{commit.stem}/", f"{commit.stem}.")
    for path in (file.path for file in commit.files):
        if not _FILE_PATH.fullmatch(path) or ".." in path.split("/") or not path.startswith(own):
            raise ValueError(f"{path!a} is no file of a shard")
    for key in (*commit.absent, *(rejection.key for rejection in commit.rejected)):
        if not _HEX_KEY.fullmatch(key):
            raise ValueError(f"{key!a} is no key")
    texts = [commit.fingerprint, *commit.provenance.values()]
    texts += [text for rejection in commit.rejected for text in (rejection.stage, rejection.reason)]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("its fingerprint, provenance, stages or reasons are not text")
