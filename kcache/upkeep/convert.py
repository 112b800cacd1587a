"""The same cache in the other form: rows are copied, checked on the way; nothing is encoded and no source is needed."""

from kcache.build.committed import read_committed, record_rejections
from kcache.build.finish import finish_cache, remove_superseded
from kcache.build.joined_tars import TarWriter, plan_tars, tar_recipe
from kcache.build.plan import plan_table
from kcache.config import CountReport
from kcache.encoders.recipes import default_rows_per_shard
from kcache.errors import ConfigError
from kcache.places import Place, cache_place, place_of
from kcache.places.effects import make_folder
from kcache.places.holds import exclusive, knows_readers, remove_leftovers
from kcache.stopping import stop_here, stopped_when_safe
from kcache.store.formats import FORMATS
from kcache.store.index import table_state
from kcache.store.manifest import Manifest
from kcache.store.recipe import SAMPLES, kind_of
from kcache.upkeep.copying import (
    CacheContents,
    RowCopier,
    check_new_cache,
    read_contents,
    with_progress,
)


def convert_cache(
    cache: str | Place,
    new: str | Place,
    form: str,
    *,
    rows_per_shard: int | None = None,
    report: CountReport | None = None,
) -> Manifest:
    """Write the cache at `cache` into the folder `new` in the form `form`, "zarr" or "webdataset".

    Samples, recipes and fingerprint stay; rows that no sample uses are left behind. `new` is a cache once all of it is
    there; after an interruption the same call finishes it. `rows_per_shard` None takes what makes about 256 MB.
    `report` is called with what is written, how many rows or samples of it are done, and their number. Raises
    ConfigError, CacheMismatchError for a `new` that holds something else, CacheBusyError, and the errors of
    `Cache.open` for `cache`.
    """
    if form not in FORMATS:
        raise ConfigError(f"--format is {form!r}; expected {' or '.join(FORMATS)}")
    contents, target = read_contents(cache_place(cache)), place_of(new)
    check_new_cache(target, form, contents.recipes, contents.manifest.samples_digest)
    make_folder(target)
    with exclusive(target), stopped_when_safe():
        remove_leftovers(target)
        write_shards(contents, target, form, rows_per_shard, report)
        tables = read_committed(target, form, contents.recipes)
        manifest = finish_cache(
            target, contents.samples, contents.refused, tables, contents.manifest.models, form, contents.cut
        )
        if knows_readers(target):
            remove_superseded(target, manifest)
        stop_here()
    return manifest


def write_shards(
    contents: CacheContents,
    target: Place,
    form: str,
    rows_per_shard: int | None = None,
    report: CountReport | None = None,
) -> None:
    """Commit in `target` whatever of `contents` it lacks, in the form `form`, and all that was rejected.

    The cut is the same whenever it is resumed. `report` is as in `convert_cache`.
    """
    (_write_tables if form == "zarr" else _write_tars)(contents, target, rows_per_shard, report)


def _write_tables(
    contents: CacheContents, target: Place, rows_per_shard: int | None, report: CountReport | None
) -> None:
    for name, state in contents.tables.items():
        there = table_state(target, state.recipe)
        plan = plan_table(
            state.recipe,
            kind_of(name).wanted(contents.samples),
            there.stored.key_set,
            (),
            rows_per_shard=rows_per_shard or default_rows_per_shard(state.recipe),
            first_shard=there.next_shard,
        )
        folder = target / state.recipe.directory
        copier = RowCopier(contents.folder, state.recipe, state.stored, contents.sizes)
        for shard in with_progress(plan, name, report):
            copier.write(folder, shard, contents.provenance)
        record_rejections(folder, state.recipe, list(state.rejected.values()), contents.provenance)


def _write_tars(contents: CacheContents, target: Place, rows_per_shard: int | None, report: CountReport | None) -> None:
    recipe = tar_recipe(SAMPLES, contents.recipes)
    writer = TarWriter(target, contents.tables, contents.provenance, rows_from=contents.folder)
    plan = plan_tars(target, contents.recipes, contents.samples, rows_per_shard or default_rows_per_shard(recipe))
    for table in plan.tables:
        name = table.recipe.table
        writer.write(name, with_progress(table, name, report), contents.planned)
    rejected = [rejection for state in contents.tables.values() for rejection in state.rejected.values()]
    record_rejections(target / recipe.directory, recipe, rejected, contents.provenance)
