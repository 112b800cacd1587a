"""What looking after a cache of many samples takes: time, and memory that no file gives back, for each sample.

    python benchmarks/upkeep.py --sizes 1200000 1800000 --output benchmarks/results

Caches of tiny random rows are read, converted, merged, cleared up and verified, each in a process of its own. Bytes a
sample are the difference between the two sizes: what would be needed for a hundred million, as far as it goes on like
that. Both are beyond the million samples from which on the list of them is mapped from a file. Tars are planned and not
written, which takes hours for as many.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring.record import write_outcome
from measuring.synthetic import write_synthetic_cache

from kcache.upkeep.convert import convert_cache
from kcache.upkeep.copying import CacheCopier, read_contents
from kcache.upkeep.garbage import collect_garbage
from kcache.upkeep.merge import merge_caches
from kcache.upkeep.verify import verify_cache

SHARD = 50_000
"""Rows in a shard."""
MANY = 100_000_000
LOOK_SECONDS = 0.01
STEPS: dict[str, Callable[[Path, Path], Any]] = {
    "read": lambda cache, _: read_contents(cache),
    "plan of tars": lambda cache, new: CacheCopier(read_contents(cache), new, "webdataset").plan(SHARD),
    "convert": lambda cache, new: convert_cache(cache, new, "zarr", stage="decoder", rows_per_shard=SHARD),
    "merge": lambda cache, new: merge_caches(new, [cache, cache]),
    "gc": lambda cache, _: collect_garbage(cache, dry_run=True),
    "verify": lambda cache, _: verify_cache(cache),
}


def memory() -> int:
    """What this process has of memory that no file gives back."""
    told = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(told["RssAnon"].split()[0]) << 10


def measure(step: str, cache: Path) -> dict[str, float]:
    """Seconds of a step, and the most memory that it had beside what it began with."""
    begin, most, ended = memory(), 0, threading.Event()

    def look() -> None:
        nonlocal most
        while not ended.wait(LOOK_SECONDS):
            most = max(most, memory())

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=cache.parent) as folder:
        kept = STEPS[step](cache, Path(folder) / "new")
        most = max(most, memory())
        del kept
        seconds = time.perf_counter() - start
    ended.set()
    watcher.join()
    return {"seconds": seconds, "bytes": float(most - begin)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs=2, default=[1_200_000, 1_800_000])
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), help="leave out the other steps")
    parser.add_argument("--step", nargs=2, metavar=("STEP", "CACHE"), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="where to write the JSON: a file or a folder")
    arguments = parser.parse_args()
    if arguments.step:
        step, cache = arguments.step
        print(json.dumps(measure(step, Path(cache))))
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for samples in arguments.sizes:
            write_synthetic_cache(
                Path(scratch) / str(samples), samples, dim=4, latent_side=1, rows_per_shard=min(SHARD, samples // 4)
            )
        few, many = arguments.sizes
        for step in arguments.only:
            found = {}
            for samples in arguments.sizes:
                words = [sys.executable, __file__, "--step", step, str(Path(scratch) / str(samples))]
                ran = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
                found[samples] = json.loads(ran.stdout)
            each = {what: (found[many][what] - found[few][what]) / (many - few) for what in ("bytes", "seconds")}
            results[step] = {"sizes": found, "bytes_per_sample": each["bytes"], "seconds_per_sample": each["seconds"]}
            print(
                f"{step}: {each['bytes']:,.0f} bytes a sample, {each['bytes'] * MANY / 1e9:,.1f} GB for {MANY:,}; "
                f"{found[many]['seconds']:,.1f} s for {many:,}",
                flush=True,
            )
    write_outcome(arguments.output, "upkeep", vars(arguments), results, str(arguments.sizes[1]))


if __name__ == "__main__":
    main()
