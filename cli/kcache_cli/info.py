"""`kcache cache-info`: what is in a cache."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from kcache_cli.progress import bytes_text, count_text, say

__all__ = ["cache_info"]

SHOWN_REJECTED = 10
"""Rejected inputs that are named one by one; --json names them all."""


def cache_info(
    cache: Annotated[str, typer.Argument(metavar="CACHE", help="Folder of the cache.")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what is in a cache, and what was rejected and why.

    \b
    Examples:
      kcache cache-info caches/photos-768
      kcache cache-info caches/photos-768 --json | jq .tables
    """
    about = describe(Path(cache))
    if as_json:
        say(json.dumps(about, indent=2, ensure_ascii=False))
    else:
        _print(about)


def describe(cache: Path) -> dict[str, Any]:
    """All that cache-info says, as plain JSON values; raises the errors of Cache.open."""
    from kcache import Cache

    manifest = Cache.open(cache).manifest
    tables = {
        name: {
            "rows": entry.rows,
            "bytes": entry.bytes,
            "shards": len(entry.shards),
            "fingerprint": entry.recipe.fingerprint,
            "recipe": entry.recipe.to_json(),
        }
        for name, entry in sorted(manifest.tables.items())
    }
    return {
        "cache": str(cache),
        "format": manifest.format,
        "samples": manifest.samples,
        "bytes": sum(entry.bytes for entry in manifest.tables.values()),
        "fingerprint": manifest.fingerprint,
        "models": {role: dict(model) for role, model in manifest.models.items()},
        "tables": tables,
        "rejected": _rejected(cache),
    }


def _rejected(cache: Path) -> list[dict[str, Any]]:
    path = cache / "rejected.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _print(about: dict[str, Any]) -> None:
    size = bytes_text(about["bytes"])
    say(f"{about['cache']}: {count_text(about['samples'], 'sample')}, {size}, {about['format']}")
    for role, model in sorted(about["models"].items()):
        say(f"  {role}: {model['name']}" + (f" at {model['revision'][:12]}" if model["revision"] else ""))
    for name, table in about["tables"].items():
        _print_table(name, table)
    rejected = about["rejected"]
    say(f"\n{count_text(len(rejected), 'input')} rejected" if rejected else "\nnothing rejected")
    for refusal in rejected[:SHOWN_REJECTED]:
        say(f"  {refusal['name']}: {refusal['stage']}: {refusal['reason']}")
    if len(rejected) > SHOWN_REJECTED:
        say(f"  … and {len(rejected) - SHOWN_REJECTED:,} more: {about['cache']}/rejected.jsonl")


def _print_table(name: str, table: dict[str, Any]) -> None:
    recipe = table["recipe"]
    rows, shards = count_text(table["rows"], "row"), count_text(table["shards"], "shard")
    say(f"\n{name}: {rows}, {bytes_text(table['bytes'])} in {shards}")
    for field in recipe["fields"]:
        shape = ["n", *field["shape"]] if field["ragged"] else field["shape"]
        say(f"  {field['name']} ({', '.join(map(str, shape))}) {recipe['stored_dtype']}")
    batch = " × ".join(map(str, recipe["batch_shape"]))
    say(f"  by {recipe['encoder']} in {recipe['compute_dtype']}, batches of {batch}")
    say(f"  recipe {table['fingerprint'][:12]}")
