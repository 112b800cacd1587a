"""What a build would do, explained before it is done: what is missing and why, the bytes, the time, and what it saves.

Sizes are computed from the rows and from really tokenized captions. Times are measured: a few batches of each table's
missing inputs are really decoded and encoded, into a temporary folder.
"""

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from kcache.build import survey
from kcache.config import BuildConfig
from kcache.devices import default_device
from kcache.encoders import load_encoder, load_tokenizer
from kcache.encoding import Meter, encode_shards
from kcache.inventory import Inventory, acceptable, fetcher, missing_rows, why_missing
from kcache.joining import RESERVED, SAMPLES, joined_keys, joined_recipe, plan_packing
from kcache.plan import PlannedShard, TablePlan
from kcache.sizes import reserved_tar_bytes, table_bytes, tar_bytes
from kcache.tables import default_rows_per_shard, table_names

__all__ = ["BuildEstimate", "Saving", "TableEstimate", "estimate_build"]

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


def estimate_build(
    source: str, cache: str, config: BuildConfig, *, say: Callable[[str], None] = lambda _: None
) -> BuildEstimate:
    """What `build_cache` would do and take, without writing anything into the cache; raises like it.

    The encoders of all tables that lack rows are loaded and run for some seconds each. `say` is told which.
    """
    job = survey(source, cache, config, say)
    states = job.states()
    plan = missing_rows(job, states, retry=config.retry_rejected, seen={})
    why = why_missing(job, states, plan)
    tokens = _token_counts(job)
    tables = {}
    for table in plan.tables:
        name = table.recipe.table
        loading, row = _probe(job, table, say) if table.keys else (0.0, 0.0)
        tables[name] = TableEstimate(
            missing=len(table.keys),
            why=why[name],
            unused=len(states[name].stored.key_set().difference(job.wanted(name))),
            bytes=table_bytes(table, float(tokens.mean())) if config.format == "zarr" else 0,
            loading_seconds=loading,
            row_seconds=row,
        )
    size = sum(table.bytes for table in tables.values())
    seconds = sum(table.seconds for table in tables.values())
    return BuildEstimate(
        samples=len(job.candidates),
        refused=len(job.refused),
        tables=tables,
        bytes=size if config.format == "zarr" else _tar_bytes(job, tokens),
        seconds=seconds,
        savings=_savings(job, tables, seconds),
        notes=(job.source.description, *job.notes),
    )


def _token_counts(job: Inventory) -> np.ndarray:
    """Valid tokens of the captions, or of evenly spaced ones, (n,) int64; [0] where there is no text."""
    captions = [caption for candidate in job.candidates for caption in candidate.captions]
    if "text" not in job.recipes or not captions:
        return np.zeros(1, np.int64)
    chosen = _spread(captions, TOKENIZED_CAPTIONS)
    length = job.recipes["text"].batch_shape[1]
    tokenized = load_tokenizer(job.prior)(list(chosen), max_length=length, truncation=True)
    return np.array([len(ids) for ids in tokenized["input_ids"]], np.int64)


def _spread(items: Sequence[Item], most: int) -> Sequence[Item]:
    """At most `most` of `items`, evenly spaced."""
    step = -(-len(items) // most)
    return items[:: max(1, step)]


def _tar_bytes(job: Inventory, tokens: np.ndarray) -> int:
    candidates = acceptable(job.candidates, job.states())
    rows = job.config.rows_per_shard or default_rows_per_shard(joined_recipe(SAMPLES, job.recipes))
    plan = plan_packing(job.folder, job.recipes, candidates, rows)
    wanted = {table.recipe.table: set(table.keys) for table in plan.tables}
    new = [c for key, c in zip(joined_keys(candidates), candidates, strict=True) if key in wanted[SAMPLES]]
    size = tar_bytes(job.recipes, _spread(new, TOKENIZED_CAPTIONS), len(new), rows, tokens)
    return size + (reserved_tar_bytes(job.recipes) if wanted[RESERVED] else 0)


class _Watched(Exception):
    """Ends a probe: enough was seen."""


def _probe(job: Inventory, table: TablePlan, say: Callable[[str], None]) -> tuple[float, float]:
    """Seconds that the encoder of `table` takes to load, and seconds per row, measured on some of its missing rows."""
    recipe = table.recipe
    say(f"measuring {recipe.encoder} on some of {len(table.keys):,} inputs of {recipe.table}")
    start = time.perf_counter()
    encoder = load_encoder(recipe, job.prior, job.decoder, torch.device(job.config.device or default_device()))
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
    fetch = fetcher(job.source, job.candidates, recipe.table)
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


def _savings(job: Inventory, tables: Mapping[str, TableEstimate], seconds: float) -> dict[str, Saving]:
    savings = {}
    for stage in ("prior", "decoder"):
        # Of several resolutions a decoder reads one, here the last one asked for.
        needed = table_names(stage, job.config.resolution[-1:])
        if all(name in tables and tables[name].row_seconds for name in needed):
            sample = sum(tables[name].row_seconds for name in needed)
            savings[stage] = Saving(sample_seconds=sample, epochs=seconds / (sample * len(job.candidates)))
    return savings
