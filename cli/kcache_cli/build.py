"""`kcache cache-build`: encode what is missing."""

import dataclasses
import json
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kcache.config import BuildConfig
from kcache.errors import RejectedInputsError
from kcache.tally import counted
from kcache.urls import check_lasting
from kcache_cli.flags import with_flags
from kcache_cli.progress import Report, bytes_text, duration_text, note, say, show_build

if TYPE_CHECKING:
    from kcache.build.build import BuildResult
    from kcache.build.estimate import BuildEstimate

_IN_FULL = 5
"""Of more tables, as many shapes have, each is told of in a line, and only where there is something to tell."""


@with_flags(BuildConfig)
def cache_build(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="Folder of images, webdataset tars, saved dataset, parquet files, or Hub dataset id."
        ),
    ],
    cache: Annotated[
        str, typer.Argument(metavar="CACHE", help="Folder or URL of the cache; made when it does not exist.")
    ],
    *,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Say what would be encoded and why, how long it takes and what it saves; write nothing."
        ),
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 3 when any input was rejected.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    **settings: Any,
) -> None:
    """Encode what is missing from a cache.

    Where nothing is missing that takes seconds. A build may be interrupted at any moment and run again: what was
    committed is kept. Several processes may build one cache together, on one machine or many. Inputs that cannot be
    encoded are named in CACHE/rejected.jsonl, with the reason, and cost nothing else.

    Captions of a picture are in metadata.jsonl (file_name, text) or in a .txt beside it, one per line; several rows for
    a picture are several captions. docs/your-data.md has all that is read, and how.

    \b
    Examples:
      kcache cache-build photos/ caches/photos-768
      kcache cache-build photos/ caches/photos --resolution 512 --resolution 768 --mixed-precision fp16
      kcache cache-build lambdalabs/naruto-blip-captions caches/naruto --stage prior --dry-run
      torchrun --nproc-per-node 8 -m kcache_cli cache-build photos/ caches/photos-768
    """
    from kcache.build.build import build_cache
    from kcache.engines import ahead_of, engine_of

    check_lasting(cache)
    lists = {name: tuple(value) for name, value in settings.items() if isinstance(value, list)}
    config = BuildConfig(**settings | lists)
    if dry_run:
        from kcache.build.estimate import estimate_build

        estimate = estimate_build(source, cache, config, say=note, ahead=ahead_of(config, note))
        _print_estimate(estimate, config.batch_size, as_json)
        return
    try:
        with Report() as report:
            engine = engine_of(source, config)
            result = build_cache(
                source, cache, config, report=partial(show_build, report), say=report.note, engine=engine,
                ahead=ahead_of(config, report.note),
            )  # fmt: skip
    except (KeyboardInterrupt, SystemExit):
        note(f"stopped; what was committed to {cache} is kept: run the same command to go on")
        raise
    _print_result(result, as_json)
    if strict and result.rejected:
        raise RejectedInputsError(
            f"{counted(result.rejected, 'input')} rejected; expected none under --strict; see {cache}/rejected.jsonl"
        )


def _print_estimate(estimate: "BuildEstimate", batch: int, as_json: bool) -> None:
    if as_json:
        say(json.dumps(dataclasses.asdict(estimate) | {"leaving": estimate.leaving.counts}, indent=2))
        return
    short = len(estimate.tables) > _IN_FULL
    for name, table in estimate.tables.items():
        if short and not table.missing and not table.unused:
            continue
        size = f", {bytes_text(table.bytes)}" if table.bytes else ""
        todo = f"{counted(table.missing, 'row')} to encode ({table.why}){size}, {duration_text(table.seconds)}"
        if table.missing or not short:
            say(f"{name}: {todo}" if table.missing else f"{name}: 0 to do")
        if table.unused:
            say(f"{name}: {counted(table.unused, 'row')} that no sample uses any more: see `kcache cache-gc`")
    say(f"{bytes_text(estimate.bytes)} to write, about {duration_text(estimate.seconds)}")
    for stage, saving in estimate.savings.items():
        step = f"{saving.sample_seconds * batch:.2g} s a step of {batch}"
        say(f"{stage}: saves {step} against --online, pays back after {saving.epochs:.2g} epochs")


def _print_result(result: "BuildResult", as_json: bool) -> None:
    if as_json:
        say(json.dumps(dataclasses.asdict(result) | {"leaving": result.leaving.counts}, indent=2))
        return
    short = len(result.tables) > _IN_FULL
    for name, table in result.tables.items():
        if short and not table.encoded and not table.present:
            continue
        say(f"{name}: {table.encoded:,} encoded, {table.present:,} present before, {bytes_text(table.bytes)}")
        if table.seconds and not short:
            say(f"{name}: {_time_text(table.seconds)}")
    if not any(table.encoded for table in result.tables.values()):
        say("0 to do")
    for sentence in result.losses:
        say(sentence)
    if result.rejected:
        say(f"{counted(result.rejected, 'input')} rejected: {result.cache}/rejected.jsonl says which and why")
    say(f"{result.cache}: {counted(result.samples, 'sample')}, {duration_text(result.seconds)}")


def _time_text(seconds: Mapping[str, float]) -> str:
    """Where a builder's time went, in a line."""
    total = sum(seconds[stage] for stage in ("decode", "encode", "write")) or 1.0
    decode, encode, write = (f"{seconds[stage] / total:.0%}" for stage in ("decode", "encode", "write"))
    held_up = f"{seconds['held_up'] / total:.1%} with enough for a batch at hand"
    return f"{encode} of the time encoding, {decode} waiting for decoded inputs ({held_up}), {write} writing"
