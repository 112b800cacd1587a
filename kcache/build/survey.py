"""What a build has to do: what the source offers, which tables are wanted, and what of them is committed."""

import time
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kcache.build.committed import Committed, read_committed
from kcache.build.departures import NOBODY, Leaving
from kcache.build.joined_tars import shard_recipes
from kcache.build.pictures.asked import replaced, wanted
from kcache.build.plan import Plan, open_plan, plan_table
from kcache.config import BuildConfig, Say
from kcache.disk.memo import DigestMemo
from kcache.disk.pieces import Ahead, nobody
from kcache.encoders.color import check_color_management
from kcache.encoders.decoding import decoder_facts, outgrown_limit
from kcache.encoders.fit import check_request
from kcache.encoders.recipes import default_rows_per_shard, in_srgb, step_of_sides, table_recipe
from kcache.encoders.repositories import Repository, find_repositories
from kcache.errors import CacheMismatchError, InputRejected, KcacheError
from kcache.machine import default_device
from kcache.places import Place
from kcache.sources import Source, open_source
from kcache.store.digests import NO_CONTROL, Keys, Positions, caption_key, control_row_keys, mirrored_keys
from kcache.store.formats.columns import Samples
from kcache.store.index import TableState
from kcache.store.manifest import Manifest, read_manifest, shapes_to_note
from kcache.store.recipe import IMAGE_EMBEDS, TEXT, Recipe, kind_of, recipe_differences, stage_of, table_names
from kcache.store.samples import Refusal, Sample
from kcache.store.shaped.wants import Wants, tables_of
from kcache.tally import counted

_REPORT_SECONDS = 10.0
"""How often it is said how many images were looked through, which for the first time means reading each of them."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Everything that a build needs to know, found out before it writes."""

    folder: Place
    config: BuildConfig
    source: Source
    samples: Sequence[Sample]
    """What the source offers, without ids, and without sizes where no shape depends on them."""
    positions: Positions
    """Where in the source each image stands."""
    refused: Sequence[Refusal]
    repositories: Mapping[str, Repository]
    """Where the encoders are, by role: "prior" and, where it is needed, "decoder"."""
    recipes: Mapping[str, Recipe]
    wants: Wants
    """Which rows the tables should have of the samples."""
    controls: Mapping[str, Positions]
    """Of each kind of control images, where in the source those are that rows have the keys of."""
    earlier: Mapping[str, Recipe]
    """The recipes of the cache as it is: {} where there is none yet."""
    notes: tuple[str, ...]
    """Which tables of the cache are of another recipe than the wanted one, and who leaves it, in words."""
    manifest: Manifest | None = None
    """That of the cache as it is; None where there is none yet."""
    before: Samples = field(default_factory=lambda: Samples(()))
    """The samples that the cache has, as far as they are to be compared with what it will have."""
    leaving: Leaving = NOBODY
    """Which of them it will not have."""

    def wanted(self, table: str) -> Keys:
        """The keys that `table` should hold, in sample order, the reserved row first."""
        return self.wants.wanted(table, self.samples)

    def repository(self, table: str) -> Repository:
        """Where the encoder of `table` is."""
        return self.repositories[kind_of(table).role]

    def committed(self) -> Committed:
        """What is committed of each table now: read from every commit record and side file."""
        form = self.config.format
        return Committed(
            in_place=read_committed(self.folder, form, self.recipes, self.earlier),
            waiting={} if form == "zarr" else read_committed(self.folder, "zarr", self.recipes),
        )

    @property
    def models(self) -> dict[str, dict[str, str | None]]:
        """Where the encoders came from, for the manifest."""
        return {
            role: {"name": found.name if found.revision else str(found.path), "revision": found.revision}
            for role, found in self.repositories.items()
        }


def survey(source: str, folder: Place, config: BuildConfig, say: Say, ahead: Ahead = nobody) -> Survey:
    """Open the source, digest its images and the encoders' weights, and name the tables that the cache should hold.

    `ahead` may have others look through the source. Raises SourceError, ModelError, ConfigError, or CacheMismatchError
    for a cache of another schema or form.
    """
    manifest, plan = _cache_so_far(folder, config), open_plan(folder)
    earlier = {} if manifest is None else {name: entry.recipe for name, entry in manifest.tables.items()}
    # A first build that was interrupted has no manifest.
    begun = {} if plan is None else {table.recipe.table: table.recipe for table in plan.tables}
    so_far, had = {**begun, **earlier}, manifest or plan
    # The tables that were asked for, and those that the cache holds already: they stay complete.
    unsided = [*table_names(config.stage, []), *(name for name in earlier if not kind_of(name).sided)]
    stage = stage_of([*table_names(config.stage, [(1, 1)]), *earlier])
    with DigestMemo() as memo:
        opened = open_source(
            source, config, max_train_samples=config.max_train_samples, need_captions=TEXT.name in unsided,
            memo=memo, ahead=ahead, rehash=config.rehash,
        )  # fmt: skip
        repositories = find_repositories(config, stage)
        say(opened.description)
        step = step_of_sides(repositories["decoder"]) if "decoder" in repositories else 1
        wants = wanted(config, None if had is None else had.wants, step)
        tables = list(dict.fromkeys((*unsided, *tables_of(wants.sets, wants.controls))))
        recipes = {
            name: table_recipe(
                name, config, repositories[kind_of(name).role], memo, config.rehash, say, known=so_far.get(name)
            )
            for name in tables
        }
        if config.color is None and _is_in_srgb(folder, earlier, recipes):
            recipes = {name: in_srgb(recipe) for name, recipe in recipes.items()}
        if any(recipe.preprocess.get("color") == "srgb" for recipe in recipes.values()):
            check_color_management()
        numbers, unreadable = array("q"), list[Refusal]()
        samples = Samples.of(_offered(opened, memo, config.rehash, say, numbers, unreadable))
    before = () if manifest is None else manifest.shape_sets
    return Survey(
        folder=folder,
        config=config,
        source=opened,
        samples=samples,
        positions=Positions(samples.image_keys, np.array(numbers, np.int64)),
        controls={
            name: Positions(
                control_row_keys(samples.image_keys, samples.control_keys(number), NO_CONTROL),
                np.array(numbers, np.int64),
            )
            for number, name in enumerate(wants.controls)
        },
        refused=[*opened.refused, *unreadable],
        repositories=repositories,
        recipes=recipes,
        wants=wants,
        earlier=earlier,
        notes=(*_recipe_notes(earlier, recipes), *replaced(before, wants.sets)),
        manifest=manifest,
    )


def _cache_so_far(folder: Place, config: BuildConfig) -> Manifest | None:
    """The manifest, if there is one; raises CacheMismatchError where it is of another schema or form."""
    try:
        manifest = read_manifest(folder)
    except CacheMismatchError:
        raise
    except KcacheError:
        return None  # a damaged or missing manifest is derived from the shards, and written anew by this build
    if manifest.format != config.format:
        raise CacheMismatchError(
            f"{folder} is a {manifest.format} cache; --format {config.format} was asked for; give --format "
            f"{manifest.format}, or run `kcache cache-convert {folder} NEW --format {config.format}`"
        )
    return manifest


def _is_in_srgb(folder: Place, earlier: Mapping[str, Recipe], recipes: Mapping[str, Recipe]) -> bool:
    """Whether colours were converted in what a cache has, finished or not; True where there is nothing of it yet.

    `recipes` are those of numbers as they are: their folders show what was begun so.
    """
    if known := _of_images(earlier):
        return known[0].preprocess.get("color") == "srgb"
    converted = {name: in_srgb(recipe) for name, recipe in recipes.items()}
    begun, converting = (
        any((folder / made.directory).is_dir() for made in (*shard_recipes("webdataset", of), *_of_images(of)))
        for of in (recipes, converted)
    )
    return converting or not begun


def _of_images(recipes: Mapping[str, Recipe]) -> list[Recipe]:
    return [recipe for name, recipe in recipes.items() if kind_of(name).per == "image"]


def _recipe_notes(earlier: Mapping[str, Recipe], recipes: Mapping[str, Recipe]) -> list[str]:
    notes = []
    for name, found in earlier.items():
        if name in recipes and found.fingerprint != recipes[name].fingerprint:
            differences = "; ".join(recipe_differences(found, recipes[name]))
            notes.append(f"{name} in the cache is of another recipe, its rows are not used ({differences})")
    return notes


def _offered(
    source: Source, memo: DigestMemo, rehash: bool, say: Say, numbers: "array[int]", refused: list[Refusal]
) -> Iterator[Sample]:
    """The samples one by one, their places added to `numbers`, and to `refused` those that are none."""
    begun = reported = time.monotonic()
    for i in range(len(source)):
        if (now := time.monotonic()) - reported >= _REPORT_SECONDS:
            reported, rate = now, max(i, 1) / (now - begun)
            say(
                f"looked through {i:,} of {len(source):,} images, {rate:,.0f}/s, {(len(source) - i) / rate:,.0f} s left"
            )
        captions = source.captions(i)
        try:
            key, controls = source.image_key(i, memo, rehash), source.control_keys(i, memo, rehash)
        except InputRejected as error:
            refused.append(Refusal(name=source.name(i), stage=error.stage, reason=error.reason))
            continue
        if key == IMAGE_EMBEDS.reserved:
            reason = "no image, but the text that stands for all-zero pixels"
            refused.append(Refusal(name=source.name(i), stage="source", reason=reason))
            continue
        keys = tuple(caption_key(caption) for caption in captions)
        numbers.append(i)
        weight, repeats = source.counts(i)
        yield Sample(
            name=source.name(i), image_key=key, captions=captions, caption_keys=keys, weight=weight, repeats=repeats,
            control_keys=controls,
        )  # fmt: skip


def acceptable(samples: Sequence[Sample], tables: Mapping[str, TableState], wants: Wants) -> Sequence[Sample]:
    """Those that can become the cache's: no table has rejected the image, one that goes with it, or all captions."""
    of_images = [state.rejected for name, state in tables.items() if kind_of(name).per == "image"]
    images = frozenset[bytes]().union(*of_images)
    captions = tables[TEXT.name].rejected if TEXT.name in tables else {}
    columns = Samples.of(samples)
    for name, state in tables.items():
        if kind_of(name).per == "control" and state.rejected:
            columns = columns.where(~wants.use(name, columns, Keys.of(state.rejected)))
    if not images and not captions:
        return columns
    rejected, counts = columns.count_captions(columns.caption_keys.among(captions)), np.diff(columns.caption_bounds)
    refused = columns.image_keys.among(images) | mirrored_keys(columns.image_keys).among(images)
    return columns.where(~refused & ((rejected < counts) | (counts == 0)))


def other_verdicts(job: Survey, tables: Mapping[str, TableState]) -> list[str]:
    """In words, which samples of `job` that are not tried again would perhaps not be rejected now, as they were."""
    now = {} if job.config.retry_rejected else decoder_facts()
    then: dict[bytes, tuple[str, ...]] = {}
    for state in tables.values():
        for key, rejection in state.rejected.items() if now else ():
            before = state.judged_by.get(rejection.key, {})
            differing = [
                _difference(n, before[n], is_now) for n, is_now in now.items() if before.get(n, is_now) != is_now
            ]
            if not now.keys() <= before.keys():
                differing = ["one of an earlier kcache"]
            if limit := outgrown_limit(rejection.reason, job.config.max_pixels):
                differing = [f"--max-pixels {limit:,}, this is {job.config.max_pixels:,}"]
            if differing:
                then[key] = tuple(differing)
    keys = Samples.of(job.samples).image_keys
    counts = Counter(then[key] for key in keys[keys.among(then)])
    return [
        f"{counted(count, 'input')} {'was' if count == 1 else 'were'} rejected by another decoder "
        f"({'; '.join(differing)}): --retry-rejected tries {'it' if count == 1 else 'them'} again"
        for differing, count in sorted(counts.items())
    ]


def _difference(name: str, then: str, now: str) -> str:
    if name != "formats":
        return f"{name} {then}, this is {now}"
    old, new = set(then.split(",")), set(now.split(","))
    parts = [("read no", new - old), ("read", old - new)]
    return "; ".join(f"which {verb} {', '.join(sorted(names))}" for verb, names in parts if names)


def missing_rows(
    job: Survey, tables: Mapping[str, TableState], *, retry: bool, seen: Mapping[str, Collection[bytes]]
) -> Plan:
    """The plan for all that no table has yet; `seen` are keys, by table, that this build has dealt with already.

    Raises ConfigError for batches or shards that no memory here can hold.
    """
    samples = job.samples if retry else acceptable(job.samples, tables, job.wants)
    plans = []
    for name, state in tables.items():
        skipped = {*seen.get(name, ()), *(() if retry else state.rejected)}
        plans.append(
            plan_table(
                state.recipe,
                job.wants.wanted(name, samples),
                state.stored.known,
                skipped,
                rows_per_shard=job.config.rows_per_shard or default_rows_per_shard(state.recipe),
                first_shard=state.next_shard,
            )
        )
    for table in plans:
        if table.keys:
            rows, device = min(table.rows_per_shard, len(table.keys)), job.config.device or default_device()
            check_request(table.recipe, job.repository(table.recipe.table), rows, device)
    return Plan(tables=tuple(plans), shapes=shapes_to_note(job.wants.sets), flip=job.wants.flip)
