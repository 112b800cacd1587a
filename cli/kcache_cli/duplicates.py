"""`kcache cache-duplicates`: which pictures are nearly the same."""

import dataclasses
import json
from typing import Annotated, Any

import typer

from kcache.tally import counted
from kcache_cli.progress import Report, say, show_counts


def cache_duplicates(
    cache: Annotated[str, typer.Argument(metavar="CACHE", help="Folder or URL of the cache.")],
    *,
    cosine: Annotated[
        float, typer.Option(help="Cosine of the image_embeds of two pictures from which on they are nearly the same.")
    ] = 0.97,
    output: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write all groups there, each a line of JSON.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Find pictures that are nearly the same as another one, by their image_embeds, which are there.

    Of each group the largest picture is kept: `--where "not duplicate"` trains without the others. Nothing of the cache
    is changed. What was found is remembered for as long as the cache stays the same.

    \b
    Examples:
      kcache cache-duplicates caches/photos-768
      kcache cache-duplicates caches/photos-768 --cosine 0.9 --output duplicates.jsonl
    """
    from kcache.store.likeness.listing import list_duplicates

    with Report() as report:
        show = show_counts(report, "done")
        listed = list_duplicates(cache, cosine, output, lambda done, total: show("near-duplicates", done, total))
    if as_json:
        say(json.dumps(dataclasses.asdict(listed), indent=2, ensure_ascii=False))
        return
    found = f"{counted(listed.duplicates, 'near-duplicate')} in {counted(listed.groups, 'group')}"
    say(f"{cache}: {counted(listed.samples, 'sample')}, {found}, cosine {cosine:g} and above")
    for group in listed.largest:
        _print(group)
    if more := listed.groups - len(listed.largest):
        say(f"  and {counted(more, 'more group')}" + ("" if output else ": --output FILE has them all"))
    if output:
        say(f"  {output} has them all")
    if listed.duplicates:
        say(f'  to train without: --where "duplicate_cosine < {cosine:g}"')


def _print(group: dict[str, Any]) -> None:
    told = [f"{each['name']} {each['cosine']:.3f}" for each in group["duplicates"]]
    if more := group["samples"] - 1 - len(told):
        told.append(f"{more:,} more")
    say(f"  {group['kept']['name']}, and nearly the same: {', '.join(told)}")
