"""The same cache in the other form, or of fewer tables: rows are copied, checked on the way; nothing is encoded.

What is to be written is frozen as a plan, as for a build, so that several processes may write it together, and what was
interrupted goes on where it stopped. No source is needed.
"""

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import get_args

from kcache.build.builder import Claims, Work, work_off
from kcache.build.claims import TURN, Patience, is_mine, renewed, turn, unless_lost, worker_place
from kcache.build.committed import read_committed
from kcache.build.finish import finish_cache, remove_superseded
from kcache.build.plan import Plan, PlannedShard, TablePlan, clear_plans, close_plan, freeze_plan, open_plan, unfinished
from kcache.build.work.progress import BuildReport, ShardProgress
from kcache.config import Say, Stage, check_worker, unheard
from kcache.config.shapes import resolutions_of
from kcache.errors import CacheBusyError, CacheMismatchError, ConfigError
from kcache.places import Place, cache_place, place_of
from kcache.places.bucket import BucketPath
from kcache.places.conditional import check_store
from kcache.places.effects import make_folder
from kcache.places.holds import exclusive, knows_readers, remove_leftovers, shared
from kcache.stopping import stop_here, stopped_when_safe
from kcache.store.formats import FORMATS
from kcache.store.manifest import Manifest
from kcache.store.recipe import KINDS, Recipe, kind_of
from kcache.store.recorded import build_line
from kcache.store.shaped.wants import tables_of
from kcache.upkeep.copying import CacheContents, CacheCopier, check_new_cache, read_contents
from kcache.upkeep.portions import Portion

PortionOf = Callable[[Recipe, PlannedShard], Portion]
"""Cuts a planned shard out of what is copied."""
Engine = Callable[[Place, Plan, Patience, BuildReport | None, PortionOf], AbstractContextManager[Work]]
"""Made of the new cache, its plan, who waits, who is told, and what cuts out shards: gives what has those copied."""


def convert_cache(
    cache: str | Place,
    new: str | Place,
    form: str,
    *,
    stage: Stage = "all",
    resolution: Sequence[int] = (),
    rows_per_shard: int | None = None,
    worker: str | None = None,
    take_over: bool = False,
    report: BuildReport | None = None,
    say: Say = unheard,
    engine: Engine | None = None,
) -> Manifest:
    """Write the cache at `cache` into the folder `new` in the form `form`, "zarr" or "webdataset".

    Samples and recipes stay; rows that no sample uses are left behind, and tables that `stage` does not read, or whose
    latents are of none of the sides `resolution`, where any are given. `new` is a cache once all of it is there; after
    an interruption the same call finishes it, and several may be at work together, each being `worker` "I/N".
    `rows_per_shard` None takes what makes about 256 MB. `report` is told how each table, or the tars of samples, goes.
    `engine` has the shards copied, None by this process. Raises ConfigError, CacheMismatchError for a `new` that holds
    something else, CacheBusyError, EngineError, and the errors of `Cache.open` for `cache`.
    """
    if form not in FORMATS:
        raise ConfigError(f"--format is {form!r}; expected {' or '.join(FORMATS)}")
    check_worker(worker)
    source, target = cache_place(cache), place_of(new)
    contents = _of_stage(read_contents(source), stage, resolution)
    check_new_cache(target, form, contents.recipes, contents.manifest.samples_digest)
    check_store(target)
    make_folder(target)
    copier, patience = CacheCopier(contents, target, form), Patience(say=say, take_over=take_over)
    with shared(target), renewed(), stopped_when_safe():
        while True:
            with turn(target, patience):
                remove_leftovers(target)
                plan = _plan_to_join(copier, target)
                # Another one had the turn meanwhile, and opened a plan or finished: look again.
                with unless_lost(lambda: not is_mine(target / TURN)), suppress(CacheBusyError):
                    plan = plan or _new_plan(copier, target, rows_per_shard)
                    if plan is None and is_mine(target / TURN):
                        clear_plans(target)
                        manifest = _finish(copier, contents, target, form)
                        break
            if plan is not None:
                if BucketPath in (type(source), type(target)):
                    size = copier.size(unfinished(target, plan))
                    through = "this machine" if engine is None else "the machines of the cluster"
                    say(f"{_size_text(size)} to copy, through {through}, from {source} to {target}")
                with (engine or _here)(target, plan, patience, report, copier.portion) as work:
                    work_off(target, plan, worker_place(worker, os.environ), patience, work)
        stop_here()
    with suppress(CacheBusyError), exclusive(target):
        if knows_readers(target):
            remove_superseded(target, manifest)
    return manifest


def _of_stage(contents: CacheContents, stage: Stage, resolution: Collection[int]) -> CacheContents:
    """What of a cache `stage` reads, with latents of these sides only; raises ConfigError for what is not in it."""
    if stage not in get_args(Stage):
        raise ConfigError(f"--stage is {stage!r}; expected {', '.join(get_args(Stage))}")
    kinds = [kind for kind in KINDS if stage in ("all", *kind.readers)]
    if resolution and not any(kind.sided for kind in kinds):
        raise ConfigError(f"--resolution was given, but --stage {stage} reads no latents; leave it out")
    folder, manifest = contents.folder, contents.manifest
    has = f"{folder} has {', '.join(sorted(manifest.tables))}; expected a cache that has them"
    if lacking := sorted(set(resolution) - set(resolutions_of(manifest.shape_sets))):
        line = build_line(folder, manifest, "latents", lacking[0])
        raise ConfigError(f"--resolution {lacking[0]} asks for latents of that side, but {has}; add them to it: {line}")
    sets = [each for each in manifest.shape_sets if not resolution or each.resolution in resolution]
    sided = tables_of(sets, manifest.wants.controls)
    read = [name for name in manifest.tables if stage in ("all", *kind_of(name).readers)]
    names = [name for name in read if not kind_of(name).sided or name in sided]
    for kind in kinds:
        if stage != "all" and kind not in map(kind_of, names):
            line = build_line(folder, manifest, kind.fields[0])
            raise ConfigError(f"--stage {stage} reads {kind.name}, but {has}; add them to it: {line}")
    return contents.of_tables(names, sets)


def _plan_to_join(copier: CacheCopier, target: Place) -> Plan | None:
    """The open plan, if it is not finished, else it is closed; raises CacheMismatchError where it is of other rows."""
    plan = open_plan(target)
    if plan is None:
        return None
    wanted = {recipe.fingerprint: recipe for recipe in copier.recipes}
    for table in plan.tables:
        recipe = wanted.get(table.recipe.fingerprint)
        if recipe is None or not table.keys.among(copier.wanted(recipe)).all():
            raise CacheMismatchError(
                f"{target} is being built, of other inputs or in another form; expected the cache that this makes, or "
                "nothing; give a new or empty folder for the new cache"
            )
    if unfinished(target, plan):
        return plan
    close_plan(target, plan)
    return None


def _new_plan(copier: CacheCopier, target: Place, rows_per_shard: int | None) -> Plan | None:
    """A plan, frozen, for what the target lacks; None when that is nothing."""
    plan = copier.plan(rows_per_shard)
    if not plan.rows:
        return None
    freeze_plan(target, plan)
    return plan


@contextmanager
def _here(_: Place, __: Plan, ___: Patience, report: BuildReport | None, portion: PortionOf) -> Iterator[Work]:
    """Copying by this process, shard by shard."""

    def write(table: TablePlan, shards: Sequence[PlannedShard], claims: Claims) -> None:
        progress = ShardProgress(table.recipe.table, sum(len(shard.keys) for shard in shards), report)
        for shard in progress.counted(claims.claimed(table, shards, progress)):
            own = portion(table.recipe, shard)
            if claims.kept(table, shard):
                own.commit()

    yield write


def _finish(copier: CacheCopier, contents: CacheContents, target: Place, form: str) -> Manifest:
    """Write what makes the committed rows a cache; every process comes to the same bytes."""
    copier.record_rejected()
    tables = read_committed(target, form, contents.recipes)
    models = contents.manifest.models
    return finish_cache(target, contents.samples, contents.refused, tables, models, form, contents.cut, contents.wants)


def _size_text(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
