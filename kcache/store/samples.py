"""The samples of a cache: one image with its captions each, kept in a parquet file for people and tools.

Trainers never read it: they use the index. Ids are the image's key in hex, with "-2", "-3", … for further samples of
the same image, so an id says which picture it is and stays when others come or go.
"""

import hashlib
import io
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from json.encoder import encode_basestring_ascii
from typing import TYPE_CHECKING, Any

import numpy as np

from kcache.disk.durable import new_file, writing
from kcache.errors import CacheCorruptError
from kcache.foreign import corrupt
from kcache.places import Place
from kcache.places.effects import publish, remove, temporary_folder
from kcache.places.fetching import opened_if
from kcache.places.opened import opened
from kcache.store.digests import KEY_BYTES, Keys
from kcache.store.formats.columns import (
    SAMPLES_PER_TABLE,
    Samples,
    caption_keys_of,
    sample_schema,
)
from kcache.store.formats.columns import Sample as Sample
from kcache.store.formats.columns import sample_list as sample_list
from kcache.store.formats.columns import with_ids as with_ids
from kcache.store.formats.sample_extras import extras_of, file_schema, is_file_schema, with_extras
from kcache.store.manifest import Manifest
from kcache.store.recipe import canonical_json

if TYPE_CHECKING:
    import pyarrow

_CUT = "kcache_tokens_cut"
"""Key in the metadata of the parquet file: {key of a caption: its tokens that were cut off}, where one was too long."""
_ROW_GROUP = 1 << 20
"""Samples that are written together: what pyarrow takes by itself."""
SAMPLES_PER_PART = 1 << 14
"""Samples that `read_some_samples` holds at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """An input that was found but is not offered, and why."""

    name: str
    """The input: a path relative to the source, or a row or line of a file in it."""
    stage: str
    """Where it failed, as in InputRejected; "source" for all that a source finds by itself."""
    reason: str
    """One line for a person."""


def samples_digest(samples: Sequence[Sample]) -> str:
    """sha256 (hex) of what the samples are, in order: ids, names and caption keys."""
    digest = hashlib.sha256()
    for identities in identities_of(samples):
        digest.update(b"".join(identity + b"\n" for identity in identities))
    return digest.hexdigest()


def identities_of(samples: Sequence[Sample]) -> Iterator[Iterator[bytes]]:
    """What each sample is, table by table: the canonical JSON of its id, its name, and the keys (hex) of its captions.

    Behind them stands what few say: weight, repeats, keys of control images. It is put together by hand, in a fifth of
    the time, as there may be a hundred million.
    """
    for table in Samples.of(samples).each():
        keys, bounds = caption_keys_of(table)
        digits, ends = keys.tobytes().hex(), (2 * KEY_BYTES * bounds).tolist()
        columns = (map(encode_basestring_ascii, table[name].to_pylist()) for name in ("id", "name"))
        spans_of_keys = (_quoted(digits[first:last]) for first, last in pairwise(ends))
        extras = (f",{canonical_json(said)}" if said else "" for said in extras_of(table))
        told = zip(*columns, spans_of_keys, extras, strict=True)
        yield (f"[{identity},{name},[{own}]{more}]".encode() for identity, name, own, more in told)


def _quoted(digits: str) -> str:
    """Keys, in hex, one behind the other, as JSON has them in a list."""
    return ",".join(f'"{digits[i : i + 2 * KEY_BYTES]}"' for i in range(0, len(digits), 2 * KEY_BYTES))


def write_samples(cache: Place, samples: Sequence[Sample], cut: Mapping[bytes, int] | None = None) -> tuple[str, str]:
    """Write the samples under the name that their bytes give; returns the samples' digest and the file's.

    `cut` are the tokens of captions that were cut off, by key of the caption, as far as they were counted.
    """
    import pyarrow.parquet as pq

    columns = Samples.of(samples)
    counted = _counted(columns, cut or {})
    schema = file_schema(columns).with_metadata({_CUT: canonical_json(counted)} if counted else None)
    with temporary_folder(cache) as temporary:
        made = temporary / "samples.parquet"
        with writing(made), new_file(made) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for group in columns.groups(_ROW_GROUP):
                writer.write_table(group.select(schema.names).cast(schema))
        with made.open("rb") as written:
            file_digest = hashlib.file_digest(written, "sha256").hexdigest()
        path = cache / f"samples-{file_digest[:16]}.parquet"
        if not _is(path, file_digest):
            publish(made, path)
        remove(temporary)
    return samples_digest(columns), file_digest


def _counted(samples: Samples, cut: Mapping[bytes, int]) -> dict[str, int]:
    """The tokens that were cut off, by key in hex, of the captions that samples have."""
    used = Keys.of(cut).among(samples.caption_keys).tolist() if cut else ()
    return {key.hex(): tokens for (key, tokens), is_used in zip(cut.items(), used, strict=True) if is_used}


def _is(path: Place, digest: str) -> bool:
    """Whether the file is there, with that sha256 (hex)."""
    try:
        with opened(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == digest
    except FileNotFoundError:
        return False


def read_samples(cache: Place, manifest: Manifest) -> "pyarrow.Table":
    """The samples as an Arrow table, in the cache's order; raises CacheCorruptError."""
    table = stored_samples(cache, manifest)
    _check_count(cache, manifest, len(table))
    return table


def stored_samples(cache: Place, manifest: Manifest) -> "pyarrow.Table":
    """The samples as `read_samples` gives them, however many the manifest counts; raises CacheCorruptError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = _samples_path(cache, manifest)
    with _reading(path):
        content = path.read_bytes()
        _check_digest(hashlib.sha256(content).hexdigest(), manifest)
        # pq.read_table has threads that may still hold `content` when a short process ends, and then abort it.
        with pq.ParquetFile(pa.BufferReader(content), pre_buffer=False) as parquet:
            table = parquet.read(use_threads=False)
        _check_schema(table.schema)
        _check_values(table)
    return with_extras(table, sample_schema().names)


def samples_in_columns(cache: Place, manifest: Manifest) -> Samples:
    """The samples, however many the manifest counts, in memory a part at a time; raises CacheCorruptError."""
    return Samples(_parts(cache, manifest, SAMPLES_PER_TABLE))


def columns_of(cache: Place, manifest: Manifest) -> Samples:
    """The samples, all that the manifest counts, in memory a part at a time; raises CacheCorruptError."""
    samples = samples_in_columns(cache, manifest)
    _check_count(cache, manifest, len(samples))
    return samples


def _samples_path(cache: Place, manifest: Manifest) -> Place:
    return cache / manifest.samples_file


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
    """(N,) int32: the shorter side of each sample's picture, in pixels; raises CacheCorruptError."""
    return picture_sizes(cache, manifest).min(axis=1, initial=np.iinfo(np.int32).max)


def picture_sizes(cache: Place, manifest: Manifest) -> np.ndarray:
    """(N, 2) int32: width and height of each sample's picture, in pixels; raises CacheCorruptError."""
    import pyarrow.parquet as pq

    path, sizes = _samples_path(cache, manifest), [np.empty((0, 2), np.int32)]
    with _reading(path), opened(path) as file, pq.ParquetFile(file, pre_buffer=False) as parquet:
        for batch in parquet.iter_batches(SAMPLES_PER_TABLE, columns=["width", "height"], use_threads=False):
            sizes.append(np.stack([batch["width"].to_numpy(), batch["height"].to_numpy()], axis=1))
    return np.concatenate(sizes)


def read_some_samples(
    cache: Place, manifest: Manifest, numbers: np.ndarray, columns: Sequence[str]
) -> list[dict[str, Any]]:
    """What `columns` say of the samples `numbers` (k,) int64, which ascend, of a list of any length.

    The file is read and checked part by part, and never in memory as a whole. Raises CacheCorruptError.
    """
    rows, seen = list[dict[str, Any]](), 0
    for part in _parts(cache, manifest, SAMPLES_PER_PART, list(columns)):
        first, last = np.searchsorted(numbers, (seen, seen + len(part)))
        rows += part.take(numbers[first:last] - seen).to_pylist()
        seen += len(part)
    _check_count(cache, manifest, seen)
    return rows


def read_columns(cache: Place, manifest: Manifest, columns: Collection[str]) -> "Iterator[pyarrow.Table]":
    """All samples in some `columns` at least, in order, some ten thousand at a time; raises CacheCorruptError."""
    seen = 0
    for part in _parts(cache, manifest, SAMPLES_PER_TABLE, sorted(columns) or ["width"]):
        seen += len(part)
        yield part
    _check_count(cache, manifest, seen)


def _parts(cache: Place, manifest: Manifest, rows: int, columns: list[str] | None = None) -> "Iterator[pyarrow.Table]":
    """The samples, or some columns of them, so many at a time; raises CacheCorruptError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = _samples_path(cache, manifest)
    with (
        _reading(path),
        opened_if(path, lambda digest: _check_digest(digest, manifest)) as file,
        pq.ParquetFile(file, buffer_size=1 << 16, pre_buffer=False) as parquet,
    ):
        _check_schema(parquet.schema_arrow)
        wanted = sample_schema().names if columns is None else columns
        there = [name for name in wanted if name in parquet.schema_arrow.names] or ["width"]
        for batch in parquet.iter_batches(rows, columns=there, use_threads=False):
            part = pa.Table.from_batches([batch])
            _check_values(part)
            yield with_extras(part.replace_schema_metadata(None), wanted)


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
    if not is_file_schema(schema):
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
