"""How a build by an engine grows with what it has: rows per second of `--engine ray` with 1, 2 and 4 slots of CPU.

    python benchmarks/engine.py --output benchmarks/results/engine-cpu.json

Its encoder sleeps for a while at each batch, as one that runs on a GPU waits for it: what is measured is how well the
engine keeps its actors at work, and not the cores of this machine. The rate is taken between commit records, when all
actors have begun and before any of them has nothing left. Every cache must have the bytes that one process writes.
Prints a table and writes JSON; exits with 1 when a cache differs.
"""

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import torch
from measuring.record import write_outcome

import kcache.engines.ray_builder
from kcache.build.build import build_cache
from kcache.config import BuildConfig
from kcache.demo.digits import SIDE, write_digits
from kcache.demo.tiny import demo_models
from kcache.engines import engine_of
from kcache.engines.actor import EncodingActor
from kcache.engines.tasks import Setup
from kcache.store.recipe import Recipe

BATCH = 4
WAIT = "KCACHE_BENCHMARK_WAIT"


class SleepingActor(EncodingActor):
    """One whose encoder takes its time."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._slow: set[int] = set()

    def _loaded(self, recipe: Recipe) -> Any:
        encoder, meter = super()._loaded(recipe)
        if id(encoder) not in self._slow:
            self._slow.add(id(encoder))
            encode, seconds = encoder.encode, float(os.environ[WAIT])

            def slowly(prepared: Any) -> Any:
                time.sleep(seconds)
                return encode(prepared)

            encoder.encode = slowly  # type: ignore[method-assign]
        return encoder, meter


def digest(cache: Path) -> str:
    """sha256 (hex) of the names and contents of a cache's files."""
    found = hashlib.sha256()
    for path in sorted(path for path in cache.rglob("*") if path.is_file()):
        found.update(path.relative_to(cache).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def rate(cache: Path, slots: int, rows: int) -> float:
    """Rows per second of the table of pictures, `rows` a shard, while all actors are at work."""
    [folder] = cache.glob("image_embeds-*")
    times = sorted(path.stat().st_mtime for path in folder.glob("0*.json"))
    first, last = 2 * slots, len(times) - slots - 1
    return (last - first) * rows / (times[last] - times[first])


def measured(pictures: Path, cache: Path, config: BuildConfig, slots: int) -> dict[str, float]:
    """One build with so many slots."""
    folder = tempfile.mkdtemp(prefix="kc-ray-", dir="/tmp")  # sockets have short paths
    ray.init(
        address="local", num_cpus=slots, num_gpus=0, include_dashboard=False, object_store_memory=80 << 20,
        log_to_driver=False, logging_level="ERROR", _temp_dir=folder,
    )  # fmt: skip
    try:
        start = time.perf_counter()
        build_cache(str(pictures), str(cache), config, engine=engine_of(str(pictures), config))
        seconds = time.perf_counter() - start
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    return {"rows_per_second": rate(cache, slots, config.rows_per_shard or 0), "seconds": seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--shards", type=int, default=24, help="of each slot")
    parser.add_argument("--batches", type=int, default=2, help="of a shard")
    parser.add_argument("--wait", type=float, default=0.5, help="seconds that the encoder sleeps at a batch")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # and so of every actor: a slot is a core
    os.environ[WAIT] = str(arguments.wait)
    kcache.engines.ray_builder.EncodingActor = SleepingActor  # type: ignore[attr-defined]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ["KCACHE_HOME"] = str(folder / "home")
        prior, _ = demo_models(folder / "models")
        for slots in arguments.slots:
            pictures, rows = folder / f"pictures-{slots}", BATCH * arguments.batches
            write_digits(pictures, arguments.shards * slots * rows)
            settings: dict[str, Any] = {
                "stage": "prior", "resolution": (SIDE,), "batch_size": BATCH, "rows_per_shard": rows,
                "num_workers": 1, "pretrained_prior_model_name_or_path": str(prior),
            }  # fmt: skip
            cache, alone = folder / f"cache-{slots}", folder / f"alone-{slots}"
            found = measured(pictures, cache, BuildConfig(engine="ray", **settings), slots)
            build_cache(str(pictures), str(alone), BuildConfig(**settings))
            one = results.get(str(arguments.slots[0]), found)["rows_per_second"] / arguments.slots[0]
            found |= {"of_linear": found["rows_per_second"] / one / slots, "same_bytes": digest(cache) == digest(alone)}
            results[str(slots)] = found
            print(f"{slots} slots: {found['rows_per_second']:.2f} rows/s, {found['of_linear']:.3f} of linear, "
                  f"{found['seconds']:.1f} s, {'same' if found['same_bytes'] else 'OTHER'} bytes")  # fmt: skip
    write_outcome(arguments.output, "engine", vars(arguments), results)
    return 0 if all(found["same_bytes"] for found in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
