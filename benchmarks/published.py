"""A few steps of networks of the published size, from a cache and with the encoders in the loop; a CPU will do.

    python benchmarks/published.py --stage prior --output benchmarks/results
    python benchmarks/published.py --stage decoder --output benchmarks/results

Trains adapters, as a whole network with its optimizer fits no small machine, on a handful of pictures: builds the
cache, then trains twice, each time as a user would, with `train`. What is told of each is the seconds of its steps,
those of all of it, loading included, and the most memory that it took. The minutes that this takes leave no room for
rounds: on a busy machine only large differences mean anything. Weights are random, in bfloat16.
"""

import argparse
import gc
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring.device import forget_peak, peak_memory
from measuring.record import write_outcome
from measuring.workload import Workload, add_workload_arguments, open_workload

from kcache.config import TrainConfig
from kcache.training.trainer import train

WAYS = ("cached", "online")


def measure_way(arguments: argparse.Namespace, workload: Workload, cache: Path, way: str) -> dict[str, Any]:
    """One training of a few steps."""
    gc.collect()  # what was trained before refers to itself in circles
    forget_peak()
    with tempfile.TemporaryDirectory(dir=workload.folder) as output:
        config = TrainConfig(
            stage=arguments.stage, output_dir=output, train_batch_size=arguments.batch_size,
            max_train_steps=arguments.steps, lora_rank=arguments.lora_rank, report_to="none",
            mixed_precision=arguments.mixed_precision, online=str(workload.pictures) if way == "online" else None,
        )  # fmt: skip
        start = time.perf_counter()
        result = train(str(cache), config)
        seconds = time.perf_counter() - start
    return {
        "steps_seconds": round(result.seconds, 2), "seconds": round(seconds, 2), "loss": result.loss,
        "peak_memory_bytes": peak_memory(),
    }  # fmt: skip


def measure(arguments: argparse.Namespace, workload: Workload) -> dict[str, Any]:
    """The build, and both trainings."""
    start = time.perf_counter()
    cache = workload.cache(arguments.stage, arguments.resolution, arguments.batch_size, arguments.mixed_precision)
    build = time.perf_counter() - start
    ways = {way: measure_way(arguments, workload, cache, way) for way in WAYS}
    cached, online = (ways[way]["steps_seconds"] for way in WAYS)
    return {"build_seconds": round(build, 2), "ways": ways, "speed_up": round(online / cached, 2)}


def show(arguments: argparse.Namespace, results: dict[str, Any]) -> None:
    """Print what was measured."""
    print(f"{arguments.stage}, {arguments.steps} steps of {arguments.batch_size}; build {results['build_seconds']} s")
    for way, row in results["ways"].items():
        memory = "" if row["peak_memory_bytes"] is None else f", {row['peak_memory_bytes'] / 1e9:.1f} GB"
        print(f"{way:8}{row['steps_seconds']:>8} s of steps, {row['seconds']} s in all{memory}, loss {row['loss']:.5f}")
    print(f"cached steps are {results['speed_up']} times as fast")


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload_arguments(parser, images=4)
    parser.set_defaults(model_size="full", mixed_precision="bf16")
    parser.add_argument("--stage", choices=("prior", "decoder"), required=True)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--lora-rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output", type=Path, help="where to write the JSON: a file or a folder")
    arguments = parser.parse_args(given)
    with open_workload(arguments) as workload:
        results = measure(arguments, workload)
    show(arguments, results)
    write_outcome(arguments.output, "published", vars(arguments), results, arguments.stage)


if __name__ == "__main__":
    main()
