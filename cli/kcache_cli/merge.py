"""`kcache cache-merge`: several caches made one."""

from collections.abc import Callable
from typing import Annotated, TypeVar

import typer

from kcache.errors import ConfigError
from kcache.urls import check_lasting
from kcache_cli.progress import Report, say_manifest, show_counts

T = TypeVar("T", int, float)


def cache_merge(
    new: Annotated[str, typer.Argument(metavar="NEW", help="Folder or URL of the cache to write; new or empty.")],
    caches: Annotated[list[str], typer.Argument(metavar="CACHE...", help="Folders or URLs of the finished caches.")],
    *,
    weight: Annotated[
        list[str] | None, typer.Option(metavar="CACHE=W", help="Multiply the weights of a cache's samples; repeatable.")
    ] = None,
    repeats: Annotated[
        list[str] | None, typer.Option(metavar="CACHE=N", help="Multiply the repeats of a cache's samples; repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Make one cache of several that have equal recipes, without encoding anything.

    The same image with the same captions is one sample; with other captions it gets them all. What else it has, its
    weight and repeats too, is what the first of its caches says. Shards are hard-linked where the file system can, so
    that they take no space twice. Interrupted, the same command finishes the work.

    \b
    Examples:
      kcache cache-merge caches/all caches/photos caches/paintings
      kcache cache-merge caches/all caches/photos caches/me --repeats caches/me=10 --weight caches/photos=0.5
    """
    from kcache.upkeep.merge import merge_caches

    check_lasting(new)
    with Report() as report:
        manifest = merge_caches(
            new,
            caches,
            weights=_of_caches("--weight", weight or [], caches, float),
            repeats=_of_caches("--repeats", repeats or [], caches, int),
            report=show_counts(report, "done"),
        )
    say_manifest(new, manifest, as_json)


def _of_caches(flag: str, given: list[str], caches: list[str], kind: Callable[[str], T]) -> list[T]:
    """What a flag says of each of the `caches`, 1 where nothing."""
    found: dict[str, T] = {}
    for text in given:
        cache, _, number = text.rpartition("=")
        if cache not in caches or cache in found:
            why = "is the second for that cache" if cache in found else "names none of the caches"
            raise ConfigError(
                f"{flag} {text} {why}; expected one of {', '.join(caches)}, as written there, = and a number"
            )
        try:
            found[cache] = kind(number)
        except ValueError as error:
            what = "a whole number" if kind is int else "a number"
            raise ConfigError(f"{flag} {text} has no such number; expected {what}: {flag} {cache}=2") from error
    return [found.get(cache, kind("1")) for cache in caches]
