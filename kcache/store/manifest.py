"""The manifest: the one JSON file that makes a folder a cache, written last and replaced by one rename."""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kcache.config.shapes import ShapeSet
from kcache.disk.durable import json_bytes
from kcache.errors import CacheCorruptError, CacheMismatchError, CacheNotFoundError
from kcache.foreign import check_withheld
from kcache.hints import instead_of_cache
from kcache.places import Place
from kcache.places.effects import swap_bytes
from kcache.store.recipe import (
    SHARD_FOLDER,
    STORED_DTYPES,
    TABLE_NAME,
    Recipe,
    canonical_json,
    controls_of,
    json_digest,
    kind_of,
)
from kcache.store.shaped.wants import Wants, in_order, squares_of, tables_of

MANIFEST = "manifest.json"
SCHEMA_VERSION = 2
"""Raised by one whenever the bytes on disk of an unchanged recipe would change, or an old reader would read wrongly."""
SHAPES_VERSION = SCHEMA_VERSION + 1
"""That of caches with shapes that are no plain squares, or with mirrored pictures; their shards are as before."""
CONTROLS_VERSION = SHAPES_VERSION + 1
"""That of caches with control images, whose rows are packed."""
RECORD_VERSIONS = (1, SCHEMA_VERSION)
"""Those of plans and commit records that are read: in the first, shards are named by their number alone."""
SCHEMA_VERSIONS = (*RECORD_VERSIONS, SHAPES_VERSION, CONTROLS_VERSION)
"""Those of manifests that are read."""
SHARD_NAME = re.compile(r"[0-9]{5,18}")
DATA_NAME = re.compile(rf"({SHARD_NAME.pattern})(-[0-9a-f]{{16}})?(\.tar)?")
"""Name of a shard's data: its number, from version 2 on a digest of its files, and what says that it is a tar."""
_NOT_NUMBER = re.compile(r"[-.].*")
_DATA = re.compile(rf"{SHARD_FOLDER.pattern}/{DATA_NAME.pattern}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """A committed shard: the index refers to it by its position in the manifest."""

    name: str
    data: str
    """Where its data stands, from the cache's folder: "latents-768-1a2b3c4d/00000-0123456789abcdef", "….tar"."""
    rows: int
    bytes: int

    @property
    def label(self) -> str:
        """What it is called, by folder and number: "latents-768-1a2b3c4d/00000"."""
        return f"{self.data.partition('/')[0]}/{self.name}"


@dataclass(frozen=True, kw_only=True, slots=True)
class TableEntry:
    """A table of the cache: its recipe and its shards."""

    recipe: Recipe
    rows: int
    """Rows in all shards, those that no sample uses any more included."""
    bytes: int
    shards: tuple[ShardEntry, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What is in a cache."""

    format: str
    """The form of the shards: "zarr" or "webdataset"."""
    tables: Mapping[str, TableEntry]
    samples: int
    samples_digest: str
    """sha256 (hex) of the samples' ids, keys and names, in order."""
    samples_file_digest: str
    """sha256 (hex) of the bytes of the parquet file with the samples; also part of its name."""
    index_digest: str
    """sha256 (hex) of the index arrays; also part of the index folder's name."""
    rejected: int
    """Inputs of the source that are not in the cache; rejected.jsonl names each."""
    rejected_digest: str
    """sha256 (hex) of the bytes of rejected.jsonl."""
    models: Mapping[str, Mapping[str, str | None]]
    """Where the encoders came from: {"prior": {"name": …, "revision": …}, "decoder": …}. Shown, never compared."""
    shapes: tuple[ShapeSet, ...] = ()
    """What pictures are cropped to, by resolution; () for the plain square of each table of latents."""
    flip: bool = False
    """Whether there are rows of the mirrored pictures."""

    @property
    def shape_sets(self) -> tuple[ShapeSet, ...]:
        """What pictures are cropped to, by resolution, squares first."""
        return self.shapes or squares_of(self.tables)

    @property
    def wants(self) -> Wants:
        """Which rows the tables have of the samples."""
        return Wants(self.shape_sets, self.flip, controls_of(self.tables))

    @property
    def samples_file(self) -> str:
        """Name of the parquet file with one row per sample."""
        return f"samples-{self.samples_file_digest[:16]}.parquet"

    @property
    def index_folder(self) -> str:
        """Name of the folder with the memory-mapped join."""
        return f"index-{self.index_digest[:16]}"

    @property
    def schema_version(self) -> int:
        """The first that says all that is in it: a cache of which nothing changed keeps its manifest, byte for byte."""
        return schema_of(self.tables, self.shapes, self.flip)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of what a training run sees: the recipes, the samples, and which shapes these have."""
        recipes = {name: entry.recipe.fingerprint for name, entry in self.tables.items()}
        parts = [recipes, self.samples_digest]
        return json_digest(parts if self.schema_version < SHAPES_VERSION else [*parts, self._shapes_json(), self.flip])

    def _shapes_json(self) -> list[dict[str, Any]]:
        return [asdict(each) for each in self.shape_sets]

    def to_json(self) -> dict[str, Any]:
        """The manifest as it stands on disk, with the sha256 of all that it says."""
        data = {"schema_version": self.schema_version, **asdict(self), "shapes": self._shapes_json()}
        if self.schema_version < SHAPES_VERSION:
            del data["shapes"], data["flip"]
        for name, entry in self.tables.items():
            data["tables"][name]["recipe"] = entry.recipe.to_json()
            data["tables"][name]["fingerprint"] = entry.recipe.fingerprint
        body = json.loads(canonical_json(data))
        return {**body, "digest": json_digest(body)}


def schema_of(tables: Mapping[str, TableEntry], shapes: Collection[ShapeSet] = (), flip: bool = False) -> int:
    """The schema version that says all of these tables: where all shards are named by number alone, the first does.

    From the second on the index, too, is in parts; the third is of what is no cache of plain squares,
    the fourth of one with control images.
    """
    if controls_of(tables):
        return CONTROLS_VERSION
    if shapes or flip:
        return SHAPES_VERSION
    shards = (shard for entry in tables.values() for shard in entry.shards)
    return SCHEMA_VERSION if any("-" in shard.data.partition("/")[2] for shard in shards) else 1


def write_manifest(cache: Place, manifest: Manifest, before: bytes | None) -> None:
    """Write the manifest of `cache` in the place of the one with the bytes `before`, None being none.

    Raises CacheBusyError where another process has changed it since, CacheWriteError or StoreError.
    """
    content = json_bytes(manifest.to_json())
    if content != before:
        swap_bytes(cache / MANIFEST, content, before)


def read_manifest(cache: Place) -> Manifest:
    """The manifest of the cache at `cache`.

    Raises CacheNotFoundError, CacheMismatchError for another schema or format, CacheCorruptError for damaged content.
    """
    path = cache / MANIFEST
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise _not_found(cache) from None
    except OSError as error:
        check_withheld(error, path)
        if (instead := instead_of_cache(cache)) is not None:
            raise CacheNotFoundError(f"{cache} is not a finished cache: {instead}") from error
        raise CacheNotFoundError(f"{path} cannot be read: {error.strerror}; expected a cache's manifest") from error
    try:
        data = json.loads(content)
        version = data["schema_version"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CacheCorruptError(
            f"{path} is not a kcache manifest ({error}); build the cache again to write it anew"
        ) from error
    check_version(path, version, SCHEMA_VERSIONS)
    try:
        return _from_json(data)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CacheCorruptError(f"{path} is damaged ({error}); build the cache again to write it anew") from error


def check_version(path: Place, version: object, known: Sequence[int] = RECORD_VERSIONS) -> None:
    """Raise CacheMismatchError for what a newer kcache, or none, has written at `path`."""
    if version not in known:
        raise CacheMismatchError(
            f"{path} has schema version {version}; this kcache reads {_listed(known)}; "
            "use the kcache that wrote it, a newer one, or build the cache again"
        )


def _listed(numbers: Sequence[int]) -> str:
    return " and ".join([", ".join(map(str, numbers[:-1])), str(numbers[-1])])


def _from_json(data: dict[str, Any]) -> Manifest:
    digest = data.pop("digest")
    if digest != json_digest(data):
        raise ValueError("its digest does not match its content")
    version, tables = data.pop("schema_version"), {}
    for name, entry in data.pop("tables").items():
        shards = tuple(_shard(shard) for shard in entry["shards"])
        recipe = Recipe.from_json(entry["recipe"])
        if not TABLE_NAME.fullmatch(name) or recipe.table != name or recipe.stored_dtype not in STORED_DTYPES:
            raise ValueError(f"{name!a} is no table of {recipe.stored_dtype!a} rows")
        check_count(entry["rows"], entry["bytes"])
        tables[name] = TableEntry(recipe=recipe, rows=entry["rows"], bytes=entry["bytes"], shards=shards)
    if (version >= SHAPES_VERSION) != ("shapes" in data):
        raise ValueError(f"schema version {version} {'with' if 'shapes' in data else 'without'} shapes")
    data["shapes"] = shapes_to_note([shape_set(each) for each in data.get("shapes", ())])
    manifest = Manifest(tables=tables, **data)
    _check(manifest)
    return manifest


def shapes_to_note(sets: Iterable[ShapeSet]) -> tuple[ShapeSet, ...]:
    """What `Manifest.shapes` has of the sets of a cache: (), where all are plain squares, which their tables say."""
    ordered = in_order(list(sets))
    return () if all(each.is_square for each in ordered) else ordered


def shape_set(data: Mapping[str, Any]) -> ShapeSet:
    """The set that a file tells of; raises KeyError, TypeError or ValueError on foreign data."""
    shapes = tuple((height, width) for height, width in data["shapes"])
    return ShapeSet(data["resolution"], shapes, data["max_upscale"])


def _shard(data: Mapping[str, Any]) -> ShardEntry:
    shard = ShardEntry(**data)
    place = _DATA.fullmatch(shard.data)
    # Part of a path: it must not be able to lead out of the cache.
    if not SHARD_NAME.fullmatch(shard.name) or place is None or place[2] != shard.name:
        raise ValueError(f"shard {shard.name!a} with data in {shard.data!a}")
    check_count(shard.rows, shard.bytes)
    return shard


def _check(manifest: Manifest) -> None:
    check_count(manifest.samples, manifest.rejected)
    digests = (manifest.samples_digest, manifest.samples_file_digest, manifest.rejected_digest, manifest.index_digest)
    for digest in digests:
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"{digest!a} is no digest")
    _check_shapes(manifest)
    for role, model in manifest.models.items():
        if not isinstance(model["name"], str) or not isinstance(model["revision"], str | None):
            raise ValueError(f"{model!a} says not where the {role} comes from")


def _check_shapes(manifest: Manifest) -> None:
    """Raise ValueError where a shape has no table, a table of latents no shape, or a resolution two sets of shapes."""
    named = set(tables_of(manifest.shape_sets, controls_of(manifest.tables)))
    held = {name for name in manifest.tables if kind_of(name).sided}
    if named != held or type(manifest.flip) is not bool:
        raise ValueError(f"{sorted(held)} are not the tables of {sorted(named)}")
    buckets = [each.resolution for each in manifest.shape_sets if not each.is_square]
    if len(buckets) != len(set(buckets)):
        raise ValueError(f"several sets of shapes for one resolution, of {buckets}")


def shard_number(file: str) -> str:
    """The number of the shard that a file in a table's folder is of, by its name; "" for what begins with a dot."""
    return _NOT_NUMBER.sub("", file)


def check_count(*counts: object) -> None:
    """Raise ValueError for what a file gives as a number of rows or bytes and cannot be one."""
    if not all(type(count) is int and 0 <= count < 1 << 62 for count in counts):
        raise ValueError(f"{counts!a} are no counts")


def _not_found(cache: Place) -> CacheNotFoundError:
    if not (cache / "plans").is_dir() and (instead := instead_of_cache(cache)) is not None:
        return CacheNotFoundError(f"{cache} is not a finished cache: {instead}")
    if not cache.exists():
        found = "there is nothing at that path"
    elif (cache / "plans").is_dir():
        found = "a build was started there and has not finished"
    else:
        found = f"there is no {MANIFEST} in it"
    return CacheNotFoundError(f"{cache} is not a finished cache: {found}; run `kcache cache-build SOURCE {cache}`")
