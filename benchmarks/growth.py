"""What grows with a cache and what does not: its size, opening it, the first batch, the memory, and a batch.

    python benchmarks/growth.py --output benchmarks/results
    python benchmarks/growth.py --sizes 1000000 10000000

Writes caches of random rows without encoders, and reads each in fresh processes, in both residencies: "mmap" leaves the
rows where they are, "ram" reads whole tables first. Rows are tiny (64 bytes, and 16 for each token), so that what is
measured is what comes with every sample, whatever its rows weigh. All files are in the page cache, as they were just
written. "mmap" maps pages when they are first read, so that small caches, which are read again and again, look faster.

Each quantity is called flat or linear by the slope of a straight line through (log rows, log quantity): 0 is flat, 1 is
linear. The line goes through the two largest caches, as small ones are all overhead; the slope over all is told beside
it. Ten million rows take some ten minutes and as many GB of memory to write. In a folder the JSON is named after the
largest cache.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measuring.record import write_outcome
from measuring.synthetic import write_synthetic_cache

FIELDS = ("image_embeds", "text_embeds", "text_encoder_hidden_states", "latents")
QUANTITIES = ("bytes", "open_seconds", "first_batch_seconds", "memory_bytes", "batch_milliseconds")
FLAT, LINEAR = 0.25, 0.75
"""Slopes up to which a quantity is called flat, and from which it is called linear."""

READ = """
import json, statistics, sys, time
from kcache import Cache
from kcache.loader import CacheLoader

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

path, residency, batch_size, count, *fields = sys.argv[1:]
before = anonymous()
start = time.perf_counter()
cache = Cache.open(path)
opened = time.perf_counter()
batches = CacheLoader(cache, fields, int(batch_size), residency=residency).forever()
next(batches)
first = time.perf_counter()
taken = []
for _ in range(int(count)):
    began = time.perf_counter()
    next(batches)
    taken.append(time.perf_counter() - began)
print(json.dumps({"open_seconds": opened - start, "first_batch_seconds": first - opened,
    "memory_bytes": anonymous() - before, "batch_milliseconds": statistics.mean(taken) * 1e3}))
"""


def read(cache: Path, residency: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Medians over some fresh processes that open `cache` and read batches."""
    words = [str(cache), residency, str(arguments.batch_size), str(arguments.batches), *FIELDS]
    runs = []
    for _ in range(arguments.rounds):
        ran = subprocess.run([sys.executable, "-c", READ, *words], check=True, capture_output=True, text=True)
        runs.append(json.loads(ran.stdout))
    return {name: float(np.median([run[name] for run in runs])) for name in runs[0]}


def measure_size(samples: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One cache, both residencies."""
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(scratch) / "cache"
        start = time.perf_counter()
        write_synthetic_cache(cache, samples, dim=8, latent_side=2, rows_per_shard=50_000)
        written = time.perf_counter() - start
        size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
        residencies = {residency: read(cache, residency, arguments) for residency in ("mmap", "ram")}
    return {"samples": samples, "bytes": size, "write_seconds": round(written, 2), "residencies": residencies}


def slope(samples: Sequence[float], values: Sequence[float]) -> float:
    """Slope of the straight line through (log samples, log values) with the least squares."""
    return float(np.polyfit(np.log(samples), np.log(np.maximum(values, 1e-9)), 1)[0])


def how_it_grows(slope: float) -> str:
    """The word for a slope between the two largest caches."""
    return "flat" if slope <= FLAT else "linear" if slope >= LINEAR else "less than linear"


def verdict(samples: Sequence[float], values: Sequence[float]) -> dict[str, Any]:
    """How a quantity grows: the slope between the two largest caches, the slope over all, and a word for the first."""
    last = slope(samples[-2:], values[-2:])
    return {"slope": round(last, 3), "slope_over_all": round(slope(samples, values), 3), "grows": how_it_grows(last)}


def verdicts(sizes: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A verdict on every quantity of both residencies."""
    samples = [size["samples"] for size in sizes]
    found = {"bytes": verdict(samples, [size["bytes"] for size in sizes])}
    for residency in ("mmap", "ram"):
        for name in QUANTITIES[1:]:
            values = [size["residencies"][residency][name] for size in sizes]
            found[f"{residency}, {name}"] = verdict(samples, values)
    return found


def show(results: dict[str, Any]) -> None:
    """Print the tables."""
    heads = {"rows": 12, "residency": 11, "cache MB": 11, "open ms": 10, "first batch ms": 16, "memory MB": 11}
    print("".join(f"{head:>{width}}" for head, width in heads.items()) + f"{'batch ms':>10}")
    for size in results["sizes"]:
        for residency, row in size["residencies"].items():
            print(f"{size['samples']:>12,}{residency:>11}{size['bytes'] / 1e6:>11,.1f}", end="")
            print(f"{row['open_seconds'] * 1e3:>10,.1f}{row['first_batch_seconds'] * 1e3:>16,.1f}", end="")
            print(f"{row['memory_bytes'] / 1e6:>11,.1f}{row['batch_milliseconds']:>10,.3f}")
    for name, row in results["growth"].items():
        print(f"{name:30} {row['grows']}, slope {row['slope']} ({row['slope_over_all']} over all)")


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6], help="rows; two or more")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=400, help="read per process")
    parser.add_argument("--rounds", type=int, default=3, help="processes per cache and residency")
    parser.add_argument("--output", type=Path, help="where to write the JSON: a file or a folder")
    arguments = parser.parse_args(given)
    if len(arguments.sizes) < 2:
        parser.error("one size says nothing about growth; give two or more")
    sizes = [measure_size(samples, arguments) for samples in sorted(arguments.sizes)]
    results = {"sizes": sizes, "growth": verdicts(sizes)}
    show(results)
    # Named after the largest cache, so that a run of fewer rows replaces no run of more.
    write_outcome(arguments.output, "growth", vars(arguments), results, str(max(arguments.sizes)))


if __name__ == "__main__":
    main()
