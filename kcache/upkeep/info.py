"""What is in a cache, in plain values: counts, sizes, recipes, statistics, rejections, what a build has yet to do."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from kcache.build.plan import Plan, open_plan
from kcache.config import CountReport
from kcache.config.shapes import NO_SHAPE, ShapeSet, resolutions_of, square_set
from kcache.places import Place, cache_place
from kcache.store.cache import Cache
from kcache.store.digests import NO_CONTROL
from kcache.store.index import CAPTION_BOUNDS, open_index, statistics, tally_of, token_counts
from kcache.store.likeness.cosines import spread_of
from kcache.store.likeness.known import known_caption_cosines
from kcache.store.manifest import MANIFEST, Manifest, read_manifest
from kcache.store.samples import Refusal, picture_sizes, read_refused, samples_in_columns
from kcache.store.shaped.standing import Standing
from kcache.store.shards import read_commits
from kcache.tally import Tally
from kcache.upkeep.copying import CacheContents, read_contents
from kcache.upkeep.garbage import find_garbage, live_shards
from kcache.urls import is_read_afar

NOT_LOOKED_AT = (
    "whether every shard is there", "what the rows were made with", "what no sample uses and what is no part of it",
)  # fmt: skip
"""What is not said of a cache at a URL: for that all of its folders would have to be listed, and its records read."""
_TOGETHER = 1 << 20
"""Pictures whose crops are counted at a time."""
_NEEDED = ("manifest.json", "samples-*.parquet", "index-*/*", "rejected.jsonl")
"""Files that the rest is said from."""


def describe_cache(cache: str | Place, cosines: CountReport | None = None) -> dict[str, Any]:
    """All that `kcache cache-info` says, as JSON values under names that stay.

    How captions fit is said only with `cosines`, which is told how many samples are read of how many; else no row is.
    A folder whose first build is unfinished has None for what only a finished cache has, and so has a cache at a URL
    for what is `not_looked_at`. Raises CacheNotFoundError when there is neither a cache nor a build, and the errors of
    `Cache.open`.
    """
    folder = cache_place(cache, _NEEDED)
    is_far = is_read_afar(str(cache))
    plan = open_plan(folder)
    about = {"cache": str(cache), "build": _progress(folder, plan)}
    if plan is not None and not (folder / MANIFEST).exists():
        return about | dict.fromkeys(_FINISHED)
    contents = None if is_far else read_contents(folder)
    manifest = read_manifest(folder)
    index, refused = open_index(folder, manifest), list(read_refused(folder))
    recipes = {name: entry.recipe for name, entry in manifest.tables.items()}
    return about | {
        "format": manifest.format,
        "samples": manifest.samples,
        "bytes": sum(entry.bytes for entry in manifest.tables.values()),
        "orphaned_bytes": None if contents is None else _orphaned(contents, plan),
        "fingerprint": manifest.fingerprint,
        "models": {role: dict(model) for role, model in manifest.models.items()},
        "provenance": None if contents is None else dict(sorted(contents.provenance.items())),
        "tables": _tables(manifest),
        "resolutions": resolutions_of(manifest.shape_sets),
        "shapes": shape_counts(manifest, index, picture_sizes(folder, manifest)),
        "flip": manifest.flip,
        "controls": control_counts(folder, manifest),
        "turns": int(index["repeats"][:].sum(dtype=np.int64)) if "repeats" in index else manifest.samples,
        "repeats": statistics(index["repeats"][:]) if "repeats" in index else None,
        "weights": _weights(index),
        "captions": statistics(np.diff(index[CAPTION_BOUNDS])),
        "tokens": statistics(token_counts(recipes, index)),
        "caption_cosine": None if cosines is None else _caption_cosine(folder, cosines),
        "losses": _losses(tally_of(folder, manifest, index)),
        "rejected": [{"name": r.name, "stage": r.stage, "reason": r.reason} for r in refused],
        "rejected_by": _by_reason(refused),
        "not_looked_at": list(NOT_LOOKED_AT) if is_far else [],
    }


_FINISHED = (
    "format", "samples", "bytes", "orphaned_bytes", "fingerprint", "models", "provenance", "tables", "resolutions",
    "shapes", "flip", "controls", "turns", "repeats", "weights", "captions", "tokens", "caption_cosine", "losses",
    "rejected", "rejected_by", "not_looked_at",
)  # fmt: skip


def _progress(folder: Place, plan: Plan | None) -> dict[str, Any]:
    """Rows done and planned by table of the unfinished build, if there is one."""
    if plan is None:
        return {"unfinished": False, "tables": {}}
    tables = {}
    for table in plan.tables:
        committed = {commit.name for commit in read_commits(folder / table.recipe.directory, table.recipe)}
        done = sum(len(shard.keys) for shard in table.shards if shard.name in committed)
        tables[table.recipe.table] = {"done": done, "planned": len(table.keys)}
    return {"unfinished": True, "tables": tables}


def _tables(manifest: Manifest) -> dict[str, Any]:
    return {
        name: {
            "rows": entry.rows,
            "bytes": entry.bytes,
            "shards": len(entry.shards),
            "fingerprint": entry.recipe.fingerprint,
            "recipe": entry.recipe.to_json(),
        }
        for name, entry in sorted(manifest.tables.items())
    }


def shape_counts(manifest: Manifest, index: Mapping[str, np.ndarray], sizes: np.ndarray) -> list[dict[str, Any]]:
    """Of each set of shapes how many samples have which, and what is cropped away of pictures of these `sizes` (N, 2).

    Shares are means over the pictures that have a shape and a known size, None where there are none.
    """
    standing, told = Standing(manifest.shape_sets, index, manifest.samples), []
    for each in manifest.shape_sets:
        counts = standing.counts(each)
        shaped = sizes[(standing.numbers(each) != NO_SHAPE) & (sizes > 0).all(axis=1)]
        told.append({
            "resolution": each.resolution,
            "name": each.name,
            "max_upscale": each.max_upscale,
            "samples": {f"{tall}x{wide}": count for (tall, wide), count in counts.items()},
            "too_small": manifest.samples - sum(counts.values()),
            "cropped": _cropped(each, shaped),
            "cropped_by_squares": _cropped(square_set(each.resolution), shaped),
        })  # fmt: skip
    return told


def control_counts(folder: Place, manifest: Manifest) -> dict[str, int]:
    """How many samples have a control image of their own, of each kind that there are tables of."""
    if not (names := manifest.wants.controls):
        return {}
    samples = samples_in_columns(folder, manifest)
    return {name: int((~samples.control_keys(number).among([NO_CONTROL])).sum()) for number, name in enumerate(names)}


def _cropped(shapes: ShapeSet, sizes: np.ndarray) -> float | None:
    """The mean share of their pixels that pictures of these sizes (n, 2) lose by the crop."""
    runs = (sizes[first : first + _TOGETHER] for first in range(0, len(sizes), _TOGETHER))
    kept = sum(float(shapes.kept(run[:, 0], run[:, 1]).sum()) for run in runs)
    return round(1 - kept / len(sizes), 6) if len(sizes) else None


def _weights(index: Mapping[str, np.ndarray]) -> dict[str, float] | None:
    """Smallest, mean and largest weight of a sample; None where all are 1."""
    if "weight" not in index:
        return None
    weights = index["weight"][:]
    return {"min": float(weights.min()), "mean": float(weights.mean(dtype=np.float64)), "max": float(weights.max())}


def _caption_cosine(folder: Place, report: CountReport) -> dict[str, float] | None:
    return spread_of(known_caption_cosines(Cache.open(folder), lambda done, total: report("embeddings", done, total)))


def _losses(tally: Tally) -> dict[str, Any]:
    small = {str(side): count for side, count in tally.pictures_small.items()}
    return asdict(tally) | {"pictures_small": small, "sentences": tally.sentences}


def _orphaned(contents: CacheContents, plan: Plan | None) -> int:
    """About what `cache-gc --compact` would free; what an unfinished build has written is none of it."""
    garbage = find_garbage(contents, live_shards(contents))
    return garbage.unused_bytes + (garbage.bytes if plan is None else 0)


def _by_reason(refused: Sequence[Refusal]) -> list[dict[str, Any]]:
    counts = Counter((refusal.stage, refusal.reason) for refusal in refused)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [{"stage": stage, "reason": reason, "count": count} for (stage, reason), count in ordered]
