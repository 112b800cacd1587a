"""The samples of a cache: one image with its captions each, kept in a parquet file for people and tools.

Trainers never read it: they use the index. Ids are the image's key in hex, with "-2", "-3", … for further samples of
the same image, so an id says which picture it is and stays when others come or go.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kcache.errors import CacheCorruptError
from kcache.foreign import corrupt
from kcache.places import Place
from kcache.places.effects import write_bytes
from kcache.places.opened import opened
from kcache.store.manifest import Manifest
from kcache.store.recipe import canonical_json

if TYPE_CHECKING:
    import pyarrow

_CUT = "kcache_tokens_cut"
"""Key in the metadata of the parquet file: {key of a caption: its tokens that were cut off}, where one was too long."""
SAMPLES_PER_PART = 1 << 14
"""Samples that `read_some_samples` holds at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One image with its captions, as a source offers it, and with id and size as a cache has it."""

    name: str
    """Where it came from: the source's name for it."""
    image_key: bytes
    captions: tuple[str, ...]
    caption_keys: tuple[bytes, ...]
    id: str = ""
    """"" until it is known which samples there are: see `sample_ids`."""
    width: int = 0
    """Pixels, as seen: after EXIF orientation; 0 until they are asked for."""
    height: int = 0


class Picture(NamedTuple):
    """What is known of the picture of a sample: of millions, these are sooner made."""

    name: str
    image_key: bytes
    width: int
    height: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """An input that was found but is not offered, and why."""

    name: str
    """The input: a path relative to the source, or a row or line of a file in it."""
    stage: str
    """Where it failed, as in InputRejected; "source" for all that a source finds by itself."""
    reason: str
    """One line for a person."""


def sample_ids(image_keys: Sequence[bytes]) -> list[str]:
    """One id per sample, unique: the image's key in hex, then "-2", "-3", … where the same image comes again."""
    seen: dict[bytes, int] = {}
    ids = []
    for key in image_keys:
        seen[key] = count = seen.get(key, 0) + 1
        ids.append(key.hex() if count == 1 else f"{key.hex()}-{count}")
    return ids


def with_ids(samples: Sequence[Sample]) -> list[Sample]:
    """The samples of a cache with their ids."""
    ids = sample_ids([sample.image_key for sample in samples])
    return [
        Sample(
            id=i, name=s.name, image_key=s.image_key, captions=s.captions, caption_keys=s.caption_keys,
            width=s.width, height=s.height,
        )
        for i, s in zip(ids, samples, strict=True)
    ]  # fmt: skip


def samples_digest(samples: Sequence[Sample]) -> str:
    """sha256 (hex) of what the samples are, in order: ids, names and caption keys."""
    digest = hashlib.sha256()
    for sample in samples:
        line = [sample.id, sample.name, [key.hex() for key in sample.caption_keys]]
        digest.update(canonical_json(line).encode() + b"\n")
    return digest.hexdigest()


def _schema() -> "pyarrow.Schema":
    """The columns of the parquet file."""
    import pyarrow as pa

    return pa.schema(
        {
            "id": pa.string(),
            "name": pa.string(),
            "image_key": pa.binary(16),
            "captions": pa.list_(pa.string()),
            "caption_keys": pa.list_(pa.binary(16)),
            "width": pa.int32(),
            "height": pa.int32(),
        }
    )


def write_samples(cache: Place, samples: Sequence[Sample], cut: Mapping[bytes, int] | None = None) -> tuple[str, str]:
    """Write the samples under the name that their bytes give; returns the samples' digest and the file's.

    `cut` are the tokens of captions that were cut off, by key of the caption, as far as they were counted.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [pa.array([getattr(sample, field.name) for sample in samples], field.type) for field in _schema()]
    buffer = io.BytesIO()
    used = {key.hex() for sample in samples for key in sample.caption_keys}
    counted = {key.hex(): tokens for key, tokens in (cut or {}).items() if key.hex() in used}
    schema = _schema().with_metadata({_CUT: canonical_json(counted)} if counted else None)
    pq.write_table(pa.table(columns, schema=schema), buffer, compression="zstd")
    content = buffer.getvalue()
    file_digest = hashlib.sha256(content).hexdigest()
    path = cache / f"samples-{file_digest[:16]}.parquet"
    if not path.exists() or path.read_bytes() != content:
        write_bytes(path, content)
    return samples_digest(samples), file_digest


def read_samples(cache: Place, manifest: Manifest) -> "pyarrow.Table":
    """The samples as an Arrow table, in the cache's order; raises CacheCorruptError."""
    table = stored_samples(cache, manifest)
    _check_count(cache, manifest, len(table))
    return table


def _samples_path(cache: Place, manifest: Manifest) -> Place:
    return cache / manifest.samples_file


def stored_samples(cache: Place, manifest: Manifest) -> "pyarrow.Table":
    """The samples as `read_samples` gives them, however many the manifest counts; raises CacheCorruptError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = _samples_path(cache, manifest)
    with _reading(path):
        content = path.read_bytes()
        _check_digest(hashlib.sha256(content).hexdigest(), manifest)
        # Arrow's threads may still hold `content` when a short process ends, and then abort it.
        table = pq.read_table(pa.BufferReader(content), use_threads=False, pre_buffer=False)
        _check_schema(table.schema)
        _check_values(table)
    return table


def read_cut(cache: Place, manifest: Manifest) -> dict[bytes, int]:
    """Tokens of captions that were cut off, by key of the caption, as far as counted; raises CacheCorruptError."""
    import pyarrow.parquet as pq

    path = _samples_path(cache, manifest)
    with _reading(path):
        with opened(path) as file:
            told = json.loads((pq.read_schema(file).metadata or {}).get(_CUT.encode(), b"{}"))
        if not all(type(tokens) is int and tokens >= 0 for tokens in told.values()):
            raise ValueError("its metadata does not say how many tokens were cut off")
        return {bytes.fromhex(key): tokens for key, tokens in told.items()}


def short_sides(cache: Place, manifest: Manifest) -> np.ndarray:
    """(N,) the shorter side of each sample's picture, in pixels; raises CacheCorruptError."""
    import pyarrow.parquet as pq

    path = _samples_path(cache, manifest)
    with _reading(path), opened(path) as file:
        table = pq.read_table(file, columns=["width", "height"], use_threads=False, pre_buffer=False)
        return np.minimum(table["width"].to_numpy(), table["height"].to_numpy())


def sample_list(table: "pyarrow.Table") -> list[Sample]:
    """The samples in an Arrow table, as `stored_samples` gives it."""
    columns = table.to_pydict()
    return [
        Sample(**{**dict(zip(columns, row, strict=True)), "captions": tuple(row[3]), "caption_keys": tuple(row[4])})
        for row in zip(*columns.values(), strict=True)
    ]


def picture_list(table: "pyarrow.Table") -> list[Picture]:
    """The pictures of the samples in such a table."""
    return list(map(Picture._make, zip(*(table[name].to_pylist() for name in Picture._fields), strict=True)))


def sizes_by_key(table: "pyarrow.Table") -> dict[bytes, tuple[int, int]]:
    """Width and height of the pictures of samples, by image key."""
    keys, widths, heights = (table[name].to_pylist() for name in ("image_key", "width", "height"))
    return dict(zip(keys, zip(widths, heights, strict=True), strict=True))


def read_some_samples(
    cache: Place, manifest: Manifest, numbers: np.ndarray, columns: Sequence[str]
) -> list[dict[str, Any]]:
    """What `columns` say of the samples `numbers` (k,) int64, which ascend, of a list of any length.

    The file is read and checked part by part, and never in memory as a whole. Raises CacheCorruptError.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, rows, seen = _samples_path(cache, manifest), list[dict[str, Any]](), 0
    with _reading(path):
        with opened(path) as file:
            _check_digest(hashlib.file_digest(file, "sha256").hexdigest(), manifest)
        with opened(path) as file, pq.ParquetFile(file, buffer_size=1 << 16, pre_buffer=False) as parquet:
            _check_schema(parquet.schema_arrow)
            for batch in parquet.iter_batches(SAMPLES_PER_PART, columns=list(columns), use_threads=False):
                part = pa.Table.from_batches([batch])
                _check_values(part)
                first, last = np.searchsorted(numbers, (seen, seen + len(part)))
                rows += part.take(numbers[first:last] - seen).to_pylist()
                seen += len(part)
    _check_count(cache, manifest, seen)
    return rows


@contextmanager
def _reading(path: Place) -> Iterator[None]:
    """Raise CacheCorruptError for whatever is wrong with the file of the samples."""
    import pyarrow as pa

    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:
        raise corrupt(error, path, "build the cache again to write it anew") from error


def _check_digest(found: str, manifest: Manifest) -> None:
    if found != manifest.samples_file_digest:
        raise ValueError(f"its sha256 is {found[:16]}…, the manifest says {manifest.samples_file_digest[:16]}…")


def _check_schema(schema: "pyarrow.Schema") -> None:
    if not schema.equals(_schema()):
        raise ValueError(f"its columns are {schema.to_string(show_schema_metadata=False)}")


def _check_values(table: "pyarrow.Table") -> None:
    import pyarrow as pa
    import pyarrow.compute as pc

    table.validate(full=True)  # parquet's strings need not be UTF-8
    in_lists = [pc.list_flatten(column) for column in table.columns if pa.types.is_list(column.type)]
    if any(column.null_count for column in (*table.columns, *in_lists)):
        raise ValueError("values are missing in it")


def _check_count(cache: Place, manifest: Manifest, found: int) -> None:
    if found != manifest.samples:
        path = _samples_path(cache, manifest)
        raise CacheCorruptError(f"{path} has {found} samples; the manifest says {manifest.samples}; build again")


def read_refused(cache: Place) -> Iterator[Refusal]:
    """The inputs that the builds of a cache rejected, one by one; raises CacheCorruptError."""
    path = cache / "rejected.jsonl"
    if not path.exists():
        return
    try:
        with io.TextIOWrapper(opened(path), encoding="utf-8") as lines:
            yield from (Refusal(**json.loads(line)) for line in lines)
    except (OSError, ValueError, TypeError) as error:
        raise corrupt(error, path, "build the cache again to write it anew") from error
