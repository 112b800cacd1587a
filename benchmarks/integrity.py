"""How fast a cache is verified, and what of thousands of faults goes unnoticed by reading and by verifying.

    python benchmarks/integrity.py --output integrity.json

Puts faults into a small cache of each form, one at a time: changed bits and bytes in every kind of file, every file cut
after each 64 bytes, emptied and removed. After each, the cache is read through Cache.read and CacheLoader and verified.
A fault is silent when reading gives a wrong value, or verifying finds nothing; faults that reading does not notice are
in what it does not use. Then verifies a synthetic cache of about a gigabyte that lies in the page cache, several times.
Prints a table and writes JSON with the hardware and the versions; exits with 1 when any fault was silent.
"""

import argparse
import json
import statistics
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

from faults import Sweep, cuts, flips, losses
from measuring.record import machine
from measuring.synthetic import write_synthetic_cache

from kcache.store.formats import FORMATS
from kcache.store.samples import Refusal
from kcache.upkeep.convert import convert_cache
from kcache.upkeep.verify import verify_cache

BYTES_PER_SAMPLE = 122_700
"""Of a synthetic cache at 768 pixels in float16: latents, two embeddings and 17 tokens."""


def sweep(folder: Path, form: str, flip_count: int, seed: int) -> dict[str, Any]:
    """Counts of faults in a small cache of a form, by kind of file, and those that went unnoticed."""
    refused = [Refusal(name="a.png", stage="decode", reason="the file is cut off")]
    write_synthetic_cache(folder / "zarr", 5, dim=4, latent_side=2, rows_per_shard=4, refused=refused)
    if form == "webdataset":
        convert_cache(folder / "zarr", folder / form, form, rows_per_shard=3)
    swept = Sweep(folder / form)
    for number, fault in enumerate(
        chain(flips(folder / form, flip_count, seed), cuts(folder / form), losses(folder / form))
    ):
        swept.put(fault, loader=number % 4 == 0)
    return {"kinds": swept.caught, "silent": swept.silent}


def speed(cache: Path, rounds: int) -> dict[str, float]:
    """Gigabytes and gigabytes per second of verifying a cache, the median of some rounds after a first one."""
    verify_cache(cache)
    results = [verify_cache(cache) for _ in range(rounds)]
    return {
        "gigabytes": round(results[0].bytes / 1e9, 3),
        "gigabytes_per_second": round(statistics.median(r.bytes / r.seconds for r in results) / 1e9, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=5000, help="changed bits and bytes per form (default 5000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the cache that is timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    arguments = parser.parse_args()
    faults, speeds = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for form in FORMATS:
            folder = Path(scratch) / f"small-{form}"
            folder.mkdir()
            faults[form] = sweep(folder, form, arguments.flips, arguments.seed)
            print_faults(form, faults[form])
        large = Path(scratch) / "large"
        write_synthetic_cache(large / "zarr", int(arguments.gigabytes * 1e9 / BYTES_PER_SAMPLE))
        convert_cache(large / "zarr", large / "webdataset", "webdataset")
        for form in FORMATS:
            speeds[form] = speed(large / form, arguments.rounds)
            print(f"{form}: verified at {speeds[form]['gigabytes_per_second']} GB/s")
    settings = {"flips": arguments.flips, "seed": arguments.seed, "rounds": arguments.rounds}
    report = {"benchmark": "integrity", "machine": machine(), "settings": settings, "faults": faults, "speed": speeds}
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    if silent := [fault for form in faults.values() for fault in form["silent"]]:
        raise SystemExit("\n".join(silent))


def print_faults(form: str, found: dict[str, Any]) -> None:
    """One line per kind of file."""
    print(f"{form:16}{'faults':>8}{'by reading':>12}{'by verifying':>14}")
    for kind, counts in sorted(found["kinds"].items()):
        print(f"  {kind:14}{counts['faults']:>8,}{counts['by reading']:>12,}{counts['by verifying']:>14,}")
    print(f"  silent: {len(found['silent'])}", flush=True)


if __name__ == "__main__":
    main()
