"""What a build has to do: what the source offers, which tables are wanted, and what of them is committed."""

import time
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kcache.build.committed import Committed, read_committed
from kcache.build.departures import NOBODY, Leaving
from kcache.build.joined_tars import shard_recipes
from kcache.build.plan import Plan, open_plan, plan_table
from kcache.config import BuildConfig, Say
from kcache.disk.memo import DigestMemo
from kcache.disk.pieces import Ahead, nobody
from kcache.encoders.color import check_color_management
from kcache.encoders.decoding import decoder_facts, outgrown_limit
from kcache.encoders.fit import check_request
from kcache.encoders.recipes import default_rows_per_shard, in_srgb, table_recipe
from kcache.encoders.repositories import Repository, find_repositories
from kcache.errors import CacheMismatchError, InputRejected, KcacheError
from kcache.machine import default_device
from kcache.places import Place
from kcache.sources import Source, open_source
from kcache.store.digests import EMPTY_CAPTION_KEY, Keys, Positions, caption_key, content_key
from kcache.store.formats.columns import Samples
from kcache.store.index import TableState
from kcache.store.manifest import read_manifest
from kcache.store.recipe import IMAGE_EMBEDS, TEXT, Recipe, kind_of, recipe_differences, stage_of, table_names
from kcache.store.samples import Refusal, Sample
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
    """What the source offers, without ids and sizes."""
    positions: Positions
    """Where in the source each image stands."""
    refused: Sequence[Refusal]
    repositories: Mapping[str, Repository]
    """Where the encoders are, by role: "prior" and, where it is needed, "decoder"."""
    recipes: Mapping[str, Recipe]
    earlier: Mapping[str, Recipe]
    """The recipes of the cache as it is: {} where there is none yet."""
    notes: tuple[str, ...]
    """Which tables of the cache are of another recipe than the wanted one, and who leaves it, in words."""
    before: Samples = field(default_factory=lambda: Samples(()))
    """The samples that the cache has, as far as they are to be compared with what it will have."""
    leaving: Leaving = NOBODY
    """Which of them it will not have."""

    def wanted(self, table: str) -> Keys:
        """The keys that `table` should hold, in sample order, the reserved row first."""
        return kind_of(table).wanted(self.samples)

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
    earlier = _recipes_so_far(folder, config)
    # The tables that were asked for, and those that the cache holds already: they stay complete.
    tables = list(dict.fromkeys((*table_names(config.stage, config.resolution), *earlier)))
    so_far = {**_recipes_begun(folder), **earlier}
    with DigestMemo() as memo:
        opened = open_source(
            source, config, max_train_samples=config.max_train_samples, need_captions=TEXT.name in tables,
            memo=memo, ahead=ahead, rehash=config.rehash,
        )  # fmt: skip
        repositories = find_repositories(config, stage_of(tables))
        say(opened.description)
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
    return Survey(
        folder=folder,
        config=config,
        source=opened,
        samples=samples,
        positions=Positions(samples.image_keys, np.array(numbers, np.int64)),
        refused=[*opened.refused, *unreadable],
        repositories=repositories,
        recipes=recipes,
        earlier=earlier,
        notes=tuple(_recipe_notes(earlier, recipes)),
    )


def _recipes_so_far(folder: Place, config: BuildConfig) -> dict[str, Recipe]:
    """The recipes that the manifest names; raises CacheMismatchError where it is of another schema or form."""
    try:
        manifest = read_manifest(folder)
    except CacheMismatchError:
        raise
    except KcacheError:
        return {}  # a damaged or missing manifest is derived from the shards, and written anew by this build
    if manifest.format != config.format:
        raise CacheMismatchError(
            f"{folder} is a {manifest.format} cache; --format {config.format} was asked for; give --format "
            f"{manifest.format}, or run `kcache cache-convert {folder} NEW --format {config.format}`"
        )
    return {name: entry.recipe for name, entry in manifest.tables.items()}


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


def _recipes_begun(folder: Place) -> dict[str, Recipe]:
    """The recipes of the open plan, if there is one: a first build that was interrupted has no manifest."""
    plan = open_plan(folder)
    return {} if plan is None else {table.recipe.table: table.recipe for table in plan.tables}


def _recipe_notes(earlier: Mapping[str, Recipe], recipes: Mapping[str, Recipe]) -> list[str]:
    notes = []
    for name, found in earlier.items():
        if found.fingerprint != recipes[name].fingerprint:
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
            key = source.image_key(i, memo, rehash)
        except InputRejected as error:
            refused.append(Refusal(name=source.name(i), stage=error.stage, reason=error.reason))
            continue
        if key == IMAGE_EMBEDS.reserved:
            reason = "no image, but the text that stands for all-zero pixels"
            refused.append(Refusal(name=source.name(i), stage="source", reason=reason))
            continue
        keys = tuple(caption_key(caption) for caption in captions)
        numbers.append(i)
        yield Sample(name=source.name(i), image_key=key, captions=captions, caption_keys=keys)


def acceptable(samples: Sequence[Sample], tables: Mapping[str, TableState]) -> Sequence[Sample]:
    """Those that can become the cache's: no table has rejected the image, nor all the captions."""
    of_images = [state.rejected for name, state in tables.items() if kind_of(name).per == "image"]
    images = frozenset[bytes]().union(*of_images)
    captions = tables[TEXT.name].rejected if TEXT.name in tables else {}
    if not images and not captions:
        return samples
    columns = Samples.of(samples)
    rejected, counts = columns.count_captions(columns.caption_keys.among(captions)), np.diff(columns.caption_bounds)
    return columns.where(~columns.image_keys.among(images) & ((rejected < counts) | (counts == 0)))


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
    samples = job.samples if retry else acceptable(job.samples, tables)
    plans = []
    for name, state in tables.items():
        skipped = {*seen.get(name, ()), *(() if retry else state.rejected)}
        plans.append(
            plan_table(
                state.recipe,
                kind_of(name).wanted(samples),
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
    return Plan(tables=tuple(plans))


def why_missing(job: Survey, states: Mapping[str, TableState], plan: Plan) -> dict[str, str]:
    """For each table of `plan`, in words, why the rows that it lacks are missing; "" where none is."""
    known = job.before.image_keys + job.before.caption_keys
    reasons = {}
    for table in plan.tables:
        name = table.recipe.table
        kind = kind_of(name)
        keys = table.keys[~table.keys.among(() if kind.reserved is None else (kind.reserved,))]
        rejected = keys.among(states[name].rejected)
        retried = int(rejected.sum())
        lost = int((keys.among(known) & ~rejected).sum()) if name in job.earlier else 0
        found = job.earlier.get(name, table.recipe)
        if not table.keys:
            reasons[name] = ""
        elif found != table.recipe:
            differences = "; ".join(recipe_differences(found, table.recipe))
            reasons[name] = f"the table in the cache is of another recipe ({differences})"
        elif name not in job.earlier:
            left = "what an interrupted build left to do" if len(states[name].stored.keys) else "the table is new"
            reasons[name] = f"{left}: {counted(len(keys), kind.per)}"
        else:
            counts = {
                "new or edited since the last build": len(keys) - lost - retried,
                "whose rows are lost": lost,
                "rejected before, to be tried again": retried,
            }
            parts = [f"{counted(count, kind.per)} {what}" for what, count in counts.items() if count]
            reasons[name] = ", ".join(parts) or "the reserved row is lost"
    return reasons


def fetcher(job: Survey, table: str) -> Callable[[bytes], bytes | str | None]:
    """A function from a key of `table` to its content, None where the source no longer gives that content."""
    # One or the other: a file that holds the text of a caption has that caption's key.
    if kind_of(table).per == "caption":
        samples = Samples.of(job.samples)
        samples.texts((EMPTY_CAPTION_KEY,))  # sorted now, as each of the threads that ask would do it by itself
        return lambda key: samples.texts((key,)).get(key)

    def fetch(key: bytes) -> bytes | str | None:
        [number] = job.positions.find((key,)).tolist()
        return content if number >= 0 and content_key(content := job.source.image(number)) == key else None

    job.positions.find(())  # likewise
    return fetch


def still_given(job: Survey, table: str, keys: Collection[bytes]) -> set[bytes]:
    """Those of `keys` of a table whose content the source of `job` gives now."""
    fetch = fetcher(job, table) if keys else None
    return {key for key in keys if fetch and fetch(key) is not None}
