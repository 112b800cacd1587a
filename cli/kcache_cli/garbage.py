"""`kcache cache-gc`: remove from a cache what is no part of it any more."""

import dataclasses
import json
from typing import Annotated

import typer

from kcache.tally import counted
from kcache_cli.progress import Report, bytes_text, note, say, show_counts


def cache_gc(
    cache: Annotated[str, typer.Argument(metavar="CACHE", help="Folder or URL of the cache.")],
    *,
    compact: Annotated[
        bool, typer.Option("--compact", help="Also write shards again that hold rows which no sample uses.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Remove what building left behind: rows of edited inputs, tables of other recipes, files of killed builders.

    Samples and rows stay what they are, and building again has nothing to do. It is refused while anything on this
    machine reads the cache or builds it; on a file system that several machines share, see to the others yourself.
    In a bucket nobody can be seen reading: there only what is older than a day goes, and only once the manifest is, so
    that runs which began before it should have ended; a cache that was changed takes two runs of this, a day apart.

    \b
    Examples:
      kcache cache-gc caches/photos-768 --dry-run
      kcache cache-gc caches/photos-768 --compact
    """
    from kcache.upkeep.garbage import collect_garbage

    with Report() as report:
        show = show_counts(report, "done")
        garbage = collect_garbage(cache, compact=compact, dry_run=dry_run, report=show, say=report.note)
    if as_json:
        say(json.dumps(dataclasses.asdict(garbage), indent=2))
        return
    for path in garbage.paths:
        note(path)
    did = "would be " if dry_run else ""
    say(f"{counted(len(garbage.paths), 'path')} {did}removed, {bytes_text(garbage.bytes)} {did}freed")
    if garbage.younger:
        say(
            f"{counted(garbage.younger, 'more path')} stay in the bucket, where nothing says who reads them, until "
            "they, and the manifest, are a day old; run this again then"
        )
    if garbage.unused_bytes and not compact:
        say(f"about {bytes_text(garbage.unused_bytes)} of unused rows in shards that stay; --compact frees them too")
    elif garbage.unused_bytes:
        say(
            f"about {bytes_text(garbage.unused_bytes)} would be freed by writing shards again without their unused rows"
        )
