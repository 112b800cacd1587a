"""`kcache cache-info`: what is in a cache."""

import json
from typing import Annotated, Any

import typer

from kcache.tally import counted
from kcache_cli.progress import Report, bytes_text, say, show_counts

SHOWN_REJECTED = 10
"""Rejected inputs that are named one by one; more are counted by reason, and --json names them all."""


def cache_info(
    cache: Annotated[str, typer.Argument(metavar="CACHE", help="Folder or URL of the cache.")],
    *,
    caption_cosine: Annotated[
        bool,
        typer.Option("--caption-cosine", help="Also read the embeddings, and say how well captions fit pictures."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what is in a cache, and what was rejected and why.

    \b
    Examples:
      kcache cache-info caches/photos-768
      kcache cache-info caches/photos-768 --json | jq .tables
      kcache cache-info s3://bucket/photos-768
      kcache cache-info caches/photos-768 --caption-cosine
    """
    from kcache.upkeep.info import describe_cache

    with Report() as report:
        about = describe_cache(cache, show_counts(report, "samples") if caption_cosine else None)
    if as_json:
        say(json.dumps(about, indent=2, ensure_ascii=False))
    else:
        _print(about)


def _print(about: dict[str, Any]) -> None:
    if about["format"] is None:
        say(f"{about['cache']}: not finished yet")
        _print_build(about["build"])
        return
    size = bytes_text(about["bytes"])
    say(f"{about['cache']}: {counted(about['samples'], 'sample')}, {size}, {about['format']}")
    for role, model in sorted(about["models"].items()):
        say(f"  {role}: {model['name']}" + (f" at {model['revision'][:12]}" if model["revision"] else ""))
    _print_counts(about)
    if about["captions"]:
        say(f"  captions of a sample: {_statistics_text(about['captions'])}")
    if about["tokens"]:
        say(f"  tokens of a caption: {_statistics_text(about['tokens'])}")
    if about["caption_cosine"]:
        names = {
            "min": "least",
            "p1": "1 %",
            "p10": "10 %",
            "p50": "median",
            "p90": "90 %",
            "p99": "99 %",
            "max": "most",
        }
        spread = ", ".join(f"{text} {about['caption_cosine'][name]:.3f}" for name, text in names.items())
        say(f"  caption_cosine, of each sample's least fitting caption: {spread}")
    _print_pictures(about)
    for sentence in about["losses"]["sentences"]:
        say(f"  {sentence}")
    if about["orphaned_bytes"]:
        say(f"  {bytes_text(about['orphaned_bytes'])} that no sample uses: `kcache cache-gc --compact` frees them")
    if about["not_looked_at"]:
        say(f"  not looked at from here: {'; '.join(about['not_looked_at'])}: `kcache cache-verify` does, byte by byte")
    _print_build(about["build"])
    for name, table in about["tables"].items():
        _print_table(name, table)
    _print_rejected(about)


def _print_counts(about: dict[str, Any]) -> None:
    if about["repeats"]:
        say(f"  {about['turns']:,} turns an epoch: a sample comes {_statistics_text(about['repeats'])} times")
    if about["weights"]:
        say("  weights of samples: {min:g} to {max:g}, mean {mean:.3g}".format(**about["weights"]))


def _print_pictures(about: dict[str, Any]) -> None:
    for shapes in about["shapes"]:
        _print_shapes(shapes)
    if about["flip"]:
        say("  with rows of the mirrored pictures")
    if about["controls"]:
        having = [f"{counted(count, 'sample')} with {name}" for name, count in about["controls"].items()]
        say(f"  control images: {', '.join(having)}")


def _print_shapes(shapes: dict[str, Any]) -> None:
    """Shapes in use with their counts, and what the crop takes; of squares the latter alone."""
    cropped, by_squares = shapes["cropped"], shapes["cropped_by_squares"]
    crop = "" if cropped is None else f": the crop takes {cropped:.1%} of a picture"
    if len(shapes["samples"]) > 1 and by_squares is not None:
        crop += f", squares would take {by_squares:.1%}"
    say(f"  {shapes['resolution']} pixels{shapes['name'].removeprefix(str(shapes['resolution']))}{crop}")
    if len(shapes["samples"]) > 1:
        used = [f"{count:,} of {shape}" for shape, count in shapes["samples"].items() if count]
        unused = len(shapes["samples"]) - len(used)
        say(f"    {', '.join([*used, *([f'none of {unused} others'] if unused else [])])} (height x width)")
    if shapes["too_small"]:
        say(f"    {counted(shapes['too_small'], 'picture')} too small, enlarged up to {shapes['max_upscale']:g} times")


def _print_build(build: dict[str, Any]) -> None:
    if build["unfinished"]:
        tables = [f"{name} {table['done']:,} of {table['planned']:,}" for name, table in build["tables"].items()]
        say(f"  a build is unfinished ({', '.join(tables)}): run the same `kcache cache-build` again to finish it")


def _statistics_text(values: dict[str, float]) -> str:
    """Smallest to largest in one line; the mean alone where all are equal."""
    if values["min"] == values["max"]:
        return f"{values['min']}"
    middle = f"mean {values['mean']:.1f}, median {values['p50']:g}, 99 % up to {values['p99']:g}"
    return f"{values['min']} to {values['max']}, {middle}"


def _print_rejected(about: dict[str, Any]) -> None:
    rejected = about["rejected"]
    say(f"\n{counted(len(rejected), 'input')} rejected" if rejected else "\nnothing rejected")
    if len(rejected) <= SHOWN_REJECTED:
        for refusal in rejected:
            say(f"  {refusal['name']}: {refusal['stage']}: {refusal['reason']}")
        return
    for group in about["rejected_by"][:SHOWN_REJECTED]:
        say(f"  {group['count']:,} × {group['stage']}: {group['reason']}")
    say(f"  {about['cache']}/rejected.jsonl names each")


def _print_table(name: str, table: dict[str, Any]) -> None:
    recipe = table["recipe"]
    rows, shards = counted(table["rows"], "row"), counted(table["shards"], "shard")
    say(f"\n{name}: {rows}, {bytes_text(table['bytes'])} in {shards}")
    for field in recipe["fields"]:
        shape = ["n", *field["shape"]] if field["ragged"] else field["shape"]
        say(f"  {field['name']} ({', '.join(map(str, shape))}) {recipe['stored_dtype']}")
    batch = " × ".join(map(str, recipe["batch_shape"]))
    step = recipe["preprocess"].get("pad_to_multiple_of")
    trimmed = f", captions trimmed to the next multiple of {step} tokens" if step else ""
    how = f"by {recipe['encoder']} in {recipe['compute_dtype']}, batches of {batch}{trimmed}"
    say(f"  {'each packed as PNG' if 'packed' in recipe['preprocess'] else how}")
    say(f"  recipe {table['fingerprint'][:12]}")
