"""Building a cache: find what is missing, freeze a plan for it, encode it, assemble the result.

Building again is how everything is brought up to date: new and edited inputs are encoded, nothing else is.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kcache.build.builder import Builder, BuildReport, unfinished
from kcache.build.claims import TURN, Patience, holder, turn, worker_place
from kcache.build.committed import Committed
from kcache.build.finish import PictureSizes, finish_build, whole_samples
from kcache.build.joined_tars import plan_tars, shard_recipes, tar_recipe
from kcache.build.plan import Plan, claims_folder, close_plan, freeze_plan, open_plan
from kcache.build.survey import Survey, missing_rows, survey
from kcache.config import BuildConfig, Say, unheard
from kcache.durable import remove, remove_leftovers, shared, writing
from kcache.encoders.recipes import default_rows_per_shard
from kcache.errors import CacheBusyError, CacheMismatchError
from kcache.machine import check_device
from kcache.processes import is_gone
from kcache.stopping import stop_here, stopped_when_safe
from kcache.store.manifest import MANIFEST, Manifest
from kcache.store.recipe import SAMPLES, SHARD_FOLDER
from kcache.store.samples import with_ids
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
    `decode` in which a full batch was ready behind one slow input; more cores help only with the rest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildResult:
    """What a build did."""

    cache: str
    samples: int
    rejected: int
    tables: Mapping[str, TableResult]
    seconds: float
    notes: tuple[str, ...]


def build_cache(
    source: str, cache: str, config: BuildConfig, *, report: BuildReport | None = None, say: Say = unheard
) -> BuildResult:
    """Encode whatever of `source` the cache at `cache` lacks, and make it complete.

    An interrupted build goes on at the shard where it stopped, and several processes may build one cache together. On
    SIGINT or SIGTERM the batch is finished, then KeyboardInterrupt or SystemExit(143) raised. Inputs that cannot be
    cached are named in rejected.jsonl. `report` is told how each table goes, `say` what is worth a line. Raises
    SourceError, ModelError, ConfigError, CacheBusyError, CacheMismatchError, CacheWriteError or CacheCorruptError.
    """
    job = checked_survey(source, cache, config, say)
    for note in job.notes:
        say(note)
    return complete(job, report=report, say=say)


def complete(job: Survey, *, report: BuildReport | None = None, say: Say = unheard) -> BuildResult:
    """Encode whatever the cache of `job` lacks, and make it one of the job's samples; raises like `build_cache`."""
    start, folder, before = time.perf_counter(), job.folder, None
    place = worker_place(job.config.worker, os.environ)
    patience = Patience(alone=place[1] == 1, say=say)
    sizes = PictureSizes(job, say)
    builder = Builder(job, place, patience, report, sizes)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with shared(folder), stopped_when_safe():
        while True:
            with turn(folder, patience):
                remove_leftovers(folder)
                plan = _plan_to_join(job, say)
                found = job.committed()  # after that: while a plan is open, others commit
                before = before or _counts(job, found)
                plan = plan or _new_plan(job, found, builder.seen)
                if plan is None:
                    manifest = _finish(job, found, sizes)
                    break
            builder.work_off(plan, found)
        stop_here()
    tables = {
        name: TableResult(
            encoded=count - before[name],
            present=before[name],
            bytes=manifest.tables[name].bytes,
            seconds=builder.seconds(name),
        )
        for name, count in _counts(job, found).items()
    }
    return BuildResult(
        cache=str(folder),
        samples=manifest.samples,
        rejected=manifest.rejected,
        tables=tables,
        seconds=time.perf_counter() - start,
        notes=(job.source.description, *job.notes),
    )


def _counts(job: Survey, found: Committed) -> dict[str, int]:
    """Rows, by table, that the samples use and that are there."""
    return {name: len(set(job.wanted(name)) & state.stored.key_set) for name, state in found.tables.items()}


def checked_survey(source: str, cache: str, config: BuildConfig, say: Say) -> Survey:
    """What a build of `cache` has to know, once it is clear that it may write there."""
    folder = Path(cache)
    _check_target(folder)
    check_device(config.device)
    return survey(source, folder, config, say)


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
        if foreign and not any(map(SHARD_FOLDER.fullmatch, foreign)):
            raise CacheMismatchError(
                f"{folder} is not empty and not a cache (found {', '.join(sorted(foreign)[:3])}); "
                "give an empty or new folder for the cache"
            )


def _new_plan(job: Survey, found: Committed, seen: Mapping[str, set[bytes]]) -> Plan | None:
    """A plan, frozen, for what is missing; None when nothing is."""
    plan = missing_rows(job, found.tables, retry=job.config.retry_rejected, seen=seen)
    if found.waiting and not plan.keys:
        whole, _ = whole_samples(job.samples, found.tables)
        rows = job.config.rows_per_shard or default_rows_per_shard(tar_recipe(SAMPLES, job.recipes))
        plan = plan_tars(job.folder, job.recipes, with_ids(whole), rows)
    if not plan.keys:
        return None
    freeze_plan(job.folder, plan)
    return plan


def _plan_to_join(job: Survey, say: Say) -> Plan | None:
    """The open plan, if it is of the recipes that are wanted and not finished; else it is closed."""
    plan = open_plan(job.folder)
    if plan is None:
        return None
    tars = shard_recipes("webdataset", job.recipes)
    wanted = {recipe.fingerprint for recipe in [*job.recipes.values(), *tars]}
    ours = all(table.recipe.fingerprint in wanted for table in plan.tables)
    known = all(
        set(job.wanted(table.recipe.table)).issuperset(table.keys)
        for table in plan.tables
        if table.recipe.table in job.recipes
    )
    if not (ours and known):
        _refuse_beside_others(job.folder, plan, "from another source" if ours else "with other settings")
    if ours and unfinished(job.folder, plan):
        if job.config.rows_per_shard not in (None, *(table.rows_per_shard for table in plan.tables)):
            say("what an earlier build left to do is finished first, in shards of the size that it was begun with")
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


def _finish(job: Survey, found: Committed, sizes: PictureSizes) -> Manifest:
    """Write what makes the committed rows a cache; every builder comes to the same bytes."""
    if found.waiting:
        recipe = tar_recipe(SAMPLES, job.recipes)
        rejected = [rejection for state in found.tables.values() for rejection in state.rejected.values()]
        record_rejections(job.folder / recipe.directory, recipe, rejected, found.provenance)
    manifest = finish_build(job, job.committed().in_place if found.waiting else found.in_place, sizes)
    for state in found.waiting.values():
        remove(job.folder / state.recipe.directory)
    return manifest
