"""What a build has to do: what the source offers, which tables are wanted, and what of them is committed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kcache.assemble import Candidate, TableState
from kcache.config import BuildConfig, Stage
from kcache.digests import EMPTY_CAPTION_KEY, ZERO_IMAGE_KEY, DigestMemo, caption_key, content_key
from kcache.errors import CacheCorruptError, CacheMismatchError, InputRejected, KcacheError
from kcache.index import merged_rows, stored_rows
from kcache.joining import packed_states
from kcache.manifest import MANIFEST, read_manifest
from kcache.plan import Plan, plan_table
from kcache.recipe import Recipe, recipe_differences
from kcache.repositories import Repository, find_repository
from kcache.shards import next_shard, read_commits
from kcache.sources import Refusal, Source, open_source
from kcache.tables import decoder_components, default_rows_per_shard, prior_components, table_names, table_recipe

__all__ = ["Inventory", "fetcher", "missing_rows", "take_inventory"]


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

    def wanted(self, table: str) -> list[bytes]:
        """The keys that `table` should hold, in sample order, the reserved row first."""
        if table == "text":
            return [EMPTY_CAPTION_KEY, *(key for c in self.candidates for key in c.caption_keys)]
        reserved = [ZERO_IMAGE_KEY] if table == "image_embeds" else []
        return reserved + [c.image_key for c in self.candidates]

    def states(self) -> dict[str, TableState]:
        """What is committed of each table, in tables of its own or joined in tars."""
        states = {name: _table_state(self.folder, recipe) for name, recipe in self.recipes.items()}
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
        recipes = {name: table_recipe(name, config, prior, decoder, memo, config.rehash) for name in tables}
        candidates, unreadable = _candidates(opened, memo, config.rehash)
    return Inventory(
        folder=folder,
        config=config,
        source=opened,
        candidates=candidates,
        refused=[*opened.refused, *unreadable],
        prior=prior,
        decoder=decoder,
        recipes=recipes,
        notes=(opened.description, *_recipe_notes(folder, recipes)),
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
            notes.append(f"{name} in the cache is of another recipe and is encoded anew ({differences})")
    return notes


def _candidates(source: Source, memo: DigestMemo, rehash: bool) -> tuple[list[Candidate], list[Refusal]]:
    candidates, refused = [], []
    for i in range(len(source)):
        captions = source.captions(i)
        try:
            key = source.image_key(i, memo, rehash)
        except InputRejected as error:
            refused.append(Refusal(name=source.name(i), stage=error.stage, reason=error.reason))
            continue
        keys = tuple(caption_key(caption) for caption in captions)
        candidates.append(
            Candidate(position=i, name=source.name(i), image_key=key, captions=captions, caption_keys=keys)
        )
    return candidates, refused


def _table_state(folder: Path, recipe: Recipe) -> TableState:
    table = folder / recipe.directory
    commits = read_commits(table, recipe)
    return TableState(
        recipe=recipe,
        stored=stored_rows(table, commits, recipe),
        rejections=tuple(rejection for commit in commits for rejection in commit.rejected),
        next_shard=next_shard(commits),
    )


def missing_rows(job: Inventory, states: Mapping[str, TableState], *, retry: bool, gone: frozenset[bytes]) -> Plan:
    """The plan for all that no table has yet; `gone` are keys whose content the source no longer gave."""
    tables = []
    for name, state in states.items():
        skipped = gone if retry else gone | state.rejected.keys()
        tables.append(
            plan_table(
                state.recipe,
                job.wanted(name),
                state.stored.key_set(),
                skipped,
                rows_per_shard=job.config.rows_per_shard or default_rows_per_shard(state.recipe),
                first_shard=state.next_shard,
            )
        )
    return Plan(tables=tuple(tables))


def fetcher(source: Source, candidates: Sequence[Candidate]) -> Callable[[bytes], bytes | str | None]:
    """A function from a key to its content, None where the source no longer gives the content of that key."""
    images = {candidate.image_key: candidate.position for candidate in candidates}
    captions = {key: text for c in candidates for key, text in zip(c.caption_keys, c.captions, strict=True)}
    captions[EMPTY_CAPTION_KEY] = ""

    def fetch(key: bytes) -> bytes | str | None:
        if key in captions:
            return captions[key]
        if key not in images:
            return None
        content = source.image(images[key])
        return content if content_key(content) == key else None

    return fetch
