"""Repairing a cache: of broken shards the sound rows are kept, and only the others are encoded again.

The cache's own list of samples says what belongs to it, so pictures that its source got or lost meanwhile change
nothing, as long as those behind the broken rows are there.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from kcache.build.build import complete
from kcache.build.claims import alone
from kcache.build.committed import record_rejections
from kcache.build.plan import PlannedShard, shard_name
from kcache.build.survey import Survey, survey
from kcache.build.work.progress import BuildReport
from kcache.config import AS_FOUND, Say, SourceConfig, unheard
from kcache.encoders.repositories import Repository, find_repository
from kcache.errors import CacheCorruptError, CacheMismatchError, SourceError
from kcache.machine import check_device
from kcache.places import Place, place_of
from kcache.places.effects import make_folder, remove
from kcache.store.digests import NO_CONTROL, Keys, Positions, control_row_keys
from kcache.store.formats.columns import Samples
from kcache.store.index import StoredRows
from kcache.store.manifest import MANIFEST, SHARD_NAME, Manifest, TableEntry, shard_number
from kcache.store.recipe import Recipe, components, kind_of, recipe_differences, stage_of
from kcache.store.recorded import recorded_config
from kcache.store.samples import Refusal, Sample, samples_digest, with_ids
from kcache.store.shaped.wants import Wants
from kcache.store.shards import Commit
from kcache.upkeep.portions import PictureSizes, of_rows
from kcache.upkeep.records import Records, entries_of, read_records, sample_of
from kcache.upkeep.verify import VerifyProgress, VerifyResult, verify_cache

_PICTURES = "pictures"


@dataclass(frozen=True, kw_only=True, slots=True)
class RepairResult:
    """What a repair did."""

    before: VerifyResult
    encoded: Mapping[str, int]
    """Rows that were encoded again, by table."""
    after: VerifyResult


def repair_cache(
    source: str,
    cache: str | Place,
    *,
    reading: SourceConfig = AS_FOUND,
    device: str | None = None,
    report: BuildReport | None = None,
    say: Say = unheard,
    checked: Callable[[VerifyProgress], None] | None = None,
) -> RepairResult:
    """Make the cache at `cache` whole again, encoding its broken rows from `source` with the encoders of its manifest.

    `report` is told how the encoding goes, `say` what is worth a line, `checked` how the verifications before and after
    it do. Nothing is changed where that cannot be exact: raises CacheCorruptError for a damaged manifest,
    CacheMismatchError when rows encoded now would be of another recipe, SourceError when the source lacks what is
    needed, and ConfigError for a device that is not there.
    """
    check_device(device)
    folder = place_of(cache)
    before = verify_cache(folder, checked)
    if not before.corrupt:
        return RepairResult(before=before, encoded={}, after=before)
    records = read_records(folder)
    if records.manifest is None:
        raise CacheCorruptError(
            f"{folder / MANIFEST} is damaged, so nothing says which encoders made the rows; "
            f"run `kcache cache-build {source} {folder}` with the flags that built it, then verify it again"
        )
    job = _survey(source, folder, records.manifest, reading, device)
    refused = _recorded_refusals(folder, before)
    samples = _samples(job, records.manifest, records, before, refused)
    with alone(folder, say):
        _replace_shards(records, records.manifest, before)
    if refused is None:
        refused = [*job.refused, *_rejections(job)]
    # With their sizes: the source may lack pictures whose rows are sound.
    known = records.samples or Samples(())
    result = complete(replace(job, samples=samples, refused=refused, before=known), report=report, say=say)
    after = verify_cache(folder, checked)
    if after.corrupt:
        raise CacheCorruptError(f"{folder} is corrupt again right after its repair; have disk and memory checked")
    encoded = {name: table.encoded for name, table in result.tables.items() if table.encoded}
    return RepairResult(before=before, encoded=encoded, after=after)


def _survey(source: str, folder: Place, manifest: Manifest, reading: SourceConfig, device: str | None) -> Survey:
    """The source, and the encoders of the manifest; raises CacheMismatchError when they would make other rows."""
    found = {role: _repository(manifest, role) for role in manifest.models}
    config = replace(
        recorded_config(manifest),
        pretrained_prior_model_name_or_path=str(found["prior"].path),
        pretrained_decoder_model_name_or_path=str(found.get("decoder", found["prior"]).path),
        **{each.name: getattr(reading, each.name) for each in fields(SourceConfig)},
        device=device,
        # What the cache has, it took, whatever was its limit, and even if it refused it at first.
        max_pixels=sys.maxsize,
        retry_rejected=True,
    )
    job = survey(source, folder, config, unheard)
    for name, entry in manifest.tables.items():
        if differences := recipe_differences(entry.recipe, job.recipes[name]):
            raise CacheMismatchError(
                f"rows of {name} encoded now would be of another recipe than those of {folder} "
                f"({'; '.join(differences)}); repair it with the models that it was built with, or build it anew"
            )
    return replace(job, repositories=found)


def _repository(manifest: Manifest, role: str) -> Repository:
    model = manifest.models[role]
    return find_repository(str(model["name"]), model["revision"], components(role, stage_of(manifest.tables)))


def _recorded_refusals(folder: Place, before: VerifyResult) -> list[Refusal] | None:
    """What rejected.jsonl says, None when it is broken."""
    if any(file.path == "rejected.jsonl" for file in before.files):
        return None
    lines = (folder / "rejected.jsonl").read_bytes().split(b"\n")
    return [Refusal(**json.loads(line)) for line in lines if line]


def _rejections(job: Survey) -> list[Refusal]:
    """The source's inputs that commit records name as rejected."""
    tables = job.committed().tables
    rejected = {key: rejection for state in tables.values() for key, rejection in state.rejected.items()}
    samples = Samples.of(job.samples)
    inputs = zip(*(keys for _, keys, _ in _inputs(job, samples)), strict=True)
    return [
        Refusal(name=s.name, stage=rejected[key].stage, reason=rejected[key].reason)
        for s, own in zip(samples, inputs, strict=True)
        for key in (*own, *s.caption_keys)
        if key in rejected
    ]


def _samples(
    job: Survey, manifest: Manifest, records: Records, before: VerifyResult, refused: Sequence[Refusal] | None
) -> Sequence[Sample]:
    """The cache's samples, as the source offers them; raises SourceError where it lacks a picture that is needed."""
    if records.samples is None:
        return _offered_samples(job, records, refused or ())
    samples = records.samples
    for what, keys, positions in _inputs(job, samples):
        numbers = np.arange(len(samples))
        if records.index is not None:
            numbers = np.array(_needed_samples(manifest, records.index, before, what), np.int64)
        numbers = numbers[~keys[numbers].among([NO_CONTROL])]
        missing = numbers[positions.find(keys[numbers]) < 0]
        if len(missing):
            raise SourceError(
                f"{job.source.description}: of the {what} behind broken rows it lacks {len(missing)}, such as "
                f"{samples[int(missing[0])].name}; give the source that the cache was built from, or build again "
                "without them"
            )
    return samples


def _inputs(job: Survey, samples: Samples) -> Iterator[tuple[str, Keys, Positions]]:
    """The keys of the pictures, and of each kind of control images, of `samples`, and where the source has which."""
    yield _PICTURES, samples.image_keys, job.positions
    for number, name in enumerate(job.wants.controls):
        keys = control_row_keys(samples.image_keys, samples.control_keys(number), NO_CONTROL)
        yield name, keys, job.controls[name]


def _input_of(table: str) -> str | None:
    """What of a sample a row of a table is made of, as `_inputs` calls it; None for its captions."""
    kind = kind_of(table)
    return {"image": _PICTURES, "control": kind.name}.get(kind.per)


def _needed_samples(manifest: Manifest, index: Mapping[str, np.ndarray], before: VerifyResult, what: str) -> list[int]:
    """Numbers of the samples whose picture, or control image of a kind, has to be encoded again."""
    of = {sample_of(manifest, index, row.table, row.entry) for row in before.rows if _input_of(row.table) == what}
    return sorted(sample for sample in of if sample is not None)


def _offered_samples(job: Survey, records: Records, refused: Sequence[Refusal]) -> Sequence[Sample]:
    """The samples of the source, which must be those that the manifest has the digest of."""
    names, offered = {refusal.name for refusal in refused}, Samples.of(job.samples)
    is_taken = (name not in names for table in offered.tables for name in table["name"].to_pylist())
    samples = with_ids(offered.where(np.fromiter(is_taken, np.bool_, len(offered))))
    if records.manifest is None or samples_digest(samples) != records.manifest.samples_digest:
        raise CacheMismatchError(
            f"the list of samples in {job.folder} is damaged, and {job.source.description} does not offer exactly "
            "those samples; give the source as it was when the cache was built, or build the cache again"
        )
    return samples


def _replace_shards(records: Records, manifest: Manifest, before: VerifyResult) -> None:
    """Take the broken shards out of the cache; their sound rows are committed as shards of their tables first."""
    folder = records.folder
    if any(file.path == "plans" for file in before.files):
        remove(folder / "plans")
    rejected: list[tuple[Recipe, Commit]] = []
    for shard in before.shards:
        commit = records.commits.get(shard)
        for table, entry in manifest.tables.items():
            if records.index is not None and records.samples is not None:
                index = entries_of(manifest, records.index, table)
                sound = _sound_entries(index, entry, shard, before)
                if len(sound):
                    arrays = manifest.wants.indexed(table, records.samples)
                    keys = Keys(np.concatenate([arrays[name].packed for name in manifest.wants.arrays(table)])[sound])
                    rows = _rows_by_key(index[sound], keys, entry)
                    _copy_rows(folder, entry.recipe, rows, keys.unique(), records.samples, commit, manifest.wants)
            if commit and commit.rejected and shard.startswith(f"{entry.recipe.directory}/"):
                rejected.append((entry.recipe, commit))
        _remove_shard(folder, shard)
    for recipe, commit in rejected:
        record_rejections(folder / recipe.directory, recipe, commit.rejected, commit.provenance)


def _remove_shard(folder: Place, shard: str) -> None:
    """Remove a shard's record, and then all that bears its number: whoever has it again writes whole files."""
    parent, _, number = shard.partition("/")
    remove(folder / f"{shard}.json")
    bearing: list[Place] = list((folder / parent).glob(f"{number}*"))
    for path in bearing:
        if shard_number(path.name) == number:
            remove(path)


def _sound_entries(index: np.ndarray, entry: TableEntry, shard: str, before: VerifyResult) -> np.ndarray:
    """Numbers of the entries of a table's index whose rows stand in `shard` and are not broken."""
    positions = [i for i, known in enumerate(entry.shards) if known.label == shard]
    if not positions:
        return np.empty(0, np.int64)
    inside = np.isin(index["shard"], positions)
    inside[[row.entry for row in before.rows if row.table == entry.recipe.table]] = False
    return np.flatnonzero(inside)


def _rows_by_key(index: np.ndarray, keys: Keys, entry: TableEntry) -> StoredRows:
    order, new = keys.in_order()
    first = order[new]
    return StoredRows(index[first], keys.packed[first].view("S16").reshape(-1), entry.shards)


def _copy_rows(
    folder: Place,
    recipe: Recipe,
    rows: StoredRows,
    keys: Keys,
    samples: Samples,
    commit: Commit | None,
    wants: Wants,
) -> None:
    """Commit the rows of `keys` as a new shard of their table, behind all that are in its folder."""
    table = folder / recipe.directory
    make_folder(table)
    names = {shard_number(path.name) for path in table.iterdir()}
    number = 1 + max((int(name) for name in names if SHARD_NAME.fullmatch(name)), default=-1)
    shard, provenance = PlannedShard(name=shard_name(number), keys=keys), commit.provenance if commit else {}
    of_rows(folder, folder, recipe, rows, shard, PictureSizes(samples), provenance, wants).commit()
