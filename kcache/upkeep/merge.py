"""Several caches of equal recipes made one: their shards are linked or copied, nothing is encoded.

Recipes that name the same weights or tokenizer by two digests, of files and of content, are equal where a repository
that is at hand shows it; the new cache has the first one's.

Samples are united as `kcache.upkeep.united` says. The new cache owns its files: removing an old one takes nothing from
it.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from kcache.build.committed import read_committed
from kcache.build.finish import finish_cache, remove_superseded
from kcache.build.joined_tars import committed_tar_keys, shard_recipes
from kcache.build.plan import shard_name
from kcache.config import CountReport
from kcache.disk.durable import new_file, sync_folder
from kcache.disk.memo import DigestMemo
from kcache.encoders.repositories import find_repository
from kcache.encoders.tokenizers import tokenizer_digest
from kcache.encoders.weights import weights_digest
from kcache.errors import CacheMismatchError, ConfigError, ModelError
from kcache.places import Place, cache_place, place_of
from kcache.places.conditional import check_store
from kcache.places.effects import make_folder, publish, temporary_folder
from kcache.places.fetching import reading
from kcache.places.holds import exclusive, knows_readers, remove_leftovers
from kcache.stopping import stop_here, stopped_when_safe
from kcache.store.digests import Keys
from kcache.store.formats.shard_files import DRAFT, content_name
from kcache.store.index import TableState
from kcache.store.manifest import SCHEMA_VERSION, Manifest
from kcache.store.recipe import Recipe, kind_of, recipe_differences
from kcache.store.samples import samples_digest
from kcache.store.shards import Commit, read_commits, read_side_files, write_commit
from kcache.upkeep.copying import CacheContents, CacheCopier, check_new_cache, read_contents, with_progress
from kcache.upkeep.garbage import LiveShard, live_shards
from kcache.upkeep.united import first_alike, multiplied, united

_BLOCK_BYTES = 8 << 20


def merge_caches(
    new: str | Place,
    caches: Sequence[str | Place],
    *,
    weights: Sequence[float] | None = None,
    repeats: Sequence[int] | None = None,
    report: CountReport | None = None,
) -> Manifest:
    """Write into the folder `new` a cache of all samples of `caches`, which stay as they are.

    `weights` and `repeats`, one for each cache, multiply what its samples have already. `new` is a cache once all of it
    is there; after an interruption the same call finishes it. `report` is called with the table, the shards linked and
    their number, then as by `convert`. Raises CacheMismatchError, field by field, for caches of other tables, recipes
    or another form, and for a `new` that holds something else, ConfigError for numbers that are no weights or repeats,
    and the errors of `Cache.open`.
    """
    if not caches:
        raise ConfigError("no cache to merge given; expected at least one")
    parts, target = [read_contents(cache_place(cache)) for cache in caches], place_of(new)
    first = parts[0]
    for part in parts[1:]:
        _check_alike(first, part)
    samples = united(multiplied([part.samples for part in parts], weights, repeats))
    form, recipes = first.manifest.format, first.recipes
    check_new_cache(target, form, recipes, samples_digest(samples))
    check_store(target)
    make_folder(target)
    with exclusive(target), stopped_when_safe():
        remove_leftovers(target)
        live = [live_shards(part) for part in parts]
        for number, recipe in enumerate(shard_recipes(form, recipes)):
            own = [shard_recipes(form, {name: part.recipes[name] for name in recipes})[number] for part in parts]
            sources = [
                (part.folder / its.directory, shards[its.directory])
                for part, its, shards in zip(parts, own, live, strict=True)
            ]
            _link_shards(sources, target / recipe.directory, recipe, report)
        merged = replace(
            first,
            folder=target,
            samples=samples,
            refused=[refusal for part in parts for refusal in part.refused],
            tables=_states(parts, target),
            cut={key: tokens for part in parts for key, tokens in part.cut.items()},
        )
        copier = CacheCopier(merged, target, form)
        for table in copier.plan().tables:
            for shard in with_progress(table, table.recipe.table, report):
                copier.portion(table.recipe, shard).commit()
        copier.record_rejected()
        states = read_committed(target, form, recipes)
        manifest = finish_cache(
            target, samples, merged.refused, states, first.manifest.models, form, merged.cut, first.wants
        )
        if knows_readers(target):
            remove_superseded(target, manifest)
        stop_here()
    return manifest


def _check_alike(first: CacheContents, other: CacheContents) -> None:
    found, expected = other.manifest, first.manifest
    differences, how = [], "build or convert one of them like the other first"
    if found.format != expected.format:
        differences.append(f"format: {found.format} → {expected.format}")
    if found.tables.keys() != expected.tables.keys():
        differences.append(f"tables: {', '.join(sorted(found.tables))} → {', '.join(sorted(expected.tables))}")
    if found.shape_sets != expected.shape_sets:
        shapes = [" and ".join(each.in_full for each in manifest.shape_sets) for manifest in (found, expected)]
        differences.append(f"shapes: {' → '.join(shapes)}")
        how += ", or both, where each has squares or resolutions of its own: these stay when others are asked for"
    if found.flip != expected.flip:
        differences.append(f"flip: {found.flip} → {expected.flip}")
    for name in sorted(found.tables.keys() & expected.tables.keys()):
        if (lines := recipe_differences(other.recipes[name], first.recipes[name])) and (
            undecided := _not_the_same(other.recipes[name], first.recipes[name], (first.manifest, found))
        ) is not None:
            differences += [*(f"{name}.{line}" for line in lines), *undecided]
    if differences:
        raise CacheMismatchError(
            f"{other.folder} cannot be merged with {first.folder}, which differs in {'; '.join(differences)}; "
            f"expected equal tables, shapes, recipes and forms; {how}"
        )


def _not_the_same(recipe: Recipe, other: Recipe, manifests: Iterable[Manifest]) -> list[str] | None:
    """None where two recipes differ in names of the same weights and tokenizer only; else what hinders to see it."""
    tokenizer = {name: digest for name, digest in other.preprocess.items() if name == "tokenizer"}
    if replace(recipe, weights=other.weights, preprocess={**recipe.preprocess, **tokenizer}) != other:
        return []
    hindered = []
    for name, revision in dict.fromkeys(
        (str(model["name"]), model["revision"])
        for manifest in manifests
        if (model := manifest.models.get(kind_of(recipe.table).role))
    ):
        try:
            if _has_both(name, revision, recipe, other):
                return None
        except ModelError as error:
            hindered.append(f"whether these are two names of the same cannot be seen: {error}")
    return hindered


def _has_both(name: str, revision: str | None, recipe: Recipe, other: Recipe) -> bool:
    """Whether the digests in which two recipes differ are both of what a repository holds; raises ModelError."""
    component = kind_of(recipe.table).component
    of_weights = {recipe.weights, other.weights}
    of_tokenizer = {each.preprocess.get("tokenizer") for each in (recipe, other)}
    differing = [component] * (len(of_weights) > 1) + ["tokenizer"] * (len(of_tokenizer) > 1)
    repository = find_repository(name, revision, differing)
    with DigestMemo() as memo:
        return (
            len(of_weights) == 1
            or all(weights_digest(repository, component, memo, known=known) == known for known in of_weights)
        ) and (
            len(of_tokenizer) == 1 or all(tokenizer_digest(repository, known=known) == known for known in of_tokenizer)
        )


def _states(parts: Sequence[CacheContents], target: Place) -> dict[str, TableState]:
    """What is committed in `target`, with all that the tables of `parts` have rejected."""
    states = read_committed(target, parts[0].manifest.format, parts[0].recipes)
    return {
        name: replace(
            state,
            rejections=tuple(r for part in parts for r in part.tables[name].rejections),
            provenance=parts[0].tables[name].provenance,
        )
        for name, state in states.items()
    }


def _link_shards(
    sources: Sequence[tuple[Place, Sequence[LiveShard]]], folder: Place, recipe: Recipe, report: CountReport | None
) -> None:
    """Commit in `folder`, under new numbers, every shard in use that has rows which no shard before it has."""
    committed = {commit.name: commit for commit in read_commits(folder, recipe)}
    every = [(source, shard) for source, shards in sources for shard in shards]
    needed = _with_new_keys(Keys.of(keys) for source, shards in sources for keys in _shard_keys(source, shards, recipe))
    number = 0
    for done, ((source, shard), is_needed) in enumerate(zip(every, needed.tolist(), strict=True)):
        stop_here()
        if report is not None:
            report(recipe.table, done, len(every))
        if not is_needed:
            continue
        name, number = shard_name(number), number + 1
        there = committed[name] if name in committed else _link(source, shard.commit, folder, name, recipe)
        if _files_of(there) != _files_of(shard.commit):
            raise CacheMismatchError(
                f"{folder / name} is a shard of another merge; expected the one of {source}; "
                f"remove {folder.parent} and merge again"
            )
    if report is not None:
        report(recipe.table, len(every), len(every))


def _shard_keys(folder: Place, shards: Sequence[LiveShard], recipe: Recipe) -> Iterator[Sequence[bytes]]:
    """The keys of all rows, or samples, of each shard in `folder`."""
    commits = [shard.commit for shard in shards]
    if recipe.of_tars:
        yield from (committed_tar_keys(folder, commit) for commit in commits)
    else:
        yield from (Keys(side["key"]) for side in read_side_files(folder, commits, recipe))


def _with_new_keys(shards: Iterable[Keys]) -> np.ndarray:
    """(n,) bool: which of `shards`, given by their keys, have one that none before them has."""
    keys, sizes = list[np.ndarray](), list[int]()
    for shard in shards:
        stop_here()
        keys.append(shard.packed)
        sizes.append(len(shard))
    together = Keys(np.concatenate([Keys.of(()).packed, *keys]))
    del keys
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    new = np.zeros(len(sizes), np.bool_)
    new[shard_of[first_alike(together)]] = True
    return new


def _files_of(commit: Commit) -> list[tuple[str, int, int]]:
    """What a shard consists of, whatever its number: names without it, bytes and checksums."""
    return [(file.path.removeprefix(commit.stem), file.bytes, file.crc32c) for file in commit.files]


def _renumbered(commit: Commit, name: str, stem: str, recipe: Recipe) -> Commit:
    """The record of the same shard of `recipe` under another number; what it rejected is recorded apart."""
    files = tuple(replace(file, path=stem + file.path.removeprefix(commit.stem)) for file in commit.files)
    data = stem + (commit.data or "").removeprefix(commit.stem)
    return replace(
        commit, name=name, fingerprint=recipe.fingerprint, data=data, files=files, rejected=(), absent=(),
        schema_version=SCHEMA_VERSION,
    )  # fmt: skip


def _link(source: Place, commit: Commit, folder: Place, name: str, recipe: Recipe) -> Commit:
    """Commit in `folder` the shard `commit` of the table at `source` as `name`; returns what is committed then."""
    make_folder(folder)
    with temporary_folder(folder) as temporary:
        for file in commit.files:
            made = temporary / (DRAFT + file.path.removeprefix(commit.stem))
            made.parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(source / file.path, made)
        for parent, _, _ in os.walk(temporary, topdown=False):
            sync_folder(Path(parent))
        # Shards of the first schema get the digest that they lack, so that no other merge writes over them.
        stem = name + (commit.stem.removeprefix(commit.name) or content_name(temporary))
        for path in sorted(temporary.iterdir()):
            publish(path, folder / (stem + path.name.removeprefix(DRAFT)))
        shutil.rmtree(temporary)  # a link that is there already is not moved onto itself
    return write_commit(folder, _renumbered(commit, name, stem, recipe))


def _link_or_copy(old: Place, made: Path) -> None:
    """Committed files never change, so two caches may share one; across file systems there are no hard links."""
    if isinstance(old, Path):
        with suppress(OSError):
            os.link(old, made, follow_symlinks=False)
            return
    with reading(old) as content, new_file(made) as file:
        buffer = memoryview(bytearray(_BLOCK_BYTES))
        while count := content.readinto(buffer):
            file.write(buffer[:count])
