"""The manifest: the one JSON file that makes a folder a cache, written last and replaced by one rename."""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from kcache.config import COMPUTE_DTYPES, BuildConfig
from kcache.disk.durable import json_bytes
from kcache.errors import CacheCorruptError, CacheMismatchError, CacheNotFoundError
from kcache.foreign import check_withheld
from kcache.hints import instead_of_cache
from kcache.places import Place
from kcache.places.effects import swap_bytes
from kcache.store.recipe import (
    KINDS,
    SHARD_FOLDER,
    STORED_DTYPES,
    TABLE_NAME,
    Recipe,
    canonical_json,
    json_digest,
    sides_of,
    stage_of,
)

MANIFEST = "manifest.json"
SCHEMA_VERSION = 2
"""Raised by one whenever the bytes on disk of an unchanged recipe would change, or an old reader would read wrongly."""
SCHEMA_VERSIONS = (1, SCHEMA_VERSION)
"""Those that are read: in the first, shards are named by their number alone."""
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
        return schema_of(self.tables)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of what a training run sees: the recipes and the samples."""
        recipes = {name: entry.recipe.fingerprint for name, entry in self.tables.items()}
        return json_digest([recipes, self.samples_digest])

    def to_json(self) -> dict[str, Any]:
        """The manifest as it stands on disk, with the sha256 of all that it says."""
        data = {"schema_version": self.schema_version, **asdict(self)}
        for name, entry in self.tables.items():
            data["tables"][name]["recipe"] = entry.recipe.to_json()
            data["tables"][name]["fingerprint"] = entry.recipe.fingerprint
        body = json.loads(canonical_json(data))
        return {**body, "digest": json_digest(body)}


def schema_of(tables: Mapping[str, TableEntry]) -> int:
    """The schema version that says all of these tables: where all shards are named by number alone, the first does.

    From the second on the index, too, is in parts.
    """
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
    check_version(path, version)
    try:
        return _from_json(data)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CacheCorruptError(f"{path} is damaged ({error}); build the cache again to write it anew") from error


def check_version(path: Place, version: object) -> None:
    """Raise CacheMismatchError for what a newer kcache, or none, has written at `path`."""
    if version not in SCHEMA_VERSIONS:
        raise CacheMismatchError(
            f"{path} has schema version {version}; this kcache reads {' and '.join(map(str, SCHEMA_VERSIONS))}; "
            "use the kcache that wrote it, a newer one, or build the cache again"
        )


def _from_json(data: dict[str, Any]) -> Manifest:
    digest = data.pop("digest")
    if digest != json_digest(data):
        raise ValueError("its digest does not match its content")
    data.pop("schema_version")
    tables = {}
    for name, entry in data.pop("tables").items():
        shards = tuple(_shard(shard) for shard in entry["shards"])
        recipe = Recipe.from_json(entry["recipe"])
        if not TABLE_NAME.fullmatch(name) or recipe.table != name or recipe.stored_dtype not in STORED_DTYPES:
            raise ValueError(f"{name!a} is no table of {recipe.stored_dtype!a} rows")
        check_count(entry["rows"], entry["bytes"])
        tables[name] = TableEntry(recipe=recipe, rows=entry["rows"], bytes=entry["bytes"], shards=shards)
    manifest = Manifest(tables=tables, **data)
    _check(manifest)
    return manifest


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
    for role, model in manifest.models.items():
        if not isinstance(model["name"], str) or not isinstance(model["revision"], str | None):
            raise ValueError(f"{model!a} says not where the {role} comes from")


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


def recorded_config(manifest: Manifest) -> BuildConfig:
    """The settings behind the recipes of a manifest, as far as one set of settings can have made them all."""
    recipes = [entry.recipe for entry in manifest.tables.values()]
    alphas = [recipe.preprocess["alpha"] for recipe in recipes if "alpha" in recipe.preprocess]
    precisions = {dtype: name for name, dtype in COMPUTE_DTYPES.items()}
    settings: dict[str, Any] = {
        "stage": stage_of(manifest.tables),
        "format": manifest.format,
        "resolution": tuple(sides_of(manifest.tables)) or BuildConfig.resolution,
        "alpha": alphas[0] if alphas else BuildConfig.alpha,
        "color": "srgb" if any(r.preprocess.get("color") == "srgb" for r in recipes) else "as-is",
        "text_padding": "trimmed" if any("pad_to_multiple_of" in r.preprocess for r in recipes) else "full",
        **{MODEL_SETTINGS[role]: model["name"] for role, model in manifest.models.items()},
    }
    for recipe in recipes[:1]:
        settings |= {
            "dtype": recipe.stored_dtype,
            "mixed_precision": precisions.get(recipe.compute_dtype, "no"),
            "batch_size": recipe.batch_shape[0],
        }
    return BuildConfig(**settings)


def build_line(folder: Place, manifest: Manifest, field: str, resolution: int | None = None) -> str:
    """The command that adds the table of `field`, with the settings that the cache at `folder` was built with."""
    tables = [*manifest.tables, *(kind.name for kind in KINDS if field in kind.fields)]
    stage, sides = stage_of(tables), {*sides_of(manifest.tables), *([] if resolution is None else [resolution])}
    config = replace(recorded_config(manifest), stage=stage, resolution=tuple(sorted(sides)) or BuildConfig.resolution)
    words = ["kcache", "cache-build", "SOURCE", str(folder)]
    for name in _BUILD_FLAGS:
        value = getattr(config, name)
        if value != getattr(BuildConfig, name):
            for given in value if isinstance(value, tuple) else (value,):
                words += ["--" + name.replace("_", "-"), str(given)]
    return shlex.join(words)


MODEL_SETTINGS = {
    "prior": "pretrained_prior_model_name_or_path",
    "decoder": "pretrained_decoder_model_name_or_path",
}
"""The setting, of a build and of a run, that names the repository of each role of `models`."""
_BUILD_FLAGS = (
    "stage", "format", *MODEL_SETTINGS.values(), "dtype", "mixed_precision", "batch_size", "alpha", "text_padding",
    "resolution",
)  # fmt: skip
"""What decides which tables a build makes, and their recipes."""
