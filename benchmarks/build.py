"""How fast a cache is built, against the same encoders fed with inputs that are already decoded.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/build.py --output benchmarks/results
    python benchmarks/build.py --model-size full --mixed-precision bf16 --batch-size 32

For every table, three ways take turns:

    encoder alone   inputs wait decoded in memory, rows stay where they come out: no build can be faster
    decoding alone  inputs are decoded by all threads, and nothing else is done
    build           what `kcache cache-build` does: decode, encode and write at the same time; with the share of the
                    encoding thread's time that goes into waiting for inputs, encoding, and waiting for the disk

A build begins with nothing decoded and ends with a shard to write, so that few images make it look slower than it is.
Then whole builds are timed, once for each form of a cache: loading of the encoders, index and all, but with digests of
files remembered from before. Their limit
is what the encoders alone would take for all rows.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from device import synchronize
from outcome import write_outcome
from workload import RESOLUTIONS, Workload, add_workload_arguments, open_workload

from kcache.build import build_cache, survey
from kcache.builder import default_device
from kcache.digests import ZERO_IMAGE_KEY
from kcache.encoders import Encoder, load_encoder
from kcache.encoding import Meter, encode_shards
from kcache.inventory import Inventory, fetcher
from kcache.plan import PlannedShard

BATCHES_PER_SHARD = 4
"""Enough shards that one is written while the next is encoded, as in a build of many images."""
FORMS = ("zarr", "webdataset")


def measure_table(job: Inventory, table: str, rounds: int) -> dict[str, Any]:
    """All ways for one table, in turns."""
    start = time.perf_counter()
    recipe = job.recipes[table]
    encoder = load_encoder(recipe, job.prior, job.decoder, torch.device(default_device()))
    loading = time.perf_counter() - start
    keys, fetch, meter = job.wanted(table), fetcher(job.source, job.candidates, table), Meter()
    workers = job.config.num_workers or os.cpu_count() or 1

    def prepare(key: bytes) -> Any:
        return encoder.reserved() if key == ZERO_IMAGE_KEY else encoder.prepare(fetch(key))

    def decode() -> list[Any]:
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(prepare, keys))

    def build() -> None:
        with tempfile.TemporaryDirectory(dir=job.folder.parent) as folder:
            shards = cut(keys, BATCHES_PER_SHARD * encoder.batch_size)
            encode_shards(encoder, Path(folder), shards, fetch, workers=workers, meter=meter, done=lambda _: None)

    prepared = decode()
    encode_all(encoder, prepared[: 2 * encoder.batch_size])  # the first batches choose kernels
    ways = {"encoder alone": lambda: encode_all(encoder, prepared), "decoding alone": decode, "build": build}
    seconds = take_turns(ways, rounds)
    ratios = [alone / built for alone, built in zip(seconds["encoder alone"], seconds["build"], strict=True)]
    return {
        "rows": len(keys),
        "loading_seconds": round(loading, 2),
        "rows_per_second": {way: round(len(keys) / statistics.median(taken), 2) for way, taken in seconds.items()},
        "of_encoder_alone": round(statistics.median(ratios), 3),
        "shares": {stage: round(share, 4) for stage, share in meter.shares().items()},
    }


def encode_all(encoder: Encoder, prepared: Sequence[Any]) -> None:
    """Rows of all `prepared` inputs, which are dropped."""
    for start in range(0, len(prepared), encoder.batch_size):
        encoder.encode(prepared[start : start + encoder.batch_size])
    synchronize()


def cut(keys: Sequence[bytes], rows: int) -> Iterator[PlannedShard]:
    """`keys` as shards of `rows` rows."""
    for number, start in enumerate(range(0, len(keys), rows)):
        yield PlannedShard(name=f"{number:05d}", keys=tuple(keys[start : start + rows]))


def take_turns(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, work in ways.items():
            start = time.perf_counter()
            work()
            seconds[way].append(time.perf_counter() - start)
    return seconds


def measure_build(workload: Workload, arguments: argparse.Namespace, form: str, limit: float) -> dict[str, Any]:
    """A whole build in the form `form`; `limit` is what the encoders alone take for it, in seconds."""
    config = workload.build_config(
        arguments.stage, arguments.resolution, arguments.batch_size, arguments.mixed_precision, form
    )
    with tempfile.TemporaryDirectory(dir=workload.folder) as scratch:
        cache = Path(scratch) / "cache"
        start = time.perf_counter()
        built = build_cache(str(workload.pictures), str(cache), config)
        seconds = time.perf_counter() - start
        size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    return {
        "samples": built.samples,
        "seconds": round(seconds, 2),
        "images_per_second": round(built.samples / seconds, 2),
        "of_encoders_alone": round(limit / seconds, 3),
        "bytes": size,
    }


def show(results: dict[str, Any]) -> None:
    """Print the tables."""
    print(
        f"{'rows per second':16}{'encoder':>10}{'decoding':>10}{'build':>10}{'of encoder':>12}   waiting for inputs,",
        end="",
    )
    print(" encoding, waiting for the disk")
    for name, row in results["tables"].items():
        rates = "".join(f"{rate:>10,.1f}" for rate in row["rows_per_second"].values())
        print(
            f"{name:16}{rates}{row['of_encoder_alone']:>12}   {', '.join(f'{s:.1%}' for s in row['shares'].values())}"
        )
    for form, row in results["builds"].items():
        print(f"{form}: {row['samples']} samples in {row['seconds']} s, {row['images_per_second']} a second, ", end="")
        print(f"{row['of_encoders_alone']} of the encoders alone, {row['bytes']:,} bytes")


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload_arguments(parser, images=256)
    parser.add_argument("--stage", choices=("prior", "decoder", "all"), default="all")
    parser.add_argument("--resolution", type=int, help="default 128, 768 with --model-size full")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="where to write the JSON: a file or a folder")
    arguments = parser.parse_args(given)
    arguments.resolution = arguments.resolution or RESOLUTIONS[arguments.model_size]
    with open_workload(arguments) as workload:
        config = workload.build_config(
            arguments.stage, arguments.resolution, arguments.batch_size, arguments.mixed_precision
        )
        job = survey(str(workload.pictures), str(workload.folder / "none"), config, lambda _: None)
        tables = {name: measure_table(job, name, arguments.rounds) for name in job.recipes}
        limit = sum(row["rows"] / row["rows_per_second"]["encoder alone"] for row in tables.values())
        results = {
            "tables": tables,
            "builds": {form: measure_build(workload, arguments, form, limit) for form in FORMS},
        }
    show(results)
    write_outcome(arguments.output, "build", vars(arguments), results)


if __name__ == "__main__":
    main()
