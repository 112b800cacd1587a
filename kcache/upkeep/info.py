"""What is in a cache, in plain values: counts, sizes, recipes, statistics, rejections, what a build has yet to do."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from kcache.build.plan import Plan, open_plan
from kcache.store.index import CAPTION_BOUNDS, open_index, statistics, tally_of, token_counts
from kcache.store.manifest import MANIFEST
from kcache.store.recipe import sides_of
from kcache.store.shards import read_commits
from kcache.tally import Tally
from kcache.upkeep.copying import CacheContents, read_contents
from kcache.upkeep.garbage import LiveShard, find_garbage, live_shards


def describe_cache(cache: str | Path) -> dict[str, Any]:
    """All that `kcache cache-info` says, as JSON values under names that stay.

    A folder whose first build is unfinished has None for what only a finished cache has. Raises CacheNotFoundError when
    there is neither a cache nor a build, and the errors of `Cache.open`.
    """
    folder = Path(cache)
    plan = open_plan(folder)
    about = {"cache": str(folder), "build": _progress(folder, plan)}
    if plan is not None and not (folder / MANIFEST).exists():
        return about | dict.fromkeys(_FINISHED)
    contents = read_contents(folder)
    manifest, live = contents.manifest, live_shards(contents)
    index = open_index(folder, manifest)
    return about | {
        "format": manifest.format,
        "samples": manifest.samples,
        "bytes": sum(entry.bytes for entry in manifest.tables.values()),
        "orphaned_bytes": _orphaned(contents, live, plan),
        "fingerprint": manifest.fingerprint,
        "models": {role: dict(model) for role, model in manifest.models.items()},
        "provenance": dict(sorted(contents.provenance.items())),
        "tables": _tables(contents),
        "resolutions": sides_of(manifest.tables),
        "captions": statistics(np.diff(index[CAPTION_BOUNDS])),
        "tokens": statistics(token_counts(contents.recipes, index)),
        "losses": _losses(tally_of(folder, manifest, index)),
        "rejected": [{"name": r.name, "stage": r.stage, "reason": r.reason} for r in contents.refused],
        "rejected_by": _by_reason(contents),
    }


_FINISHED = (
    "format", "samples", "bytes", "orphaned_bytes", "fingerprint", "models", "provenance", "tables", "resolutions",
    "captions", "tokens", "losses", "rejected", "rejected_by",
)  # fmt: skip


def _progress(folder: Path, plan: Plan | None) -> dict[str, Any]:
    """Rows done and planned by table of the unfinished build, if there is one."""
    if plan is None:
        return {"unfinished": False, "tables": {}}
    tables = {}
    for table in plan.tables:
        committed = {commit.name for commit in read_commits(folder / table.recipe.directory, table.recipe)}
        done = sum(len(shard.keys) for shard in table.shards if shard.name in committed)
        tables[table.recipe.table] = {"done": done, "planned": len(table.keys)}
    return {"unfinished": True, "tables": tables}


def _tables(contents: CacheContents) -> dict[str, Any]:
    return {
        name: {
            "rows": entry.rows,
            "bytes": entry.bytes,
            "shards": len(entry.shards),
            "fingerprint": entry.recipe.fingerprint,
            "recipe": entry.recipe.to_json(),
        }
        for name, entry in sorted(contents.manifest.tables.items())
    }


def _losses(tally: Tally) -> dict[str, Any]:
    small = {str(side): count for side, count in tally.pictures_small.items()}
    return asdict(tally) | {"pictures_small": small, "sentences": tally.sentences}


def _orphaned(contents: CacheContents, live: Mapping[str, list[LiveShard]], plan: Plan | None) -> int:
    """About what `cache-gc --compact` would free; what an unfinished build has written is none of it."""
    garbage = find_garbage(contents, live)
    return garbage.unused_bytes + (garbage.bytes if plan is None else 0)


def _by_reason(contents: CacheContents) -> list[dict[str, Any]]:
    counts = Counter((refusal.stage, refusal.reason) for refusal in contents.refused)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [{"stage": stage, "reason": reason, "count": count} for (stage, reason), count in ordered]
