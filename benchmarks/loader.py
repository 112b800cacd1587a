"""How fast the loader is, against a plain in-memory gather of the same rows in the same run.

    python benchmarks/loader.py --output loader.json

Writes a synthetic cache of float16 latents at 768 pixels (73,728 bytes a row), reads it once so that it lies in the
page cache, then takes turns: gathers from an array in memory, and the loader in each residency. "mmap" verifies each
row's checksum as it copies the row, "ram" has verified them all while it read the table. All give batches in random
order. Prints a table and writes JSON with the hardware and the versions.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine
from synthetic import write_synthetic_cache

from kcache import Cache
from kcache.loader import CacheLoader

ROW_BYTES = 4 * 96 * 96 * 2


def gather_batches(rows: np.ndarray, batch_size: int, *, reuse: bool) -> Iterator[np.ndarray]:
    """Random batches gathered from memory: into one reused buffer, or into a new array each."""
    rng = np.random.default_rng(0)
    buffer = np.empty((batch_size, *rows.shape[1:]), rows.dtype)
    while True:
        order = rng.permutation(len(rows))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            chosen = order[start : start + batch_size]
            # mode="clip" spares numpy a copy through a buffer of its own: the fastest gather it has.
            yield np.take(rows, chosen, axis=0, out=buffer, mode="clip") if reuse else rows[chosen]


def rate(batches: Iterator[Any], count: int, batch_size: int) -> tuple[float, float]:
    """Rows per second, and CPU seconds per gigabyte, over `count` batches."""
    next(batches)
    start, cpu = time.perf_counter(), time.process_time()
    for _ in islice(batches, count):
        pass
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return count * batch_size / seconds, cpu / (count * batch_size * ROW_BYTES / 1e9)


def measure(ways: dict[str, Callable[[], Iterator[Any]]], rounds: int, count: int, batch_size: int) -> dict[str, Any]:
    """Medians over `rounds` rounds in which the ways take turns, and each way's ratio to the first, round by round."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, make in ways.items():
            batches = make()
            samples[name].append(rate(batches, count, batch_size))
            batches.close()  # type: ignore[attr-defined]
    baseline = [rows for rows, _ in samples[next(iter(ways))]]
    return {
        name: {
            "rows_per_second": round(statistics.median(rows for rows, _ in runs)),
            "gigabytes_per_second": round(statistics.median(rows for rows, _ in runs) * ROW_BYTES / 1e9, 2),
            "cpu_seconds_per_gigabyte": round(statistics.median(cpu for _, cpu in runs), 3),
            "ratio": round(statistics.median(rows / base for (rows, _), base in zip(runs, baseline, strict=True)), 3),
        }
        for name, runs in samples.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192, help="rows of the cache (default 8192: 604 MB)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=128, help="batches timed per round and way")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "cache"
        write_synthetic_cache(folder, arguments.rows, tables=("latents",))
        rows = Cache.open(folder).read(range(arguments.rows), ["latents"])["latents"]

        def loader(residency: str) -> Callable[[], Iterator[Any]]:
            ready = CacheLoader(Cache.open(folder), ["latents"], arguments.batch_size, residency=residency)
            return ready.forever

        ways = {
            "gather, reused buffer": lambda: gather_batches(rows, arguments.batch_size, reuse=True),
            "gather, new arrays": lambda: gather_batches(rows, arguments.batch_size, reuse=False),
            "loader, mmap": loader("mmap"),
            "loader, ram": loader("ram"),
        }
        results = measure(ways, arguments.rounds, arguments.batches, arguments.batch_size)
    settings = {"rows": arguments.rows, "batch_size": arguments.batch_size, "batches": arguments.batches}
    report = {"benchmark": "loader", "machine": machine(), "settings": settings, "results": results}
    print(f"{'':24}{'rows/s':>10}{'GB/s':>8}{'CPU s/GB':>10}{'ratio':>8}")
    for name, row in results.items():
        print(f"{name:24}{row['rows_per_second']:>10,}{row['gigabytes_per_second']:>8}", end="")
        print(f"{row['cpu_seconds_per_gigabyte']:>10}{row['ratio']:>8}")
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
