"""What kcache takes at scale: opening a large cache, its first batch, its report, and a build with nothing to do.

    python benchmarks/scale.py --output scale.json

Writes two caches without encoders. One has a million samples of tiny rows; fresh processes open it, read batches, write
its report, and note seconds and memory. The other is of a folder of 100,000 one-pixel images; `kcache cache-build` then
finds nothing to do, twice: with the digests of the images remembered, as they are from the first build on, and without.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from measuring.record import machine
from measuring.synthetic import random_rows, write_synthetic_cache

from kcache.build.build import build_cache
from kcache.build.plan import plan_table
from kcache.build.survey import survey
from kcache.config import BuildConfig
from kcache.demo.tiny import demo_models
from kcache.encoders.recipes import default_rows_per_shard
from kcache.store.shards import commit_shard

OPEN = """
import json, sys, time
start = time.perf_counter()
from kcache import Cache
imported = time.perf_counter()
cache = Cache.open(sys.argv[1])
opened = time.perf_counter()
lines = open("/proc/self/status").read().splitlines()
memory = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
print(json.dumps({"import_seconds": imported - start, "open_seconds": opened - imported,
    "samples": len(cache), "peak_memory_bytes": memory}))
"""

LOAD = """
import json, sys, time
from itertools import islice
from kcache import Cache
from kcache.loader import CacheLoader

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

cache = Cache.open(sys.argv[1])
before = anonymous()
start = time.perf_counter()
batches = CacheLoader(cache, sys.argv[3].split(","), 64, residency="mmap", shuffle=sys.argv[2]).forever()
next(batches)
first = time.perf_counter() - start
memory = []
for _ in range(5):
    for batch in islice(batches, 400):
        pass
    memory.append(anonymous() - before)
print(json.dumps({"first_batch_seconds": first, "memory_bytes_after_400_batches_each": memory}))
"""


REPORT = """
import json, sys, time

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

from kcache.report.cache import ReportConfig
from kcache.report.write import write_report
imported = peak()
start = time.perf_counter()
write_report(ReportConfig(path=sys.argv[1], output=sys.argv[2]))
print(json.dumps({"report_seconds": time.perf_counter() - start, "imported_memory_bytes": imported,
    "peak_memory_bytes": peak()}))
"""


def fresh(script: str, *arguments: str) -> dict[str, Any]:
    """What `script` prints in a process of its own."""
    command = [sys.executable, "-c", script, *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_large(scratch: Path, samples: int) -> dict[str, Any]:
    """Opening a cache of `samples` rows, its first batch, and memory while batches are read."""
    folder = scratch / "large"
    start = time.perf_counter()
    write_synthetic_cache(folder, samples, dim=8, latent_side=2, rows_per_shard=50_000)
    results: dict[str, Any] = {"samples": samples, "write_seconds": time.perf_counter() - start}
    results["open"] = [fresh(OPEN, str(folder)) for _ in range(3)]
    fields = "image_embeds,text_embeds,text_encoder_hidden_states"
    for shuffle in ("full", "block"):
        results[f"loader, {shuffle} shuffle"] = fresh(LOAD, str(folder), shuffle, fields)
    results["report"] = fresh(REPORT, str(folder), str(scratch / "report.html"))
    return results


def write_pictures(folder: Path, count: int) -> None:
    """`count` different one-pixel images with a caption each, 1,000 to a folder."""
    for i in range(count):
        if i % 1000 == 0:
            (folder / f"{i // 1000:03d}").mkdir(parents=True)
        name = folder / f"{i // 1000:03d}" / f"{i % 1000:03d}"
        name.with_suffix(".ppm").write_bytes(b"P6\n# %d\n1 1 255\n\0\0\0" % i)
        name.with_suffix(".txt").write_text(f"picture {i}")


def fill(source: Path, cache: Path, config: BuildConfig) -> None:
    """Commit random rows for everything that a build of `source` would encode."""
    job = survey(str(source), cache, config, lambda _: None)
    rng = np.random.default_rng(0)
    for name, recipe in job.recipes.items():
        folder = cache / recipe.directory
        folder.mkdir(parents=True)
        rows_per_shard = default_rows_per_shard(recipe)
        plan = plan_table(recipe, job.wanted(name), (), (), rows_per_shard=rows_per_shard, first_shard=0)
        for shard in plan.shards:
            rows = random_rows(recipe, shard.keys, rng)
            commit_shard(folder, shard.name, recipe, rows, provenance={"made by": "numpy"})


def measure_rebuild(scratch: Path, samples: int) -> dict[str, Any]:
    """`kcache cache-build` of `samples` images that are all in the cache."""
    source, cache = scratch / "pictures", scratch / "cache"
    write_pictures(source, samples)
    prior, decoder = demo_models(scratch / "models")
    config = BuildConfig(
        resolution=(32,),
        pretrained_prior_model_name_or_path=str(prior),
        pretrained_decoder_model_name_or_path=str(decoder),
        device="cpu",
    )
    fill(source, cache, config)
    time.sleep(2.5)  # younger files are not remembered
    build_cache(str(source), str(cache), config)
    command: list[str | Path] = [
        Path(sys.executable).parent / "kcache", "cache-build", source, cache, "--resolution", "32", "--json",
        "--pretrained-prior-model-name-or-path", prior, "--pretrained-decoder-model-name-or-path", decoder,
    ]  # fmt: skip
    results: dict[str, Any] = {"samples": samples}
    for name, extra in (("remembered", []), ("rehashed", ["--rehash"])):
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        ran = subprocess.run([*command, *extra], check=True, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        results[f"{name}_seconds"] = time.perf_counter() - start
        results[f"{name}_cpu_seconds"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        built = json.loads(ran.stdout)
        assert built["samples"] == samples  # noqa: S101
        assert not any(table["encoded"] for table in built["tables"].values())  # noqa: S101
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000, help="of the cache that is opened and read")
    parser.add_argument("--pictures", type=int, default=100_000, help="of the source that is built again")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["KCACHE_HOME"] = scratch
        results = {
            "large cache": measure_large(Path(scratch), arguments.samples),
            "nothing to do": measure_rebuild(Path(scratch), arguments.pictures),
        }
    report = {"benchmark": "scale", "machine": machine(), "results": results}
    print(json.dumps(results, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
