"""`kcache cache-convert`: the same cache in the other form."""

from typing import Annotated, Literal

import typer

from kcache.urls import check_lasting
from kcache_cli.progress import Report, say_manifest, show_counts


def cache_convert(
    cache: Annotated[str, typer.Argument(metavar="CACHE", help="Folder or URL of the finished cache.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="Folder or URL of the cache to write; new or empty.")],
    *,
    form: Annotated[
        Literal["zarr", "webdataset"], typer.Option("--format", help="Form of the new cache's shards on disk.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write a cache again in another form, without encoding anything.

    Samples, recipes and fingerprint stay the same, so both caches train equal models. The source of the pictures is not
    needed. Interrupted, the same command finishes the work.

    \b
    Examples:
      kcache cache-convert caches/photos-768 published/photos-768 --format webdataset
      kcache cache-convert published/photos-768 caches/photos-768 --format zarr
    """
    from kcache.upkeep.convert import convert_cache

    check_lasting(new)
    with Report() as report:
        manifest = convert_cache(cache, new, form, report=show_counts(report, "written"))
    say_manifest(new, manifest, as_json)
