"""Building a cache: find what is missing, freeze a plan for it, encode it, assemble the result.

Building again is how everything is brought up to date: new and edited inputs are encoded, nothing else is.
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from kcache.build.builder import Builder
from kcache.build.claims import TURN, Patience, is_mine, refuse_beside_others, renewed, turn, unless_lost, worker_place
from kcache.build.committed import Committed, check_target, record_rejections
from kcache.build.departures import NOBODY, Leaving, beside_earlier, leaving
from kcache.build.finish import finish_build, no_sample, remove_superseded, whole_samples
from kcache.build.joined_tars import plan_tars, shard_recipes, tar_keys, tar_recipe
from kcache.build.pictures.sizes import PictureSizes, resized, sized
from kcache.build.plan import Plan, claims_folder, clear_plans, close_plan, freeze_plan, open_plan, unfinished
from kcache.build.survey import Survey, missing_rows, other_verdicts, survey
from kcache.build.work.progress import BuildReport
from kcache.config import BuildConfig, Say, unheard
from kcache.disk.pieces import Ahead, nobody
from kcache.encoders.recipes import default_rows_per_shard
from kcache.errors import CacheBusyError
from kcache.machine import check_device, without_collections
from kcache.places import Place, place_of
from kcache.places.conditional import check_store
from kcache.places.effects import make_folder, remove
from kcache.places.holds import exclusive, knows_readers, remove_leftovers, shared
from kcache.stopping import stop_here, stopped_when_safe
from kcache.store.index import open_index, tally_of
from kcache.store.manifest import Manifest, read_manifest, shapes_to_note
from kcache.store.recipe import SAMPLES
from kcache.store.samples import with_ids


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
    leaving: Leaving = NOBODY
    """Which samples the cache had and has not any more."""
    losses: tuple[str, ...] = ()
    """What of the samples is not in the cache as it was given, a sentence each."""


def build_cache(
    source: str, cache: str, config: BuildConfig, *,
    report: BuildReport | None = None, say: Say = unheard, engine: Callable[..., Builder] = Builder,
    ahead: Ahead = nobody,
) -> BuildResult:  # fmt: skip
    """Encode whatever of `source` the cache at `cache` lacks, and make it complete.

    An interrupted build goes on at the shard where it stopped, and several processes may build one cache together. On
    SIGINT or SIGTERM the batch is finished, then KeyboardInterrupt or SystemExit(143) raised. Inputs that cannot be
    cached are named in rejected.jsonl. `report` is told how each table goes, `say` what is worth a line; `engine` works
    plans off, and `ahead` looks through the source before this process does. Raises SourceError, also where no input
    became a sample, ModelError, ConfigError, CacheBusyError, CacheWriteError, CacheCorruptError, or CacheMismatchError,
    also where most samples of the cache would leave and that is not asked for.
    """
    check_store(place_of(cache))  # before hours of looking through a source
    job = checked_survey(source, cache, config, say, ahead)
    if not config.replace:
        job.leaving.check(job.folder)
    for note in job.notes:
        say(note)
    return complete(job, report=report, say=say, engine=engine)


def complete(
    job: Survey, *, report: BuildReport | None = None, say: Say = unheard, engine: Callable[..., Builder] = Builder
) -> BuildResult:
    """Encode whatever the cache of `job` lacks, and make it one of the job's samples; raises like `build_cache`."""
    start, folder = time.perf_counter(), job.folder
    before: dict[str, int] | None = None
    verdicts: list[str] = []
    patience = Patience(say=say, take_over=job.config.take_over)
    sizes = PictureSizes(job, say)
    builder = engine(job, worker_place(job.config.worker, os.environ), patience, report, sizes)
    check_store(folder)
    make_folder(folder)
    with shared(folder), renewed(), stopped_when_safe():
        while True:
            with turn(folder, patience):
                remove_leftovers(folder)
                plan = open_plan(folder)
                left = plan is not None and bool(unfinished(folder, plan))
                # After that: where nothing is left, all sizes that others found by decoding are there to be read.
                job = builder.job = resized(job)
                plan = _joined(job, plan, left, patience) if plan else None
                found = job.committed()  # after that: while a plan is open, others commit
                if before is None:
                    before, verdicts = _counts(job, found), other_verdicts(job, found.tables)
                    for note in verdicts:
                        say(note)
                # Another one had the turn meanwhile, and opened a plan or finished: look again.
                with unless_lost(lambda: not is_mine(folder / TURN)), suppress(CacheBusyError):
                    plan = plan or _new_plan(job, found, builder.seen, sizes)
                    if plan is None and is_mine(folder / TURN):
                        clear_plans(folder)
                        manifest = _finish(job, found, sizes)
                        break
            if plan is not None:
                builder.work_off(plan, found)
        stop_here()
    _tidy(folder, manifest)
    who = job.leaving
    if job.before and builder.seen:  # with other settings, pictures may be rejected that the cache had
        whole, rejected = whole_samples(job.samples, found.tables, job.wants)
        who = leaving(job.before, whole, [*job.refused, *rejected])
    more = who.notes if len(who) > len(job.leaving) else ()
    for note in more:
        say(note)
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
        leaving=who,
        losses=tuple(tally_of(folder, manifest, open_index(folder, manifest)).sentences),
        notes=(job.source.description, *job.notes, *verdicts, *more),
    )


def _tidy(folder: Place, manifest: Manifest) -> None:
    """Remove what earlier manifests used, unless someone reads it or another builder is at work: then it stays."""
    with suppress(CacheBusyError), exclusive(folder):
        if knows_readers(folder) and read_manifest(folder) == manifest:
            remove_superseded(folder, manifest)


def _counts(job: Survey, found: Committed) -> dict[str, int]:
    """Rows, by table, that the samples use and that are there."""
    return {name: state.stored.used(job.wanted(name)) for name, state in found.tables.items()}


@without_collections()
def checked_survey(source: str, cache: str, config: BuildConfig, say: Say, ahead: Ahead = nobody) -> Survey:
    """What a build of `cache` has to know, once it is clear that it may write there."""
    folder = place_of(cache)
    check_target(folder)
    check_device(config.device)
    job = beside_earlier(sized(survey(source, folder, config, say, ahead), say))
    if not job.samples:
        raise no_sample(folder, job.refused)
    return job


def _new_plan(job: Survey, found: Committed, seen: Mapping[str, set[bytes]], sizes: PictureSizes) -> Plan | None:
    """A plan, frozen, for what is missing; None when nothing is."""
    plan = missing_rows(job, found.tables, retry=job.config.retry_rejected, seen=seen)
    if found.waiting and not plan.rows:
        whole = sizes.readable(whole_samples(job.samples, found.tables, job.wants)[0])
        rows = job.config.rows_per_shard or default_rows_per_shard(*job.recipes.values())
        plan = plan_tars(job.folder, job.recipes, with_ids(whole), rows, job.wants) if whole else plan
    if not plan.rows:
        return None
    freeze_plan(job.folder, plan)
    return plan


def _joined(job: Survey, plan: Plan, left: bool, patience: Patience) -> Plan | None:
    """The open plan, if it is of the recipes that are wanted and something was left to do; else it is closed."""
    tars = shard_recipes("webdataset", job.recipes)
    wanted = {recipe.fingerprint for recipe in [*job.recipes.values(), *tars]}
    ours = all(table.recipe.fingerprint in wanted for table in plan.tables)
    ours = ours and (plan.shapes, plan.flip) == (shapes_to_note(job.wants.sets), job.wants.flip)
    if not (ours and _is_of(job, plan)):
        how = "from another source" if ours else "with other settings"
        refuse_beside_others(claims_folder(job.folder, plan), patience, how)
    if ours and left:
        if job.config.rows_per_shard not in (None, *(table.rows_per_shard for table in plan.tables)):
            patience.say(
                "what an earlier build left to do is finished first, in shards of the size that it was begun with"
            )
        return plan
    close_plan(job.folder, plan)
    return None


def _is_of(job: Survey, plan: Plan) -> bool:
    """Whether all inputs of a plan of the job's recipes are the job's."""
    for table in plan.tables:
        name = table.recipe.table
        if name in job.recipes:
            wanted: Iterable[bytes] = job.wants.possible(name, job.samples)
        elif name == SAMPLES:
            wanted = tar_keys(with_ids(whole_samples(job.samples, job.committed().tables, job.wants)[0]), job.wants)
        else:
            continue  # the tar of the reserved rows is everybody's
        if not table.keys.among(wanted).all():
            return False
    return True


@without_collections()
def _finish(job: Survey, found: Committed, sizes: PictureSizes) -> Manifest:
    """Write what makes the committed rows a cache; every builder comes to the same bytes."""
    if found.waiting:
        recipe = tar_recipe(SAMPLES, job.recipes)
        for provenance, rejected in found.judged_now():
            record_rejections(job.folder / recipe.directory, recipe, rejected, provenance)
    manifest = finish_build(job, job.committed().in_place if found.waiting else found.in_place, sizes)
    for state in found.waiting.values() if is_mine(job.folder / TURN) else ():
        remove(job.folder / state.recipe.directory)
    return manifest
