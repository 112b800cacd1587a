"""From committed shards to a finished cache: whole samples, the index, the rejections, the manifest."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kcache.build.dataset_card import write_card
from kcache.build.pictures.sizes import PictureSizes, refusal_of
from kcache.build.survey import Survey
from kcache.errors import KcacheError, SourceError
from kcache.places import Place
from kcache.places.effects import remove, write_bytes
from kcache.store.formats.columns import Samples, sample_list, table_of
from kcache.store.index import TableState, full_texts, index_arrays, write_index
from kcache.store.manifest import (
    MANIFEST,
    Manifest,
    TableEntry,
    read_manifest,
    schema_of,
    shapes_to_note,
    write_manifest,
)
from kcache.store.recipe import TEXT, Recipe, controls_of, kind_of
from kcache.store.samples import Refusal, Sample, read_cut, with_ids, write_samples
from kcache.store.shaped.wants import Wants, squares_of

if TYPE_CHECKING:
    import pyarrow

_REASONS = 3
"""Reasons that are told where nothing else came of a build."""
_NAMES_AND_NUMBERS = re.compile(r"'[^']*'|[\d.,+e]+")
"""What differs between reasons that are one to a person."""


def whole_samples(
    samples: Sequence[Sample], tables: Mapping[str, TableState], wants: Wants
) -> tuple[Samples, list[Refusal]]:
    """The samples whose image has all rows it should and that keep a caption where there are texts; and the others.

    A caption that was rejected costs the sample only that caption, as long as another one is left.
    """
    columns = Samples.of(samples)
    complete = _complete(columns, tables, wants)
    refused = list[Refusal]()

    def kept(table: "pyarrow.Table", span: slice) -> "pyarrow.Table":
        if complete[span].all():
            return table
        here = zip(sample_list(table), complete[span].tolist(), strict=True)
        return table_of([s for sample, is_whole in here for s in ([sample] if is_whole else part(sample))])

    def part(sample: Sample) -> list[Sample]:
        whole, reasons = _whole_part(sample, tables, wants)
        refused.extend(reasons)
        return whole

    return columns.changed(kept), refused


def _complete(samples: Samples, tables: Mapping[str, TableState], wants: Wants) -> np.ndarray:
    """(N,) bool: the samples of which all rows are there."""
    complete = np.ones(len(samples), np.bool_)
    for name, state in tables.items():
        if kind_of(name).per != "caption":
            complete &= wants.are_there(name, samples, state.stored.known)
        else:
            complete &= np.diff(samples.caption_bounds) > 0
            there = wants.keys(name, samples).among(state.stored.known)
            if not there.all():
                complete &= samples.count_captions(~there) == 0
    return complete


def _whole_part(sample: Sample, tables: Mapping[str, TableState], wants: Wants) -> tuple[list[Sample], list[Refusal]]:
    """What is left of a sample of which not all rows are there, [] or itself with fewer captions, and why."""
    for name, state in tables.items():
        if kind_of(name).per != "caption" and not wants.are_there(name, Samples.of([sample]), state.stored.known).all():
            key = next(iter(wants.keys(name, [sample])))
            return [], [refusal_of(sample.name, key, state.rejected)]
    text = tables[TEXT.name]
    there = (text.stored.find(sample.caption_keys) >= 0).tolist()
    kept = [i for i, is_there in enumerate(there) if is_there]
    lost = [key for key, is_there in zip(sample.caption_keys, there, strict=True) if not is_there]
    refused = [refusal_of(sample.name, key, text.rejected) for key in lost]
    if not kept:
        return [], refused
    captions = tuple(sample.captions[i] for i in kept)
    return [replace(sample, captions=captions, caption_keys=tuple(sample.caption_keys[i] for i in kept))], refused


def finish_build(job: Survey, tables: Mapping[str, TableState], sizes: PictureSizes) -> Manifest:
    """Finish the cache of those samples of `job` whose rows are all in `tables`; the others are refused.

    Raises SourceError where there is none: a cache that was finished before stays, and none is made without a sample.
    """
    whole, incomplete = whole_samples(job.samples, tables, job.wants)
    samples, unreadable = sizes.measured(whole)
    refused = [*job.refused, *incomplete, *unreadable]
    if not samples:
        if _current(job.folder) is None:
            _write_rejections(job.folder, refused)
        raise no_sample(job.folder, refused)
    cut = _tokens_cut(job, samples, tables)
    return finish_cache(job.folder, with_ids(samples), refused, tables, job.models, job.config.format, cut, job.wants)


def _tokens_cut(job: Survey, samples: Sequence[Sample], tables: Mapping[str, TableState]) -> dict[bytes, int]:
    """Tokens that were cut off each caption that fills the text encoder's input, by key; {} where none does."""
    if TEXT.name not in tables:
        return {}
    recipe, columns = tables[TEXT.name].recipe, Samples.of(samples)
    longest = recipe.batch_shape[1]
    is_full = columns.caption_keys.among(full_texts(tables[TEXT.name]))
    full = columns.texts(columns.caption_keys.where(is_full).unique())
    known = _known_cut(job.folder, recipe) if full else {}
    if full.keys() <= known.keys():
        return {key: known[key] for key in full}
    # Not at the top: it loads torch.
    from kcache.encoders.frozen import load_tokenizer

    tokenizer = load_tokenizer(job.repository(TEXT.name))
    counts = {key: len(tokenizer(text, verbose=False)["input_ids"]) for key, text in full.items() if key not in known}
    return {key: known[key] if key in known else max(0, counts[key] - longest) for key in full}


def _known_cut(cache: Place, recipe: Recipe) -> Mapping[bytes, int]:
    """Tokens cut off captions, by key, as the manifest before this one has them of texts of this recipe."""
    manifest = _current(cache)
    earlier = None if manifest is None else manifest.tables.get(TEXT.name)
    if manifest is None or earlier is None or earlier.recipe != recipe:
        return {}
    try:
        return read_cut(cache, manifest)
    except KcacheError:
        return {}  # the samples file is derived: what it lacks is counted again


def no_sample(cache: Place, refused: Sequence[Refusal]) -> SourceError:
    """The error of a build that comes to nothing, with the most frequent reasons."""
    kinds = [(refusal.stage, _NAMES_AND_NUMBERS.sub("", refusal.reason)) for refusal in refused]
    first = dict(zip(reversed(kinds), reversed(refused), strict=True))
    reasons = Counter(kinds).most_common(_REASONS)
    told = [f"{n:,} × {first[kind].stage}: {first[kind].reason}, such as {first[kind].name}" for kind, n in reasons]
    rest = len(refused) - sum(count for _, count in reasons)
    more = [f"{rest:,} for other reasons"] if rest else []
    return SourceError(
        f"no sample for {cache}: all {len({refusal.name for refusal in refused}):,} inputs were rejected "
        f"({'; '.join([*told, *more])}); expected at least one; correct the source, or try again what was rejected "
        "before: --retry-rejected"
    )


def finish_cache(
    cache: Place,
    samples: Sequence[Sample],
    refused: Sequence[Refusal],
    tables: Mapping[str, TableState],
    models: Mapping[str, Mapping[str, str | None]],
    form: str,
    cut: Mapping[bytes, int],
    wants: Wants | None = None,
) -> Manifest:
    """Write samples, index, rejections, card and, last, the manifest.

    What only the manifest before it used stays for those who read it, until `remove_superseded`.
    The rows of `samples` are all in `tables`; `refused` is what the source had besides them. `wants` says which rows
    these are, None being those of a cache of squares.
    """
    before = _content(cache / MANIFEST)
    samples = Samples.of(samples)
    samples_digest, samples_file_digest = write_samples(cache, samples, cut)
    entries = {name: _table_entry(state) for name, state in tables.items()}
    wants = wants or Wants(squares_of(tables), controls=controls_of(tables))
    shapes = shapes_to_note(wants.sets)
    in_parts = schema_of(entries, shapes, wants.flip) > 1
    index_digest = write_index(cache, index_arrays(samples, tables, wants), in_parts=in_parts)
    rejected, rejected_digest = _write_rejections(cache, refused)
    manifest = Manifest(
        format=form,
        tables=entries,
        samples=len(samples),
        samples_digest=samples_digest,
        samples_file_digest=samples_file_digest,
        index_digest=index_digest,
        rejected=rejected,
        rejected_digest=rejected_digest,
        models=models,
        shapes=shapes,
        flip=wants.flip,
    )
    write_card(cache, manifest, int(np.diff(samples.caption_bounds).max()) if len(samples) else 1)
    write_manifest(cache, manifest, before)
    return manifest


def remove_superseded(cache: Place, manifest: Manifest) -> None:
    """Remove the lists of samples and the indexes of earlier manifests; for who holds the cache alone."""
    for path in cache.glob("samples-*.parquet"):
        if path.name != manifest.samples_file:
            remove(path)
    for path in cache.glob("index-*"):
        if path.name != manifest.index_folder:
            remove(path)


def _current(cache: Place) -> Manifest | None:
    try:
        return read_manifest(cache)
    except KcacheError:
        return None  # none yet, or damaged: either way it is written anew


def _table_entry(state: TableState) -> TableEntry:
    shards = state.stored.shards
    return TableEntry(
        recipe=state.recipe, rows=sum(s.rows for s in shards), bytes=sum(s.bytes for s in shards), shards=shards
    )


def _write_rejections(cache: Place, refused: Sequence[Refusal]) -> tuple[int, str]:
    """Write rejected.jsonl; returns its number of lines, and the sha256 (hex) of its bytes."""
    rejections = sorted({(r.name, r.stage, r.reason) for r in refused})
    lines = [json.dumps({"name": n, "stage": s, "reason": r}, ensure_ascii=False) + "\n" for n, s, r in rejections]
    content = "".join(lines).encode("utf-8", "backslashreplace")
    if _content(cache / "rejected.jsonl") != content:
        write_bytes(cache / "rejected.jsonl", content)
    return len(rejections), hashlib.sha256(content).hexdigest()


def _content(path: Place) -> bytes | None:
    return path.read_bytes() if path.exists() else None
