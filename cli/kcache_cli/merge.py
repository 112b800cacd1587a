"""`kcache cache-merge`: several caches made one."""

from typing import Annotated

import typer

from kcache.urls import check_lasting
from kcache_cli.progress import Report, say_manifest, show_counts


def cache_merge(
    new: Annotated[str, typer.Argument(metavar="NEW", help="Folder or URL of the cache to write; new or empty.")],
    caches: Annotated[list[str], typer.Argument(metavar="CACHE...", help="Folders or URLs of the finished caches.")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Make one cache of several that have equal recipes, without encoding anything.

    The same image with the same captions is one sample; with other captions it gets them all. Shards are hard-linked
    where the file system can, so that they take no space twice. Interrupted, the same command finishes the work.

    \b
    Examples:
      kcache cache-merge caches/all caches/photos caches/paintings
    """
    from kcache.upkeep.merge import merge_caches

    check_lasting(new)
    with Report() as report:
        manifest = merge_caches(new, caches, report=show_counts(report, "done"))
    say_manifest(new, manifest, as_json)
