"""What a build has to do: what the source offers, which tables are wanted, and what of them is committed."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kcache.build.finish import Candidate, wanted_keys
from kcache.build.joined_tars import packed_states
from kcache.build.plan import Plan, plan_table
from kcache.config import BuildConfig, Stage
from kcache.encoders.recipes import (
    decoder_components,
    default_rows_per_shard,
    prior_components,
    table_names,
    table_recipe,
)
from kcache.encoders.repositories import Repository, find_repository
from kcache.errors import CacheCorruptError, CacheMismatchError, InputRejected, KcacheError
from kcache.sources import Source, open_source
from kcache.store.digests import EMPTY_CAPTION_KEY, ZERO_IMAGE_KEY, DigestMemo, caption_key, content_key
from kcache.store.index import TableState, merged_rows, table_state
from kcache.store.manifest import MANIFEST, read_manifest
from kcache.store.recipe import Recipe, recipe_differences
from kcache.store.samples import Refusal, read_samples
from kcache.store.shards import read_commits

_REPORT_SECONDS = 10.0
"""How often it is said how many images were looked through: for the first time, each of them is read."""


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """Everything that a build needs to know, found out before it writes."""

    folder: Path
    config: BuildConfig
    source: Source
    candidates: Sequence[Candidate]
    refused: Sequence[Refusal]
    prior: Repository
    decoder: Repository | None
    recipes: Mapping[str, Recipe]
    notes: tuple[str, ...]
    """Which tables of the cache are of another recipe than the wanted one, in words."""

    def wanted(self, table: str) -> list[bytes]:
        """The keys that `table` should hold, in sample order, the reserved row first."""
        return wanted_keys(table, self.candidates)

    def states(self) -> dict[str, TableState]:
        """What is committed of each table, in tables of its own or joined in tars."""
        states = {name: table_state(self.folder, recipe) for name, recipe in self.recipes.items()}
        if self.config.format == "zarr":
            return states
        packed = self.packed()
        return {
            name: replace(
                state,
                stored=merged_rows(state.recipe, [packed[name].stored, state.stored]),
                rejections=packed[name].rejections + state.rejections,
            )
            for name, state in states.items()
        }

    def packed(self) -> dict[str, TableState]:
        """What is committed of each table in tars of joined samples, of the manifest's recipes and the wanted."""
        return packed_states(self.folder, self.recipes, _manifest_recipes(self.folder))

    def provenance(self) -> dict[str, str]:
        """What the rows that wait to be packed were made with."""
        commits = [c for recipe in self.recipes.values() for c in read_commits(self.folder / recipe.directory, recipe)]
        return {name: value for commit in commits for name, value in commit.provenance.items()}

    @property
    def models(self) -> dict[str, dict[str, str | None]]:
        """Where the encoders came from, for the manifest."""
        named = {"prior": self.prior} | ({"decoder": self.decoder} if self.decoder else {})
        return {
            role: {"name": repo.name if repo.revision else str(repo.path), "revision": repo.revision}
            for role, repo in named.items()
        }


def take_inventory(source: str, folder: Path, config: BuildConfig, say: Callable[[str], None]) -> Inventory:
    """Open the source, digest its images and the encoders' weights, and name the tables that the cache should hold.

    Raises SourceError, ModelError, ConfigError, or CacheMismatchError for a cache of another schema.
    """
    _check_form(folder, config)
    tables = _wanted_tables(folder, config)
    opened = open_source(
        source,
        image_column=config.image_column,
        caption_column=config.caption_column,
        max_train_samples=config.max_train_samples,
        need_captions="text" in tables,
        revision=None,
    )
    stage = _stage_of(tables)
    prior = find_repository(config.pretrained_prior_model_name_or_path, config.revision, prior_components(stage))
    decoder = None
    if components := decoder_components(stage):
        decoder = find_repository(config.pretrained_decoder_model_name_or_path, config.revision, components)
    with DigestMemo() as memo:
        say(opened.description)
        recipes = {name: table_recipe(name, config, prior, decoder, memo, config.rehash, say) for name in tables}
        candidates, unreadable = _candidates(opened, memo, config.rehash, say)
    return Inventory(
        folder=folder,
        config=config,
        source=opened,
        candidates=candidates,
        refused=[*opened.refused, *unreadable],
        prior=prior,
        decoder=decoder,
        recipes=recipes,
        notes=tuple(_recipe_notes(folder, recipes)),
    )


def _wanted_tables(folder: Path, config: BuildConfig) -> list[str]:
    """The tables that were asked for, and those that the cache holds already: they stay complete."""
    names = dict.fromkeys(table_names(config.stage, config.resolution))
    if (folder / MANIFEST).exists():
        names |= dict.fromkeys(_manifest_recipes(folder))
    return list(names)


def _check_form(folder: Path, config: BuildConfig) -> None:
    if (folder / MANIFEST).exists():
        try:
            found = read_manifest(folder).format
        except CacheCorruptError:
            return
        if found != config.format:
            raise CacheMismatchError(
                f"{folder} is a {found} cache; --format {config.format} was asked for; give --format {found}, or run "
                f"`kcache cache-convert {folder} NEW --format {config.format}`"
            )


def _stage_of(tables: Sequence[str]) -> Stage:
    """The stage that reads all of `tables`."""
    if "text" not in tables:
        return "decoder"
    return "all" if any(name.startswith("latents-") for name in tables) else "prior"


def _manifest_recipes(folder: Path) -> dict[str, Recipe]:
    try:
        return {name: entry.recipe for name, entry in read_manifest(folder).tables.items()}
    except CacheMismatchError:
        raise
    except KcacheError:
        return {}  # a damaged or missing manifest is derived from the shards, and written anew by this build


def _recipe_notes(folder: Path, recipes: Mapping[str, Recipe]) -> list[str]:
    notes = []
    for name, found in _manifest_recipes(folder).items():
        if found.fingerprint != recipes[name].fingerprint:
            differences = "; ".join(recipe_differences(found, recipes[name]))
            notes.append(f"{name} in the cache is of another recipe, its rows are not used ({differences})")
    return notes


def _candidates(
    source: Source, memo: DigestMemo, rehash: bool, say: Callable[[str], None]
) -> tuple[list[Candidate], list[Refusal]]:
    candidates, refused = [], []
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
        if key == ZERO_IMAGE_KEY:
            reason = "no image, but the text that stands for all-zero pixels"
            refused.append(Refusal(name=source.name(i), stage="source", reason=reason))
            continue
        keys = tuple(caption_key(caption) for caption in captions)
        candidates.append(
            Candidate(position=i, name=source.name(i), image_key=key, captions=captions, caption_keys=keys)
        )
    return candidates, refused


def acceptable(candidates: Sequence[Candidate], states: Mapping[str, TableState]) -> list[Candidate]:
    """Those that can become samples: no table has rejected the image, nor all the captions."""
    images = frozenset[bytes]().union(*(state.rejected for name, state in states.items() if name != "text"))
    captions = states["text"].rejected if "text" in states else {}
    return [
        c
        for c in candidates
        if c.image_key not in images and not (c.caption_keys and all(key in captions for key in c.caption_keys))
    ]


def missing_rows(
    job: Inventory, states: Mapping[str, TableState], *, retry: bool, seen: Mapping[str, Collection[bytes]]
) -> Plan:
    """The plan for all that no table has yet; `seen` are keys, by table, that this build has dealt with already."""
    candidates = job.candidates if retry else acceptable(job.candidates, states)
    tables = []
    for name, state in states.items():
        skipped = {*seen.get(name, ()), *(() if retry else state.rejected)}
        tables.append(
            plan_table(
                state.recipe,
                wanted_keys(name, candidates),
                state.stored.key_set(),
                skipped,
                rows_per_shard=job.config.rows_per_shard or default_rows_per_shard(state.recipe),
                first_shard=state.next_shard,
            )
        )
    return Plan(tables=tuple(tables))


def why_missing(job: Inventory, states: Mapping[str, TableState], plan: Plan) -> dict[str, str]:
    """For each table of `plan`, in words, why the rows that it lacks are missing; "" where none is."""
    recipes, known = _manifest_recipes(job.folder), _known_keys(job.folder)
    reasons = {}
    for table in plan.tables:
        name, keys = table.recipe.table, set(table.keys) - {EMPTY_CAPTION_KEY, ZERO_IMAGE_KEY}
        inputs = "caption" if name == "text" else "image"
        retried = len(keys & states[name].rejected.keys())
        lost = len((keys & known) - states[name].rejected.keys()) if name in recipes else 0
        found = recipes.get(name, table.recipe)
        if not table.keys:
            reasons[name] = ""
        elif found != table.recipe:
            differences = "; ".join(recipe_differences(found, table.recipe))
            reasons[name] = f"the table in the cache is of another recipe ({differences})"
        elif name not in recipes:
            left = "what an interrupted build left to do" if len(states[name].stored.keys) else "the table is new"
            reasons[name] = f"{left}: {_counted(len(keys), inputs)}"
        else:
            counts = {
                "new or edited since the last build": len(keys) - lost - retried,
                "whose rows are lost": lost,
                "rejected before, to be tried again": retried,
            }
            parts = [f"{_counted(count, inputs)} {what}" for what, count in counts.items() if count]
            reasons[name] = ", ".join(parts) or "the reserved row is lost"
    return reasons


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _known_keys(folder: Path) -> frozenset[bytes]:
    """Keys of the images and captions of the samples that the cache has."""
    try:
        samples = read_samples(folder, read_manifest(folder))
    except KcacheError:
        return frozenset()
    captions = (key for keys in samples["caption_keys"].to_pylist() for key in keys)
    return frozenset(samples["image_key"].to_pylist()).union(captions)


def fetcher(source: Source, candidates: Sequence[Candidate], table: str) -> Callable[[bytes], bytes | str | None]:
    """A function from a key of `table` to its content, None where the source no longer gives that content."""
    # One or the other: a file that holds the text of a caption has that caption's key.
    if table == "text":
        captions = {key: text for c in candidates for key, text in zip(c.caption_keys, c.captions, strict=True)}
        return {**captions, EMPTY_CAPTION_KEY: ""}.get
    images = {candidate.image_key: candidate.position for candidate in candidates}

    def fetch(key: bytes) -> bytes | str | None:
        if key not in images:
            return None
        content = source.image(images[key])
        return content if content_key(content) == key else None

    return fetch
