"""`kcache cache-verify`: every byte of a cache, checked; compared with its encoders; repaired."""

import dataclasses
import json
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kcache.config import SourceConfig
from kcache.errors import CacheCorruptError, ConfigError
from kcache.tally import counted
from kcache_cli.flags import with_flags
from kcache_cli.progress import Report, bytes_text, duration_text, left_text, note, say, show_build, show_counts

if TYPE_CHECKING:
    from kcache.upkeep.compare import Difference
    from kcache.upkeep.repair import RepairResult
    from kcache.upkeep.verify import VerifyProgress, VerifyResult

SHOWN = 20
"""Broken files, broken rows and orphaned files that are named one by one; --json names them all."""


@with_flags(SourceConfig)
def cache_verify(
    cache: Annotated[str, typer.Argument(metavar="CACHE", help="Folder or URL of the cache.")],
    *,
    source: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Where the cache was built from, as for cache-build.")
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Encode what is broken again, from --source, and nothing else.")
    ] = False,
    against_online: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Encode N random samples of --source again, and print the largest differences."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides which samples --against-online takes.")] = 0,
    device: Annotated[
        str | None, typer.Option(help="Where the encoders run, such as cuda:0. Chosen by what there is when left out.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    **reading: Any,
) -> None:
    """Check every byte of a cache against the checksums that were committed with it.

    What is broken is named: file, shard, row, and the samples that use it. The exit code is then 4. Files that are no
    part of the cache are named too, and are no fault.

    \b
    Examples:
      kcache cache-verify caches/photos-768
      kcache cache-verify caches/photos-768 --source photos/ --repair
      kcache cache-verify caches/photos-768 --source photos/ --against-online 32
    """
    if source is None and (repair or against_online):
        flag = "--repair" if repair else "--against-online"
        raise ConfigError(f"{flag} encodes pictures and captions again; say where they are: --source SOURCE")
    config = SourceConfig(**reading)
    spare = config.flags if source is None else () if repair or against_online else ("--source", *config.flags)
    if spare:
        raise ConfigError(
            f"{' and '.join(spare)} would not be used: every byte is verified without a source; expected it for "
            "--against-online N or --repair, with --source SOURCE; give one of those, or leave it out"
        )
    if device is not None:
        from kcache.machine import check_device

        # Reading every byte comes first, and takes long.
        check_device(device)
    encoding = {"reading": config, "device": device}
    about: dict[str, Any] = {}
    with Report() as report:
        if repair and source is not None:
            result, about["repaired"] = _repair(source, cache, encoding, report)
        else:
            result = _verify(cache, report)
        about = _about(result) | about
        if against_online and source is not None and not result.corrupt:
            about["against_online"] = _compare(source, cache, against_online, seed, encoding, report)
    if as_json:
        say(json.dumps(about, indent=2, ensure_ascii=False))
    else:
        _print(result, about)
    if result.corrupt:
        raise CacheCorruptError(
            f"{cache} is corrupt: {counted(len(result.files), 'file')} and {counted(len(result.rows), 'row')} "
            "are not what was committed; if it was copied, copy it again, else encode them anew: "
            f"kcache cache-verify {cache} --source SOURCE --repair"
        )


def _verify(cache: str, report: Report) -> "VerifyResult":
    from kcache.upkeep.verify import verify_cache

    return verify_cache(cache, partial(show_verify, report))


def _repair(source: str, cache: str, encoding: dict[str, Any], report: Report) -> tuple["VerifyResult", dict[str, Any]]:
    from kcache.upkeep.repair import repair_cache

    result: RepairResult = repair_cache(
        source,
        cache,
        **encoding,
        report=partial(show_build, report),
        say=report.note,
        checked=partial(show_verify, report),
    )
    before = _about(result.before)
    return result.after, {"encoded": dict(result.encoded), "files": before["files"], "rows": before["rows"]}


def _compare(
    source: str, cache: str, count: int, seed: int, encoding: dict[str, Any], report: Report
) -> list[dict[str, Any]]:
    from kcache.upkeep.compare import compare_online

    show = show_counts(report, "encoded and compared")
    differences: list[Difference] = compare_online(source, cache, count, seed=seed, **encoding, report=show)
    return [dataclasses.asdict(difference) for difference in differences]


def show_verify(report: Report, progress: "VerifyProgress") -> None:
    """Bytes read, in a unit that suits the cache, their rate and the time left."""
    rate = progress.done / progress.seconds if progress.seconds else 0.0
    unit, size = ("MB", 10**6) if progress.total >= 10**7 else ("kB", 10**3)
    left = left_text(progress.done, progress.total, rate)
    # Rounded up, so that a small cache has something to be done, too.
    done, total = (-(-count // size) for count in (progress.done, progress.total))
    report.show("verify", done, total, f"{bytes_text(round(rate))}/s{left}", unit)


def _about(result: "VerifyResult") -> dict[str, Any]:
    rate = result.bytes / result.seconds / 1e9
    return {**dataclasses.asdict(result), "corrupt": result.corrupt, "gigabytes_per_second": round(rate, 3)}


def _print(result: "VerifyResult", about: dict[str, Any]) -> None:
    for part, found in (("repaired", about.get("repaired", {})), ("broken", about)):
        _print_list(f"{part} file", [f"{file['path']}: {file['reason']}" for file in found.get("files", ())])
        _print_list(f"{part} row", [_row_text(row) for row in found.get("rows", ())])
    if "repaired" in about:
        encoded = about["repaired"]["encoded"]
        rows = ", ".join(f"{count:,} of {table}" for table, count in encoded.items())
        say(f"rows encoded again: {rows or 'none'}")
    for difference in about.get("against_online", ()):
        say(
            f"{difference['table']} {difference['field']}: {counted(difference['rows'], 'row')}, largest difference "
            f"{difference['absolute']:.2e}, relative {difference['relative']:.2e}"
        )
    _print_list("orphaned file or folder", list(result.orphaned))
    state = "corrupt" if result.corrupt else "sound"
    size, rate = bytes_text(result.bytes), about["gigabytes_per_second"]
    say(f"{result.cache}: {state}, {size} in {duration_text(result.seconds)}, {rate:.2f} GB/s")


def _row_text(row: dict[str, Any]) -> str:
    user = f"{row['name']} ({row['sample']})" if row["sample"] else row["name"]
    return f"{row['table']} {row['field']}, {row['shard']} row {row['row']}: {user}"


def _print_list(what: str, lines: list[str]) -> None:
    for line in lines[:SHOWN]:
        say(f"{what}: {line}")
    if len(lines) > SHOWN:
        note(f"… and {len(lines) - SHOWN:,} more: --json names them all")
