"""Building a cache: find what is missing, freeze a plan for it, encode it, assemble the result.

Building again is how everything is brought up to date: new and edited inputs are encoded, nothing else is.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from kcache.assemble import assemble, image_sizes, whole_samples
from kcache.config import BuildConfig
from kcache.durable import exclusive, remove, remove_temporary
from kcache.errors import CacheMismatchError
from kcache.inventory import Inventory, fetcher, missing_rows, take_inventory
from kcache.joining import (
    RESERVED,
    SAMPLES,
    TarPacker,
    joined_keys,
    joined_recipe,
    plan_packing,
    record_rejections,
)
from kcache.manifest import MANIFEST
from kcache.plan import Plan, PlannedShard, close_plan, freeze_plan, open_plan
from kcache.recipe import Recipe
from kcache.samples import sample_ids
from kcache.shards import read_commits
from kcache.tables import default_rows_per_shard

__all__ = ["BuildPreview", "BuildProgress", "BuildResult", "TableResult", "build_cache", "plan_build"]

REPORT_SECONDS = 0.2
"""How often progress is reported, at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildProgress:
    """Where a build stands in the table it is working on."""

    table: str
    done: int
    total: int
    seconds: float
    """Time spent on this table so far."""
    busy: Mapping[str, float]
    """Share of the time (0 to 1) spent waiting for decoded inputs, encoding, and waiting for the disk."""
    message: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TableResult:
    """What a build did for one table."""

    encoded: int
    present: int
    """Rows that the samples use and that were there before."""
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildResult:
    """What a build did."""

    cache: str
    samples: int
    rejected: int
    tables: Mapping[str, TableResult]
    seconds: float
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildPreview:
    """What a build would do."""

    samples: int
    """Samples that the source offers."""
    refused: int
    missing: Mapping[str, int]
    """Rows to encode, by table."""
    notes: tuple[str, ...]


Report = Callable[[BuildProgress], None]

_SHARD_FOLDERS = ("image_embeds-", "text-", "latents-", f"{SAMPLES}-", f"{RESERVED}-")


def build_cache(source: str, cache: str, config: BuildConfig, *, report: Report | None = None) -> BuildResult:
    """Encode whatever of `source` the cache at `cache` lacks, and make it complete.

    An interrupted build goes on where it stopped. Inputs that cannot be cached are named in rejected.jsonl. Raises
    SourceError, ModelError, ConfigError, CacheBusyError, CacheMismatchError or CacheCorruptError.
    """
    start = time.perf_counter()
    folder = Path(cache)
    _check_target(folder)
    job = take_inventory(source, folder, config, partial(_say, report))
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder):
        _sweep(folder)
        before = {name: len(set(job.wanted(name)) & state.stored.key_set()) for name, state in job.states().items()}
        work = _Work(job, report)
        _finish_open_plan(job, work)
        _encode_missing(job, work)
        if config.format == "webdataset":
            _pack_missing(job, work)
        states = job.states() if config.format == "zarr" else job.packed()
        models, form = job.models, config.format
        manifest = assemble(folder, job.source, job.candidates, job.refused, states, models, form)
        if config.format == "webdataset":
            for recipe in job.recipes.values():
                remove(folder / recipe.directory)
    tables = {}
    for name, state in states.items():
        now = len(set(job.wanted(name)) & state.stored.key_set())
        tables[name] = TableResult(encoded=now - before[name], present=before[name], bytes=manifest.tables[name].bytes)
    return BuildResult(
        cache=str(folder),
        samples=manifest.samples,
        rejected=manifest.rejected,
        tables=tables,
        seconds=time.perf_counter() - start,
        notes=job.notes,
    )


def plan_build(source: str, cache: str, config: BuildConfig) -> BuildPreview:
    """What `build_cache` would do, without writing anything into the cache."""
    folder = Path(cache)
    _check_target(folder)
    job = take_inventory(source, folder, config, partial(_say, None))
    plan = missing_rows(job, job.states(), retry=config.retry_rejected, gone=frozenset())
    return BuildPreview(
        samples=len(job.candidates),
        refused=len(job.refused),
        missing={table.recipe.table: len(table.keys) for table in plan.tables},
        notes=job.notes,
    )


def _check_target(folder: Path) -> None:
    """Refuse to write into a folder that is something else."""
    if folder.exists() and not folder.is_dir():
        raise CacheMismatchError(f"{folder} is a file; expected a folder for the cache, or a path where nothing is")
    if folder.is_dir() and not (folder / MANIFEST).exists() and not (folder / "plans").exists():
        foreign = [entry.name for entry in folder.iterdir() if not entry.name.startswith(".tmp-")]
        if foreign and not any(name.startswith(_SHARD_FOLDERS) for name in foreign):
            raise CacheMismatchError(
                f"{folder} is not empty and not a cache (found {', '.join(sorted(foreign)[:3])}); "
                "give an empty or new folder for the cache"
            )


def _sweep(folder: Path) -> None:
    """Remove what killed builders left under temporary names."""
    remove_temporary(folder)
    for table in folder.iterdir():
        if table.is_dir():
            remove_temporary(table)


def _finish_open_plan(job: Inventory, work: "_Work") -> None:
    """Do what is left of an interrupted build's plan, unless it is of recipes that are not wanted any more."""
    plan = open_plan(job.folder)
    if plan is None:
        return
    joined = [joined_recipe(kind, job.recipes) for kind in (RESERVED, SAMPLES)]
    wanted = {recipe.fingerprint for recipe in [*job.recipes.values(), *joined]}
    if all(table.recipe.fingerprint in wanted for table in plan.tables):
        work.run(plan)
    close_plan(job.folder)


def _pack_missing(job: Inventory, work: "_Work") -> None:
    """Plan and pack the tars of all samples that are in none yet, and record what was rejected."""
    states = job.states()
    whole, _ = whole_samples(job.candidates, states)
    recipe = joined_recipe(SAMPLES, job.recipes)
    rows = job.config.rows_per_shard or default_rows_per_shard(recipe)
    plan = plan_packing(job.folder, job.recipes, whole, rows)
    if any(table.keys for table in plan.tables):
        freeze_plan(job.folder, plan)
        work.run(plan)
        close_plan(job.folder)
    rejected = {key: rejection for state in states.values() for key, rejection in state.rejected.items()}
    record_rejections(job.folder, job.recipes, rejected, job.provenance())


def _encode_missing(job: Inventory, work: "_Work") -> None:
    """Make and finish plans until no row is missing."""
    retry = job.config.retry_rejected
    while True:
        plan = missing_rows(job, job.states(), retry=retry, gone=frozenset(work.gone))
        if not any(table.keys for table in plan.tables):
            return
        freeze_plan(job.folder, plan)
        work.run(plan)
        close_plan(job.folder)
        retry = False


@dataclass
class _Work:
    """Encodes plans, one table at a time so that one encoder is in memory at a time."""

    job: Inventory
    report: Report | None
    gone: set[bytes] = field(default_factory=set)

    def run(self, plan: Plan) -> None:
        """Encode the shards of `plan` that are not committed yet."""
        for table in plan.tables:
            folder = self.job.folder / table.recipe.directory
            committed = {commit.name for commit in read_commits(folder, table.recipe)}
            todo = [shard for shard in table.shards() if shard.name not in committed]
            if todo and table.recipe.table in (RESERVED, SAMPLES):
                self._pack(table.recipe.table, todo)
            elif todo:
                folder.mkdir(exist_ok=True)
                self._encode(table.recipe, todo, folder)

    def _pack(self, kind: str, shards: Sequence[PlannedShard]) -> None:
        job, start = self.job, time.perf_counter()
        states = job.states()
        whole, _ = whole_samples(job.candidates, states)
        sizes, _ = image_sizes(job.folder, job.source, whole)
        ids = sample_ids([candidate.image_key for candidate in whole])
        by_key = dict(zip(joined_keys(whole), zip(ids, whole, strict=True), strict=True))
        packer = TarPacker(job.folder, job.recipes, {name: state.stored for name, state in states.items()})
        total, done = sum(len(shard.keys) for shard in shards), 0
        for shard in shards:
            if kind == RESERVED:
                packer.pack_reserved(shard.name, job.provenance())
            else:
                packer.pack_samples(shard, by_key, sizes, job.provenance())
            done += len(shard.keys)
            if self.report:
                progress = BuildProgress(
                    table=kind, done=done, total=total, seconds=time.perf_counter() - start, busy={"write": 1.0}
                )
                self.report(progress)

    def _encode(self, recipe: Recipe, shards: Sequence[PlannedShard], folder: Path) -> None:
        import torch

        from kcache.encoders import load_encoder
        from kcache.encoding import Meter, encode_shards

        job = self.job
        total = sum(len(shard.keys) for shard in shards)
        _say(self.report, f"loading {recipe.encoder} for {recipe.table}: {total} to encode")
        encoder = load_encoder(recipe, job.prior, job.decoder, torch.device(job.config.device or _default_device()))
        meter, start, count, reported = Meter(), time.perf_counter(), 0, 0.0

        def done(inputs: int) -> None:
            nonlocal count, reported
            count += inputs
            now = time.perf_counter()
            if self.report and (now - reported >= REPORT_SECONDS or count == total):
                reported = now
                progress = BuildProgress(
                    table=recipe.table, done=count, total=total, seconds=now - start, busy=meter.shares()
                )
                self.report(progress)

        workers = job.config.num_workers or os.cpu_count() or 1
        fetch = fetcher(job.source, job.candidates)
        self.gone |= encode_shards(encoder, folder, shards, fetch, workers=workers, meter=meter, done=done)


def _default_device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _say(report: Report | None, message: str) -> None:
    if report:
        report(BuildProgress(table="", done=0, total=0, seconds=0.0, busy={}, message=message))
