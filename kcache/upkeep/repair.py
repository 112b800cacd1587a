"""Repairing a cache: of broken shards the sound rows are kept, and only the others are encoded again.

The cache's own list of samples says what belongs to it, so pictures that its source got or lost meanwhile change
nothing, as long as those behind the broken rows are there.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kcache.build.build import complete
from kcache.build.builder import BuildProgress
from kcache.build.finish import Candidate
from kcache.build.plan import PlannedShard, shard_name
from kcache.build.survey import Inventory, take_inventory
from kcache.config import BuildConfig, MixedPrecision, Stage
from kcache.durable import exclusive, remove
from kcache.encoders.recipes import decoder_components, prior_components
from kcache.encoders.repositories import Repository, find_repository
from kcache.errors import CacheCorruptError, CacheMismatchError, SourceError
from kcache.machine import check_device
from kcache.store.digests import EMPTY_CAPTION_KEY, ZERO_IMAGE_KEY
from kcache.store.index import StoredRows
from kcache.store.manifest import MANIFEST, SHARD_NAME, Manifest, TableEntry
from kcache.store.recipe import Recipe, recipe_differences
from kcache.store.samples import Refusal, Sample, sample_ids, samples_digest
from kcache.store.shards import Commit, discard_uncommitted, record_rejections
from kcache.upkeep.copying import RowCopier
from kcache.upkeep.records import Records, read_records
from kcache.upkeep.verify import VerifyProgress, VerifyResult, verify_cache

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True, kw_only=True, slots=True)
class RepairResult:
    """What a repair did."""

    before: VerifyResult
    encoded: Mapping[str, int]
    """Rows that were encoded again, by table."""
    after: VerifyResult


def repair_cache(
    source: str,
    cache: str | Path,
    *,
    image_column: str = "image",
    caption_column: str = "text",
    device: str | None = None,
    report: Callable[[BuildProgress], None] | None = None,
    checked: Callable[[VerifyProgress], None] | None = None,
) -> RepairResult:
    """Make the cache at `cache` whole again, encoding its broken rows from `source` with the encoders of its manifest.

    `report` is told how the encoding goes, `checked` how the verifications before and after it do. Nothing is changed
    where that cannot be exact: raises CacheCorruptError for a damaged manifest, CacheMismatchError when rows encoded
    now would be of another recipe, SourceError when the source lacks what is needed, and ConfigError for a device that
    is not there.
    """
    check_device(device)
    folder = Path(cache)
    before = verify_cache(folder, checked)
    if not before.corrupt:
        return RepairResult(before=before, encoded={}, after=before)
    vouched = read_records(folder)
    if vouched.manifest is None:
        raise CacheCorruptError(
            f"{folder / MANIFEST} is damaged, so nothing says which encoders made the rows; "
            f"run `kcache cache-build {source} {folder}` with the flags that built it, then verify it again"
        )
    job = _inventory(source, folder, vouched.manifest, image_column, caption_column, device)
    refused = _recorded_refusals(folder, before)
    candidates = _candidates(job, vouched, before, refused)
    with exclusive(folder):
        _replace_shards(vouched, vouched.manifest, before)
    if refused is None:
        refused = [*job.refused, *_rejections(job)]
    result = complete(replace(job, candidates=candidates, refused=refused), report=report)
    after = verify_cache(folder, checked)
    if after.corrupt:
        raise CacheCorruptError(f"{folder} is corrupt again right after its repair; have disk and memory checked")
    encoded = {name: table.encoded for name, table in result.tables.items() if table.encoded}
    return RepairResult(before=before, encoded=encoded, after=after)


def recorded_config(manifest: Manifest, prior: Repository, decoder: Repository | None) -> BuildConfig:
    """The settings behind the manifest's recipes, as far as one set of settings can have made them all."""
    recipes = {name: entry.recipe for name, entry in manifest.tables.items()}
    first = next(iter(recipes.values()))
    alphas = [recipe.preprocess["alpha"] for recipe in recipes.values() if "alpha" in recipe.preprocess]
    sides = tuple(int(name.removeprefix("latents-")) for name in recipes if name.startswith("latents-"))
    trimmed = "text" in recipes and "pad_to_multiple_of" in recipes["text"].preprocess
    precision: dict[str, MixedPrecision] = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}
    return BuildConfig(
        stage=_stage(manifest),
        format=manifest.format,  # type: ignore[arg-type]  # BuildConfig checks this and the next
        dtype=first.stored_dtype,  # type: ignore[arg-type]
        resolution=sides or BuildConfig.resolution,
        mixed_precision=precision[first.compute_dtype],
        batch_size=first.batch_shape[0],
        alpha=alphas[0] if alphas else BuildConfig.alpha,
        text_padding="trimmed" if trimmed else "full",
        pretrained_prior_model_name_or_path=str(prior.path),
        pretrained_decoder_model_name_or_path=str((decoder or prior).path),
    )


def _stage(manifest: Manifest) -> Stage:
    if "text" not in manifest.tables:
        return "decoder"
    return "all" if any(name.startswith("latents-") for name in manifest.tables) else "prior"


def _inventory(
    source: str, folder: Path, manifest: Manifest, image_column: str, caption_column: str, device: str | None
) -> Inventory:
    """The source, and the encoders of the manifest; raises CacheMismatchError when they would make other rows."""
    prior = _repository(manifest, "prior", prior_components(_stage(manifest)))
    components = decoder_components(_stage(manifest))
    decoder = _repository(manifest, "decoder", components) if components else None
    config = replace(
        recorded_config(manifest, prior, decoder),
        image_column=image_column,
        caption_column=caption_column,
        device=device,
    )
    job = take_inventory(source, folder, config, lambda _: None)
    for name, entry in manifest.tables.items():
        if differences := recipe_differences(entry.recipe, job.recipes[name]):
            raise CacheMismatchError(
                f"rows of {name} encoded now would be of another recipe than those of {folder} "
                f"({'; '.join(differences)}); repair it with the models that it was built with, or build it anew"
            )
    return replace(job, prior=prior, decoder=decoder)


def _repository(manifest: Manifest, role: str, components: Sequence[str]) -> Repository:
    model = manifest.models[role]
    return find_repository(str(model["name"]), model["revision"], components)


def _recorded_refusals(folder: Path, before: VerifyResult) -> list[Refusal] | None:
    """What rejected.jsonl says, None when it is broken."""
    if any(file.path == "rejected.jsonl" for file in before.files):
        return None
    lines = (folder / "rejected.jsonl").read_bytes().split(b"\n")
    return [Refusal(**json.loads(line)) for line in lines if line]


def _rejections(job: Inventory) -> list[Refusal]:
    """The source's inputs that commit records name as rejected."""
    rejected = {key: rejection for state in job.states().values() for key, rejection in state.rejected.items()}
    return [
        Refusal(name=c.name, stage=rejected[key].stage, reason=rejected[key].reason)
        for c in job.candidates
        for key in (c.image_key, *c.caption_keys)
        if key in rejected
    ]


def _candidates(
    job: Inventory, vouched: Records, before: VerifyResult, refused: Sequence[Refusal] | None
) -> list[Candidate]:
    """The cache's samples, as the source offers them; raises SourceError where it lacks a picture that is needed."""
    if vouched.samples is None:
        return _offered_samples(job, vouched, refused or ())
    positions = {candidate.image_key: candidate.position for candidate in job.candidates}
    columns = [vouched.samples[name].to_pylist() for name in ("name", "image_key", "captions", "caption_keys")]
    rows = list(zip(*columns, strict=True))
    needed = range(len(rows)) if vouched.index is None else _needed_samples(before)
    missing = [rows[i][0] for i in needed if i < len(rows) and rows[i][1] not in positions]
    if missing:
        raise SourceError(
            f"{job.source.description}: of the pictures behind broken rows it lacks {len(missing)}, such as "
            f"{missing[0]}; give the source that the cache was built from, or build again without them"
        )
    return [
        Candidate(
            position=positions.get(key, -1), name=name, image_key=key, captions=tuple(texts), caption_keys=tuple(keys)
        )
        for name, key, texts, keys in rows
    ]


def _needed_samples(before: VerifyResult) -> list[int]:
    """Numbers of the samples whose picture has to be encoded again; the reserved row counts as one behind the last."""
    return sorted({row.entry for row in before.rows if row.table != "text"})


def _offered_samples(job: Inventory, vouched: Records, refused: Sequence[Refusal]) -> list[Candidate]:
    """The samples of the source, which must be those that the manifest has the digest of."""
    names = {refusal.name for refusal in refused}
    candidates = [candidate for candidate in job.candidates if candidate.name not in names]
    ids = sample_ids([candidate.image_key for candidate in candidates])
    samples = [
        Sample(
            id=i, name=c.name, image_key=c.image_key, captions=c.captions, caption_keys=c.caption_keys,
            width=0, height=0,
        )
        for i, c in zip(ids, candidates, strict=True)
    ]  # fmt: skip
    if vouched.manifest is None or samples_digest(samples) != vouched.manifest.samples_digest:
        raise CacheMismatchError(
            f"the list of samples in {job.folder} is damaged, and {job.source.description} does not offer exactly "
            "those samples; give the source as it was when the cache was built, or build the cache again"
        )
    return candidates


def _replace_shards(vouched: Records, manifest: Manifest, before: VerifyResult) -> None:
    """Take the broken shards out of the cache; their sound rows are committed as shards of their tables first."""
    folder = vouched.folder
    if any(file.path == "plans" for file in before.files):
        remove(folder / "plans")
    rejected: list[tuple[Recipe, Commit]] = []
    for shard in before.shards:
        commit = vouched.commits.get(shard)
        for table, entry in manifest.tables.items():
            if vouched.index is not None and vouched.samples is not None:
                keys = _entry_keys(vouched.samples, table)
                sound = _sound_entries(vouched.index[table], entry, shard, before)
                rows = _rows_by_key(vouched.index[table], keys, entry)
                wanted = tuple(dict.fromkeys(keys[i] for i in sound.tolist()))
                _copy_rows(folder, entry.recipe, rows, wanted, commit.provenance if commit else {})
            if commit and commit.rejected and shard.startswith(f"{entry.recipe.directory}/"):
                rejected.append((entry.recipe, commit))
        parent, _, name = shard.partition("/")
        remove(folder / f"{shard}.json")
        discard_uncommitted(folder / parent, name)
    for recipe, commit in rejected:
        record_rejections(folder / recipe.directory, recipe, commit.rejected, commit.provenance)


def _sound_entries(index: np.ndarray, entry: TableEntry, shard: str, before: VerifyResult) -> np.ndarray:
    """Numbers of the entries of a table's index whose rows stand in `shard` and are not broken."""
    positions = [i for i, known in enumerate(entry.shards) if known.data.removesuffix(".tar") == shard]
    inside = np.isin(index["shard"], positions)
    inside[[row.entry for row in before.rows if row.table == entry.recipe.table]] = False
    return np.flatnonzero(inside)


def _rows_by_key(index: np.ndarray, entry_keys: Sequence[bytes], entry: TableEntry) -> StoredRows:
    keys, first = np.unique(np.frombuffer(b"".join(entry_keys), "S16"), return_index=True)
    return StoredRows(index[first], keys, entry.shards)


def _entry_keys(samples: "pyarrow.Table", table: str) -> list[bytes]:
    """The key of each entry of a table's index."""
    if table == "text":
        return [key for keys in samples["caption_keys"].to_pylist() for key in keys] + [EMPTY_CAPTION_KEY]
    reserved = [ZERO_IMAGE_KEY] if table == "image_embeds" else []
    return samples["image_key"].to_pylist() + reserved


def _copy_rows(
    folder: Path, recipe: Recipe, rows: StoredRows, keys: tuple[bytes, ...], provenance: Mapping[str, str]
) -> None:
    """Commit the rows of `keys` as a new shard of their table, behind all that are in its folder."""
    if keys:
        table = folder / recipe.directory
        table.mkdir(exist_ok=True)
        names = {path.name.partition(".")[0] for path in table.iterdir()}
        number = 1 + max((int(name) for name in names if SHARD_NAME.fullmatch(name)), default=-1)
        RowCopier(folder, recipe, rows).write(table, PlannedShard(name=shard_name(number), keys=keys), provenance)
