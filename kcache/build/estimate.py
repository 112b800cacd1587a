"""What a build would do, explained before it is done: what is missing and why, the bytes, the time, and what it saves.

Sizes are computed from the rows and from really tokenized captions. Times are measured: a few batches of each table's
missing inputs are really decoded and encoded, into a temporary folder.
"""

import io
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from kcache.build.build import checked_survey
from kcache.build.encode import Meter, encode_shards
from kcache.build.joined_tars import plan_tars, tar_keys, tar_recipe
from kcache.build.plan import PlannedShard, TablePlan
from kcache.build.survey import Survey, acceptable, fetcher, missing_rows, why_missing
from kcache.config import BuildConfig, Say, unheard
from kcache.encoders.frozen import load_encoder, load_tokenizer
from kcache.encoders.recipes import default_rows_per_shard
from kcache.machine import default_device
from kcache.store.formats.zarr import CHECKSUM_BYTES, CHUNK_ROWS
from kcache.store.recipe import RESERVED, SAMPLES, TEXT, Field, Recipe, table_names
from kcache.store.rows import unit_bytes
from kcache.store.samples import Sample, with_ids
from kcache.store.shards import side_dtype

Item = TypeVar("Item")


TOKENIZED_CAPTIONS = 10_000
"""Captions that are tokenized to know how long they are: all, or so many evenly spaced ones."""
MEASURED_SECONDS = 3.0
"""How long each encoder is watched once it runs steadily."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TableEstimate:
    """What a build would do for one table."""

    missing: int
    """Rows to encode."""
    why: str
    unused: int
    """Rows in the cache that no sample uses any more."""
    bytes: int
    """Bytes of the shards to write; 0 for a webdataset cache, whose tables are joined."""
    loading_seconds: float
    row_seconds: float
    """Measured time per row, decoding, encoding and writing at the same time; 0 where nothing is missing."""

    @property
    def seconds(self) -> float:
        """Time that the table will take."""
        return self.loading_seconds + self.missing * self.row_seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Saving:
    """What the cache saves a trainer that would otherwise run the encoders in every step."""

    sample_seconds: float
    """Encoder time per sample and step, as measured."""
    epochs: float
    """Passes over the samples after which the build has paid back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildEstimate:
    """What a build would do, and what it would take."""

    samples: int
    refused: int
    tables: Mapping[str, TableEstimate]
    bytes: int
    """Size of all shards to write; samples and index take about 200 bytes a sample more."""
    seconds: float
    savings: Mapping[str, Saving]
    """By stage, "prior" and "decoder", where all that the stage reads was measured."""
    notes: tuple[str, ...]


def estimate_build(source: str, cache: str, config: BuildConfig, *, say: Say = unheard) -> BuildEstimate:
    """What `build_cache` would do and take, without writing anything into the cache; raises like it.

    The encoders of all tables that lack rows are loaded and run for some seconds each. `say` is told which.
    """
    job = checked_survey(source, cache, config, say)
    committed = job.committed().tables
    plan = missing_rows(job, committed, retry=config.retry_rejected, seen={})
    why = why_missing(job, committed, plan)
    tokens = _token_counts(job)
    tables = {}
    for table in plan.tables:
        name = table.recipe.table
        loading, row = _probe(job, table, say) if table.keys else (0.0, 0.0)
        tables[name] = TableEstimate(
            missing=len(table.keys),
            why=why[name],
            unused=len(committed[name].stored.key_set().difference(job.wanted(name))),
            bytes=table_bytes(table, float(tokens.mean())) if config.format == "zarr" else 0,
            loading_seconds=loading,
            row_seconds=row,
        )
    size = sum(table.bytes for table in tables.values())
    seconds = sum(table.seconds for table in tables.values())
    return BuildEstimate(
        samples=len(job.samples),
        refused=len(job.refused),
        tables=tables,
        bytes=size if config.format == "zarr" else _tar_bytes(job, acceptable(job.samples, committed), tokens),
        seconds=seconds,
        savings=_savings(job, tables, seconds),
        notes=(job.source.description, *job.notes),
    )


def _token_counts(job: Survey) -> np.ndarray:
    """Valid tokens of the captions, or of evenly spaced ones, (n,) int64; [0] where there is no text."""
    captions = [caption for sample in job.samples for caption in sample.captions]
    if TEXT.name not in job.recipes or not captions:
        return np.zeros(1, np.int64)
    chosen = _spread(captions, TOKENIZED_CAPTIONS)
    length = job.recipes[TEXT.name].batch_shape[1]
    tokenized = load_tokenizer(job.repository(TEXT.name))(list(chosen), max_length=length, truncation=True)
    return np.array([len(ids) for ids in tokenized["input_ids"]], np.int64)


def _spread(items: Sequence[Item], most: int) -> Sequence[Item]:
    """At most `most` of `items`, evenly spaced."""
    step = -(-len(items) // most)
    return items[:: max(1, step)]


def _tar_bytes(job: Survey, samples: Sequence[Sample], tokens: np.ndarray) -> int:
    named = with_ids(samples)
    rows = job.config.rows_per_shard or default_rows_per_shard(tar_recipe(SAMPLES, job.recipes))
    plan = plan_tars(job.folder, job.recipes, named, rows)
    wanted = {table.recipe.table: set(table.keys) for table in plan.tables}
    new = [sample for key, sample in zip(tar_keys(named), named, strict=True) if key in wanted[SAMPLES]]
    size = tar_bytes(job.recipes, _spread(new, TOKENIZED_CAPTIONS), len(new), rows, tokens)
    return size + (reserved_tar_bytes(job.recipes) if wanted[RESERVED] else 0)


class _Watched(Exception):
    """Ends a probe: enough was seen."""


def _probe(job: Survey, table: TablePlan, say: Say) -> tuple[float, float]:
    """Seconds that the encoder of `table` takes to load, and seconds per row, measured on some of its missing rows."""
    recipe = table.recipe
    say(f"measuring {recipe.encoder} on some of {len(table.keys):,} inputs of {recipe.table}")
    start = time.perf_counter()
    device = torch.device(job.config.device or default_device())
    encoder = load_encoder(recipe, job.repository(recipe.table), device)
    loading = time.perf_counter() - start
    workers = job.config.num_workers or os.cpu_count() or 1
    watch = _Watch(encoder.batch_size, warm_up=1 + -(-(workers + 2 * encoder.batch_size) // encoder.batch_size))
    # Evenly spaced, as pictures of one folder are often alike; several shards, so that writing is measured, too.
    keys = _spread(table.keys, max(table.rows_per_shard, 64 * encoder.batch_size))
    rows = max(1, min(table.rows_per_shard, 16 * encoder.batch_size))
    shards = (
        PlannedShard(name=f"{number:05d}", keys=tuple(keys[begin : begin + rows]))
        for number, begin in enumerate(range(0, len(keys), rows))
    )
    fetch = fetcher(job, recipe.table)
    with tempfile.TemporaryDirectory(prefix="kcache-probe-") as folder, suppress(_Watched):
        encode_shards(encoder, Path(folder), shards, fetch, workers=workers, meter=Meter(), done=watch.add)
    return loading, watch.row_seconds()


class _Watch:
    """Takes the time per row once the encoder runs steadily: warm, and past the inputs that were decoded meanwhile."""

    def __init__(self, batch_size: int, warm_up: int) -> None:
        self._batch = batch_size
        self._warm_up = warm_up * batch_size
        self._start = time.perf_counter()
        self._rows = 0
        self._begin: tuple[int, float] | None = None
        self._end = (0, 0.0)

    def add(self, inputs: int) -> None:
        """Count inputs; raises _Watched when enough was seen."""
        batches = self._rows // self._batch
        self._rows += inputs
        if self._rows // self._batch == batches:
            return
        seconds = time.perf_counter() - self._start
        self._end = (self._rows, seconds)
        if self._begin is None:
            if self._rows >= self._warm_up or seconds >= MEASURED_SECONDS:
                self._begin = self._end
        elif seconds - self._begin[1] >= MEASURED_SECONDS:
            raise _Watched

    def row_seconds(self) -> float:
        """Seconds per row; of all rows where there were too few to wait until the encoder runs steadily."""
        if self._begin is not None and self._end[0] > self._begin[0]:
            return (self._end[1] - self._begin[1]) / (self._end[0] - self._begin[0])
        return (time.perf_counter() - self._start) / max(1, self._rows)


def _savings(job: Survey, tables: Mapping[str, TableEstimate], seconds: float) -> dict[str, Saving]:
    savings = {}
    for stage in ("prior", "decoder"):
        # Of several resolutions a decoder reads one, here the last one asked for.
        needed = table_names(stage, job.config.resolution[-1:])
        if all(name in tables and tables[name].row_seconds for name in needed):
            sample = sum(tables[name].row_seconds for name in needed)
            savings[stage] = Saving(sample_seconds=sample, epochs=seconds / (sample * len(job.samples)))
    return savings


# About what JSON files take: the metadata of a zarr group, of an array and each of its axes, a commit record and each
# file that it names.
_GROUP_JSON_BYTES = 67
_ARRAY_JSON_BYTES = 1_010
_AXIS_JSON_BYTES = 42
_RECORD_BYTES = 450
_RECORD_FILE_BYTES = 110
_TAR_BLOCK_BYTES = 512
_TAR_RECORD_BYTES = 10_240
_NPY_HEADER_BYTES = 128
_RESERVED_TOKENS = 2
"""The empty caption's: start and end."""


def table_bytes(plan: TablePlan, mean_tokens: float) -> int:
    """Bytes of the zarr shards of `plan`, whose ragged rows have `mean_tokens` tokens on average."""
    return sum(
        zarr_shard_bytes(plan.recipe, len(shard.keys), round(len(shard.keys) * mean_tokens)) for shard in plan.shards()
    )


def zarr_shard_bytes(recipe: Recipe, rows: int, tokens: int) -> int:
    """Bytes of a zarr shard with its side file and its commit record."""
    dtype = np.dtype(recipe.stored_dtype)
    sizes = [_array_bytes(rows, 16, 1)]
    sizes += [_array_bytes(tokens if f.ragged else rows, unit_bytes(f, dtype), 1 + len(f.shape)) for f in recipe.fields]
    if any(f.ragged for f in recipe.fields):
        sizes.append(_array_bytes(rows + 1, 8, 1))
    files = 2 * len(sizes) + 2
    side = _npy_bytes(side_dtype(recipe.fields), rows)
    return sum(sizes) + side + _GROUP_JSON_BYTES + _RECORD_BYTES + files * _RECORD_FILE_BYTES


def _array_bytes(length: int, row_bytes: int, axes: int) -> int:
    """The one file of an array: whole chunks with their checksums, their index and its checksum; and the metadata."""
    chunk = max(1, min(CHUNK_ROWS, length))
    chunks = -(-length // chunk)
    metadata = _ARRAY_JSON_BYTES + axes * _AXIS_JSON_BYTES
    return chunks * (chunk * row_bytes + CHECKSUM_BYTES + 16) + CHECKSUM_BYTES + metadata


def _npy_bytes(dtype: np.dtype, length: int) -> int:
    header = io.BytesIO()
    np.save(header, np.empty(0, dtype))
    return header.tell() + length * dtype.itemsize


def tar_bytes(
    recipes: Mapping[str, Recipe], samples: Sequence[Sample], count: int, rows_per_shard: int, tokens: np.ndarray
) -> int:
    """Bytes of the tars of `count` samples such as `samples`, with side files and commit records.

    `tokens` (n,) are token counts such as the captions have.
    """
    mean = sum(_sample_bytes(recipes, sample, tokens) for sample in samples) / max(1, len(samples))
    captions = sum(len(sample.captions) for sample in samples) / max(1, len(samples))
    tars = [rows_per_shard] * (count // rows_per_shard) + [count % rows_per_shard][: count % rows_per_shard]
    total = 0
    for rows in tars:
        sides = [
            _npy_bytes(side_dtype(r.fields), round(rows * captions) if r.table == "text" else rows)
            for r in recipes.values()
        ]
        record = _RECORD_BYTES + _RECORD_FILE_BYTES * (2 + len(recipes))
        total += _whole_records(round(rows * mean)) + sum(sides) + _npy_bytes(np.dtype("u1"), 16 * rows) + record
    return total


def _sample_bytes(recipes: Mapping[str, Recipe], sample: Sample, tokens: np.ndarray) -> float:
    """Bytes that one sample takes in a tar."""
    info = {
        "id": sample.image_key.hex(),
        "name": sample.name,
        "image_key": sample.image_key.hex(),
        "captions": list(sample.captions),
        "caption_keys": [key.hex() for key in sample.caption_keys],
        "width": 1024,
        "height": 1024,
    }
    total = float(_member_bytes(len(json.dumps(info, ensure_ascii=False).encode())))
    total += sum(_member_bytes(len(caption.encode())) for caption in sample.captions)
    for field, recipe in _fields(recipes):
        rows = len(sample.captions) if recipe.table == "text" else 1
        total += rows * _row_bytes(field, recipe, tokens)
    return total


def reserved_tar_bytes(recipes: Mapping[str, Recipe]) -> int:
    """Bytes of the tar of the reserved rows, with side files and commit record."""
    rows = [
        _row_bytes(field, recipe, np.array([_RESERVED_TOKENS]))
        for field, recipe in _fields(recipes)
        if recipe.table in ("text", "image_embeds")
    ]
    sides = [_npy_bytes(side_dtype(r.fields), 1) for r in recipes.values() if r.table in ("text", "image_embeds")]
    members = _member_bytes(20) + _member_bytes(0) + round(sum(rows))
    return (
        _whole_records(members) + sum(sides) + _npy_bytes(np.dtype("u1"), 16) + _RECORD_BYTES + 4 * _RECORD_FILE_BYTES
    )


def _fields(recipes: Mapping[str, Recipe]) -> Iterator[tuple[Field, Recipe]]:
    return ((field, recipe) for recipe in recipes.values() for field in recipe.fields)


def _row_bytes(field: Field, recipe: Recipe, tokens: np.ndarray) -> float:
    """A row's member, on average over rows of so many `tokens`."""
    unit = unit_bytes(field, np.dtype(recipe.stored_dtype))
    if not field.ragged:
        return _member_bytes(_NPY_HEADER_BYTES + unit)
    return float(np.mean([_member_bytes(_NPY_HEADER_BYTES + int(count) * unit) for count in tokens]))


def _member_bytes(content: int) -> int:
    return _TAR_BLOCK_BYTES * (1 + math.ceil(content / _TAR_BLOCK_BYTES))


def _whole_records(content: int) -> int:
    """A tar ends with two empty blocks and is filled up to whole records."""
    return math.ceil((content + 2 * _TAR_BLOCK_BYTES) / _TAR_RECORD_BYTES) * _TAR_RECORD_BYTES
