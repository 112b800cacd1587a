"""Building a cache: find what is missing, freeze a plan for it, encode it, assemble the result.

Building again is how everything is brought up to date: new and edited inputs are encoded, nothing else is.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from kcache.build.builder import Builder, BuildProgress, Report, unfinished
from kcache.build.claims import TURN, Patience, holder, turn, worker_place
from kcache.build.finish import assemble, whole_samples
from kcache.build.joined_tars import RESERVED, SAMPLES, joined_recipe, plan_packing
from kcache.build.plan import Plan, claims_folder, close_plan, freeze_plan, open_plan
from kcache.build.survey import Inventory, missing_rows, take_inventory
from kcache.config import BuildConfig
from kcache.durable import remove, remove_temporary, shared, writing
from kcache.encoders.recipes import default_rows_per_shard
from kcache.errors import CacheBusyError, CacheMismatchError
from kcache.machine import check_device
from kcache.processes import is_gone
from kcache.stopping import stop_here, stopped_when_safe
from kcache.store.index import TableState
from kcache.store.manifest import MANIFEST, Manifest
from kcache.store.shards import record_rejections


@dataclass(frozen=True, kw_only=True, slots=True)
class TableResult:
    """What a build did for one table."""

    encoded: int
    """Rows that the samples use and that came while this build ran, by whichever builder."""
    present: int
    """Rows that the samples use and that were there before."""
    bytes: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    """What the time of this builder's encoding thread went into; {} when it encoded nothing.

    `decode`, `encode` and `write`: waiting for decoded inputs, encoding, waiting for the disk. `held_up` is the part of
    `decode` in which enough for a batch were decoded, but stood behind one that was not: the rest is for more cores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildResult:
    """What a build did."""

    cache: str
    samples: int
    rejected: int
    tables: Mapping[str, TableResult]
    seconds: float
    notes: tuple[str, ...]


_SHARD_FOLDERS = ("image_embeds-", "text-", "latents-", f"{SAMPLES}-", f"{RESERVED}-")


def build_cache(source: str, cache: str, config: BuildConfig, *, report: Report | None = None) -> BuildResult:
    """Encode whatever of `source` the cache at `cache` lacks, and make it complete.

    An interrupted build goes on where it stopped, and several processes may build one cache together. On SIGINT or
    SIGTERM the batch is finished, then KeyboardInterrupt or SystemExit(143) raised. Inputs that cannot be cached are
    named in rejected.jsonl. Raises SourceError, ModelError, ConfigError, CacheBusyError,
    CacheMismatchError, CacheWriteError or CacheCorruptError.
    """
    job = survey(source, cache, config, partial(_say, report))
    for note in job.notes:
        _say(report, note)
    return complete(job, report=report)


def complete(job: Inventory, *, report: Report | None = None) -> BuildResult:
    """Encode whatever the cache of `job` lacks, and make it one of the job's samples; raises like `build_cache`."""
    start, folder, before = time.perf_counter(), job.folder, None
    place = worker_place(job.config.worker, os.environ)
    patience = Patience(alone=place[1] == 1, say=partial(_say, report))
    builder = Builder(job, place, patience, report)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with shared(folder), stopped_when_safe():
        while True:
            with turn(folder, patience):
                _sweep(folder)
                plan = _plan_to_join(job)
                states = job.states()  # after that: while a plan is open, others commit
                before = before or _counts(job, states)
                plan = plan or _new_plan(job, states, builder.seen)
                if plan is None:
                    manifest = _assemble(job, states)
                    break
            builder.work_off(plan)
        stop_here()
    tables = {
        name: TableResult(
            encoded=count - before[name],
            present=before[name],
            bytes=manifest.tables[name].bytes,
            seconds=builder.seconds(name),
        )
        for name, count in _counts(job, states).items()
    }
    return BuildResult(
        cache=str(folder),
        samples=manifest.samples,
        rejected=manifest.rejected,
        tables=tables,
        seconds=time.perf_counter() - start,
        notes=(job.source.description, *job.notes),
    )


def _counts(job: Inventory, states: Mapping[str, TableState]) -> dict[str, int]:
    """Rows, by table, that the samples use and that are there."""
    return {name: len(set(job.wanted(name)) & state.stored.key_set()) for name, state in states.items()}


def survey(source: str, cache: str, config: BuildConfig, say: Callable[[str], None]) -> Inventory:
    """What a build of `cache` has to know, once it is clear that it may write there."""
    folder = Path(cache)
    _check_target(folder)
    check_device(config.device)
    return take_inventory(source, folder, config, say)


def _check_target(folder: Path) -> None:
    """Refuse to write into a folder that is something else."""
    if folder.exists() and not folder.is_dir():
        raise CacheMismatchError(f"{folder} is a file; expected a folder for the cache, or a path where nothing is")
    links = [entry.name for entry in folder.iterdir() if entry.is_symlink()] if folder.is_dir() else []
    if links:
        raise CacheMismatchError(
            f"{folder} holds the link {min(links)}, through which a build would write elsewhere; "
            "expected a folder that owns its files; put what it leads to in its place"
        )
    if folder.is_dir() and not (folder / MANIFEST).exists() and not (folder / "plans").exists():
        foreign = [entry.name for entry in folder.iterdir() if not entry.name.startswith((".tmp-", TURN))]
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


def _new_plan(job: Inventory, states: Mapping[str, TableState], seen: Mapping[str, set[bytes]]) -> Plan | None:
    """A plan, frozen, for what is missing; None when nothing is."""
    plan = missing_rows(job, states, retry=job.config.retry_rejected, seen=seen)
    if job.config.format == "webdataset" and not plan.keys:
        whole, _ = whole_samples(job.candidates, states)
        rows = job.config.rows_per_shard or default_rows_per_shard(joined_recipe(SAMPLES, job.recipes))
        plan = plan_packing(job.folder, job.recipes, whole, rows)
    if not plan.keys:
        return None
    freeze_plan(job.folder, plan)
    return plan


def _plan_to_join(job: Inventory) -> Plan | None:
    """The open plan, if it is of the recipes that are wanted and not finished; else it is closed."""
    plan = open_plan(job.folder)
    if plan is None:
        return None
    joined = [joined_recipe(kind, job.recipes) for kind in (RESERVED, SAMPLES)]
    wanted = {recipe.fingerprint for recipe in [*job.recipes.values(), *joined]}
    ours = all(table.recipe.fingerprint in wanted for table in plan.tables)
    known = all(
        set(job.wanted(table.recipe.table)).issuperset(table.keys)
        for table in plan.tables
        if table.recipe.table in job.recipes
    )
    if not (ours and known):
        _refuse_beside_others(job.folder, plan, "from another source" if ours else "with other settings")
    if ours and unfinished(job.folder, plan):
        return plan
    close_plan(job.folder)
    return None


def _refuse_beside_others(folder: Path, plan: Plan, how: str) -> None:
    claims = claims_folder(folder, plan)
    for claim in sorted(claims.iterdir()) if claims.is_dir() else ():
        other = holder(claim)
        if other is not None and not is_gone(other):
            raise CacheBusyError(
                f"{folder} is being built {how} by {other} (see {claim}); expected builders of one cache to be given "
                "the same source and settings; wait for that one to end, or stop it: what it has committed is kept"
            )


def _assemble(job: Inventory, states: Mapping[str, TableState]) -> Manifest:
    """Write what makes the committed rows a cache; every builder comes to the same bytes."""
    if job.config.format == "zarr":
        return assemble(job.folder, job.source, job.candidates, job.refused, states, job.models, "zarr")
    recipe = joined_recipe(SAMPLES, job.recipes)
    rejected = [rejection for state in states.values() for rejection in state.rejected.values()]
    record_rejections(job.folder / recipe.directory, recipe, rejected, job.provenance())
    packed = job.packed()
    manifest = assemble(job.folder, job.source, job.candidates, job.refused, packed, job.models, "webdataset")
    for staged in job.recipes.values():
        remove(job.folder / staged.directory)
    return manifest


def _say(report: Report | None, message: str) -> None:
    if report:
        report(BuildProgress(table="", done=0, total=0, seconds=0.0, busy={}, message=message))
