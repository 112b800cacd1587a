"""From committed shards to a finished cache: whole samples, the join, the rejections, the manifest."""

import hashlib
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kcache.build.dataset_card import write_card
from kcache.durable import json_bytes, write_bytes
from kcache.errors import CacheIncompleteError, InputRejected, KcacheError
from kcache.sources import Source
from kcache.store.digests import EMPTY_CAPTION_KEY, ZERO_IMAGE_KEY
from kcache.store.index import CAPTION_BOUNDS, TableState, write_index
from kcache.store.manifest import MANIFEST, Manifest, TableEntry, read_manifest
from kcache.store.samples import Refusal, Sample, sample_ids, stored_samples, write_samples
from kcache.store.shards import Rejection


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A sample that the source offers: it becomes one of the cache's when its rows are there."""

    position: int
    """Its number in the source."""
    name: str
    image_key: bytes
    captions: tuple[str, ...]
    caption_keys: tuple[bytes, ...]


def wanted_keys(table: str, samples: Sequence[Candidate] | Sequence[Sample]) -> list[bytes]:
    """The keys that `table` holds when it holds all of `samples`, in their order, the reserved row first."""
    if table == "text":
        return [EMPTY_CAPTION_KEY, *(key for sample in samples for key in sample.caption_keys)]
    reserved = [ZERO_IMAGE_KEY] if table == "image_embeds" else []
    return reserved + [sample.image_key for sample in samples]


def whole_samples(
    candidates: Sequence[Candidate], tables: Mapping[str, TableState]
) -> tuple[list[Candidate], list[Refusal]]:
    """The candidates whose image is in every image table and that keep a caption where there are texts; and the others.

    A caption that was rejected costs the sample only that caption, as long as another one is left.
    """
    images = {name: (state.stored.key_set(), state.rejected) for name, state in tables.items() if name != "text"}
    text = tables.get("text")
    text_keys = (text.stored.key_set(), text.rejected) if text else None
    whole, refused = [], []
    for candidate in candidates:
        reasons = [
            _refusal(candidate.name, candidate.image_key, rejected)
            for stored, rejected in images.values()
            if candidate.image_key not in stored
        ]
        if reasons:
            refused.append(reasons[0])
            continue
        if text_keys is None or (candidate.caption_keys and text_keys[0].issuperset(candidate.caption_keys)):
            whole.append(candidate)
            continue
        kept = [i for i, key in enumerate(candidate.caption_keys) if key in text_keys[0]]
        lost = [key for key in candidate.caption_keys if key not in text_keys[0]]
        refused += [_refusal(candidate.name, key, text_keys[1]) for key in lost]
        if kept:
            captions = tuple(candidate.captions[i] for i in kept)
            whole.append(
                replace(candidate, captions=captions, caption_keys=tuple(candidate.caption_keys[i] for i in kept))
            )
    return whole, refused


def assemble(
    cache: Path,
    source: Source,
    candidates: Sequence[Candidate],
    refused: Sequence[Refusal],
    tables: Mapping[str, TableState],
    models: Mapping[str, Mapping[str, str | None]],
    form: str,
) -> Manifest:
    """Finish the cache of those candidates whose rows are all in `tables`; the others are refused."""
    whole, incomplete = whole_samples(candidates, tables)
    sizes, unreadable = image_sizes(cache, source, whole)
    whole = [candidate for candidate in whole if candidate.image_key in sizes]
    return finish_cache(cache, _samples(whole, sizes), [*refused, *incomplete, *unreadable], tables, models, form)


def finish_cache(
    cache: Path,
    samples: Sequence[Sample],
    refused: Sequence[Refusal],
    tables: Mapping[str, TableState],
    models: Mapping[str, Mapping[str, str | None]],
    form: str,
) -> Manifest:
    """Write samples, index, rejections, card and, last, the manifest; remove what only the manifest before it used.

    The rows of `samples` are all in `tables`; `refused` is what the source had besides them.
    """
    samples_digest, samples_file_digest = write_samples(cache, samples)
    index_digest = write_index(cache, _index_arrays(samples, tables))
    rejections = sorted({(r.name, r.stage, r.reason) for r in refused})
    rejected_digest = _write_rejections(cache, rejections)
    manifest = Manifest(
        format=form,
        tables={name: _table_entry(state) for name, state in tables.items()},
        samples=len(samples),
        samples_digest=samples_digest,
        samples_file_digest=samples_file_digest,
        index_digest=index_digest,
        rejected=len(rejections),
        rejected_digest=rejected_digest,
        models=models,
    )
    write_card(cache, manifest, max((len(sample.captions) for sample in samples), default=1))
    _write_changed(cache / MANIFEST, json_bytes(manifest.to_json()))
    _remove_superseded(cache, manifest)
    return manifest


def _refusal(name: str, key: bytes, rejected: Mapping[bytes, Rejection]) -> Refusal:
    rejection = rejected.get(key)
    if rejection is None:
        return Refusal(
            name=name, stage="source", reason="its content changed while the cache was being built; build again"
        )
    return Refusal(name=name, stage=rejection.stage, reason=rejection.reason)


def image_sizes(
    cache: Path, source: Source, candidates: Sequence[Candidate]
) -> tuple[dict[bytes, tuple[int, int]], list[Refusal]]:
    """Width and height by image key, of pictures known before from the cache's samples; and what cannot be read."""
    known, refused = _known_sizes(cache), []
    for candidate in candidates:
        try:
            if candidate.image_key not in known:
                known[candidate.image_key] = _upright_size(source.image(candidate.position))
        except InputRejected as error:
            refused.append(Refusal(name=candidate.name, stage=error.stage, reason=error.reason))
    return known, refused


def _samples(candidates: Sequence[Candidate], sizes: Mapping[bytes, tuple[int, int]]) -> list[Sample]:
    ids = sample_ids([candidate.image_key for candidate in candidates])
    return [
        Sample(
            id=i,
            name=c.name,
            image_key=c.image_key,
            captions=c.captions,
            caption_keys=c.caption_keys,
            width=sizes[c.image_key][0],
            height=sizes[c.image_key][1],
        )
        for i, c in zip(ids, candidates, strict=True)
    ]


def _known_sizes(cache: Path) -> dict[bytes, tuple[int, int]]:
    """Width and height by image key, from the samples of the manifest before this one."""
    manifest = _current(cache)
    if manifest is None:
        return {}
    try:
        table = stored_samples(cache, manifest)
    except KcacheError:
        return {}  # the samples file is derived: what it lacks is read from the images again
    keys, widths, heights = (table[name].to_pylist() for name in ("image_key", "width", "height"))
    return {key: (width, height) for key, width, height in zip(keys, widths, heights, strict=True)}


def _upright_size(content: bytes) -> tuple[int, int]:
    """Width and height in pixels after EXIF orientation, from the header of an image that decoded before."""
    from PIL import ExifTags, Image

    with Image.open(io.BytesIO(content)) as image:
        width, height = image.size
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return (height, width) if turned else (width, height)


def _current(cache: Path) -> Manifest | None:
    try:
        return read_manifest(cache)
    except KcacheError:
        return None  # none yet, or damaged: either way it is written anew


def _index_arrays(samples: Sequence[Sample], tables: Mapping[str, TableState]) -> dict[str, np.ndarray]:
    image_keys = [sample.image_key for sample in samples]
    counts = [len(sample.caption_keys) if "text" in tables else 0 for sample in samples]
    arrays = {CAPTION_BOUNDS: np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)}
    for name, state in tables.items():
        if name == "text":
            keys = [key for sample in samples for key in sample.caption_keys] + [EMPTY_CAPTION_KEY]
        else:
            keys = image_keys + ([ZERO_IMAGE_KEY] if name == "image_embeds" else [])
        positions = state.stored.find(keys)
        if (positions < 0).any():
            raise CacheIncompleteError(
                f"{name} lacks {int((positions < 0).sum())} of {len(keys)} rows that were thought stored; build again"
            )
        arrays[name] = state.stored.entries[positions]
    return arrays


def _table_entry(state: TableState) -> TableEntry:
    shards = state.stored.shards
    return TableEntry(
        recipe=state.recipe, rows=sum(s.rows for s in shards), bytes=sum(s.bytes for s in shards), shards=shards
    )


def _write_rejections(cache: Path, rejections: Sequence[tuple[str, str, str]]) -> str:
    """Write rejected.jsonl; returns the sha256 (hex) of its bytes."""
    lines = [json.dumps({"name": n, "stage": s, "reason": r}, ensure_ascii=False) + "\n" for n, s, r in rejections]
    content = "".join(lines).encode("utf-8", "backslashreplace")
    _write_changed(cache / "rejected.jsonl", content)
    return hashlib.sha256(content).hexdigest()


def _write_changed(path: Path, content: bytes) -> None:
    if not path.exists() or path.read_bytes() != content:
        write_bytes(path, content)


def _remove_superseded(cache: Path, manifest: Manifest) -> None:
    for path in cache.glob("samples-*.parquet"):
        if path.name != manifest.samples_file:
            path.unlink()
    for path in cache.glob("index-*"):
        if path.name != manifest.index_folder:
            shutil.rmtree(path)
