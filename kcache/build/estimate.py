"""What a build would do, explained before it is done: what is missing and why, the bytes, the time, and what it saves.

Sizes are computed from the rows and from really tokenized captions, up to what every shard takes beside them. Times are
measured: a few batches of each table's missing inputs are really decoded and encoded, into a temporary folder.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from kcache.build.build import checked_survey
from kcache.build.departures import Leaving
from kcache.build.encode import encode_shards
from kcache.build.joined_tars import plan_tars, tar_keys
from kcache.build.pictures.contents import shard_fetcher
from kcache.build.plan import PlannedShard, TablePlan
from kcache.build.survey import Survey, acceptable, missing_rows, other_verdicts
from kcache.build.work.meter import Meter
from kcache.build.work.reasons import why_missing
from kcache.config import BuildConfig, Say, unheard
from kcache.disk.pieces import Ahead, nobody
from kcache.encoders.fit import enough_memory, workers_for
from kcache.encoders.frozen import Encoder, load_encoder, load_tokenizer, shares_network
from kcache.encoders.recipes import default_rows_per_shard, mean_tokens
from kcache.machine import default_device, kept_to_groups
from kcache.store.digests import KEY_BYTES, Keys
from kcache.store.formats.columns import Samples
from kcache.store.formats.side_files import SIZES, side_dtype
from kcache.store.formats.zarr import CHECKSUM_BYTES, CHUNK_ROWS
from kcache.store.recipe import TEXT, Recipe, kind_of, table_names
from kcache.store.rows import unit_bytes
from kcache.store.samples import Sample, with_ids
from kcache.store.shaped.wants import Wants

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
    """Size of all shards to write, within 5 % once they have a few hundred rows each; samples and index take about 200
    bytes a sample more. Of control images, which are packed, nobody knows: half of what greys take unpacked."""
    seconds: float
    savings: Mapping[str, Saving]
    """By stage, "prior" and "decoder", where all that the stage reads was measured."""
    leaving: Leaving
    """Which samples the cache has and would not have any more."""
    notes: tuple[str, ...]


def estimate_build(
    source: str, cache: str, config: BuildConfig, *, say: Say = unheard, ahead: Ahead = nobody
) -> BuildEstimate:
    """What `build_cache` would do and take, without writing anything into the cache; raises like it.

    The encoders of all tables that lack rows are loaded and run for some seconds each. `say` is told which.
    """
    job = checked_survey(source, cache, config, say, ahead)
    for note in job.leaving.notes:
        say(note)
    if job.leaving.most and not config.replace:
        say(f"most of the {job.leaving.had:,} samples of {cache} would leave: a build refuses that without --replace")
    found = job.committed()
    verdicts = other_verdicts(job, found.tables)
    for note in verdicts:
        say(note)
    plan = missing_rows(job, found.tables, retry=config.retry_rejected, seen={})
    why = why_missing(job, found.tables, plan)
    tokens = _token_counts(job)
    tables, held = {}, list[Encoder]()
    for table in plan.tables:
        name = table.recipe.table
        loading, row = _probe(job, table, say, held) if table.keys else (0.0, 0.0)
        tables[name] = TableEstimate(
            missing=len(table.keys),
            why=why[name],
            unused=len(found.tables[name].stored.keys) - found.tables[name].stored.used(job.wanted(name)),
            bytes=0 if found.waiting else zarr_bytes(table, float(tokens.mean())),
            loading_seconds=loading,
            row_seconds=row,
        )
    size = sum(table.bytes for table in tables.values())
    seconds = sum(table.seconds for table in tables.values())
    return BuildEstimate(
        samples=len(job.samples),
        refused=len(job.refused),
        tables=tables,
        bytes=_tar_bytes(job, acceptable(job.samples, found.tables, job.wants), tokens) if found.waiting else size,
        seconds=seconds,
        savings=_savings(job, tables, seconds),
        leaving=job.leaving,
        notes=(job.source.description, *job.notes, *verdicts),
    )


def _token_counts(job: Survey) -> np.ndarray:
    """Valid tokens of the captions, or of evenly spaced ones, (n,) int64; [0] where there is no text."""
    samples = Samples.of(job.samples)
    numbers = _spread(range(len(samples.caption_keys)), TOKENIZED_CAPTIONS)
    if TEXT.name not in job.recipes or not numbers:
        return np.zeros(1, np.int64)
    chosen = samples.captions(np.array(numbers))
    length = job.recipes[TEXT.name].batch_shape[1]
    tokenized = load_tokenizer(job.repository(TEXT.name))(chosen, max_length=length, truncation=True)
    return np.array([len(ids) for ids in tokenized["input_ids"]], np.int64)


def _spread(items: Sequence[Item], most: int) -> Sequence[Item]:
    """At most `most` of `items`, evenly spaced."""
    step = -(-len(items) // most)
    return items[:: max(1, step)]


def _tar_bytes(job: Survey, samples: Sequence[Sample], tokens: np.ndarray) -> int:
    named = with_ids(samples)
    rows = job.config.rows_per_shard or default_rows_per_shard(*job.recipes.values())
    plan = plan_tars(job.folder, job.recipes, named, rows, job.wants)
    new = named.where(Keys.of(tar_keys(named, job.wants)).among(plan.keys))
    return tar_bytes(job.recipes, job.wants, new, sum(len(table.shards) for table in plan.tables), tokens)


class _Watched(Exception):
    """Ends a probe: enough was seen."""


def _probe(job: Survey, table: TablePlan, say: Say, held: list[Encoder]) -> tuple[float, float]:
    """Seconds that the encoder of `table` takes to load, and seconds per row, measured on some of its missing rows.

    `held` is what was loaded last, whose network may be that of this table.
    """
    recipe = table.recipe
    say(f"measuring {recipe.encoder} on some of {len(table.keys):,} inputs of {recipe.table}")
    start = time.perf_counter()
    device = torch.device(job.config.device or default_device())
    with enough_memory(recipe):
        if not any(shares_network(each, recipe) for each in held):
            held.clear()
        before = held[0] if held else None
        encoder = load_encoder(recipe, job.repository(recipe.table), device, job.config.max_pixels, held=before)
        held[:] = [encoder]
    loading = time.perf_counter() - start
    workers = workers_for(recipe, job.config.num_workers, len(table.keys))
    watch = _Watch(encoder.batch_size, warm_up=1 + -(-(workers + 2 * encoder.batch_size) // encoder.batch_size))
    # Evenly spaced, as pictures of one folder are often alike; several shards, so that writing is measured, too.
    keys = _spread(table.keys, max(table.rows_per_shard, 64 * encoder.batch_size))
    rows = max(1, min(table.rows_per_shard, 16 * encoder.batch_size))
    shards = (
        PlannedShard(name=f"{number:05d}", keys=tuple(keys[begin : begin + rows]))
        for number, begin in enumerate(range(0, len(keys), rows))
    )
    fetching = shard_fetcher(job, recipe.table)
    kept = kept_to_groups(device.type)
    with tempfile.TemporaryDirectory(prefix="kcache-probe-") as folder, suppress(_Watched), enough_memory(recipe), kept:
        encode_shards(encoder, Path(folder), shards, fetching, workers=workers, meter=Meter(), done=watch.add)
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
        # Of several resolutions a decoder reads one, here the largest, and of its shapes as many as there are samples.
        shapes = [shape for each in job.wants.sets[-1:] for shape in each.shapes]
        having = {name: job.wants.samples_of(name, job.samples) for name in table_names(stage, shapes)}
        shares = {name: 1.0 if those is None else len(those) / len(job.samples) for name, those in having.items()}
        needed = {name: share for name, share in shares.items() if share}
        if all(name in tables and tables[name].row_seconds for name in needed):
            sample = sum(share * tables[name].row_seconds for name, share in needed.items())
            savings[stage] = Saving(sample_seconds=sample, epochs=seconds / (sample * len(job.samples)))
    return savings


_SHARD_BYTES = 6_000
"""About what a shard takes beside its rows: a commit record, and the metadata of zarr arrays or the end of a tar."""
_INDEX_BYTES = 16
"""A chunk's offset and length, at the end of a zarr array."""
_NPY_HEADER_BYTES = 128
_TAR_BLOCK_BYTES = 512
_INFO_BYTES = 240
"""About what a sample's JSON member has beside its name and its captions."""


def zarr_bytes(plan: TablePlan, of_text: float) -> int:
    """Bytes of the zarr shards of `plan`; captions have `of_text` tokens on average.

    Arrays are of whole chunks, each with a checksum and an entry in the index; a side row is a key and locators.
    """
    dtype, fields = np.dtype(plan.recipe.stored_dtype), plan.recipe.fields
    size, tokens = 0, mean_tokens(plan.recipe, of_text)
    beside = side_dtype(fields).itemsize + SIZES.itemsize * (kind_of(plan.recipe.table).per == "image")
    for shard in plan.shards:
        rows = len(shard.keys)
        size += _SHARD_BYTES + _array_bytes(rows, KEY_BYTES) + rows * beside
        for field in fields:
            size += _array_bytes(round(rows * tokens) if field.ragged else rows, unit_bytes(field, dtype))
    return size


def _array_bytes(length: int, row_bytes: int) -> int:
    chunks = -(-length // CHUNK_ROWS)
    return chunks * (min(CHUNK_ROWS, length) * row_bytes + CHECKSUM_BYTES + _INDEX_BYTES)


def tar_bytes(
    recipes: Mapping[str, Recipe], wants: Wants, samples: Sequence[Sample], tars: int, tokens: np.ndarray
) -> int:
    """Bytes of the rows that `wants` says of `samples`, in so many tars, where captions are as long as `tokens` (n,).

    A sample is a member with what is known of it, one per caption and one per row, each a header and whole blocks.
    Beside these, its side rows are at most 2 %.
    """
    captions = [caption.encode() for sample in samples for caption in sample.captions]
    infos = [_INFO_BYTES + len("".join([sample.name, *sample.captions]).encode()) for sample in samples]
    size = (
        tars * _SHARD_BYTES + sum(map(_member_bytes, infos)) + sum(_member_bytes(len(caption)) for caption in captions)
    )
    for recipe in recipes.values():
        rows = len(wants.keys(recipe.table, samples))
        for field in recipe.fields:
            unit = unit_bytes(field, np.dtype(recipe.stored_dtype))
            lengths = tokens.tolist() if field.ragged else [1]
            if kind_of(recipe.table).per == "control":
                lengths = [mean_tokens(recipe, 0.0)]
            size += round(rows * np.mean([_member_bytes(_NPY_HEADER_BYTES + int(length * unit)) for length in lengths]))
    return size


def _member_bytes(content: int) -> int:
    return _TAR_BLOCK_BYTES * (1 + -(-content // _TAR_BLOCK_BYTES))
