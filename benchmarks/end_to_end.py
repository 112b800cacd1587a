"""What a cache costs and saves over a whole training: building and training from it, against encoders in the loop.

    python benchmarks/end_to_end.py --stage prior --price 2.50 --output benchmarks/results

Builds the cache, and trains for some epochs and for twice as many, from the cache and with the encoders in the loop,
each as a user would: `build_cache` and `train`, with the networks loaded and the result saved. The difference of the
two trainings is what epochs cost; the rest is paid once, around them. The ways take turns. For the prior there is a
third one, "online, not packed", which computes padding as upstream does.

From that follow the epoch after which the cache has paid for itself, and the cost of an epoch at a price per hour.
Both, and the totals for other numbers of epochs, are extrapolated linearly: every epoch is taken to last equally long.
With --model-size tiny the networks are a scale model: no statement on Kandinsky.
"""

import argparse
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring.record import write_outcome
from measuring.workload import RESOLUTIONS, Workload, add_workload_arguments, open_workload

from kcache.build.build import build_cache
from kcache.config import TrainConfig
from kcache.training.trainer import train

EXTRAPOLATED = (1, 2, 3, 5, 10, 50, 100)
"""Numbers of epochs for which totals are told."""
WAYS = {"prior": ("cached", "online", "online, not packed"), "decoder": ("cached", "online")}


def time_build(workload: Workload, arguments: argparse.Namespace, cache: Path) -> float:
    """Seconds of a whole build."""
    config = workload.build_config(
        arguments.stage, arguments.resolution, arguments.batch_size, arguments.mixed_precision
    )
    start = time.perf_counter()
    build_cache(str(workload.pictures), str(cache), config)
    return time.perf_counter() - start


def time_training(
    workload: Workload, arguments: argparse.Namespace, cache: Path, way: str, epochs: int
) -> tuple[float, float]:
    """Seconds of a whole training, and its last loss."""
    steps = math.ceil(epochs * workload.images / arguments.batch_size)
    with tempfile.TemporaryDirectory(dir=workload.folder) as output:
        config = TrainConfig(
            stage=arguments.stage, output_dir=output, train_batch_size=arguments.batch_size, max_train_steps=steps,
            online=str(workload.pictures) if way.startswith("online") else None, packing="not packed" not in way,
            lora_rank=arguments.lora_rank, mixed_precision=arguments.mixed_precision, learning_rate=1e-5,
            checkpointing_steps=steps + 1, report_to="none",
        )  # fmt: skip
        start = time.perf_counter()
        loss = train(str(cache), config).loss
        return time.perf_counter() - start, loss or math.nan


def time_epochs(workload: Workload, arguments: argparse.Namespace, cache: Path, way: str) -> dict[str, float]:
    """Seconds of an epoch, seconds around all epochs, and the last loss."""
    some, _ = time_training(workload, arguments, cache, way, arguments.epochs)
    twice, loss = time_training(workload, arguments, cache, way, 2 * arguments.epochs)
    return {"epoch": (twice - some) / arguments.epochs, "around": 2 * some - twice, "loss": loss}


def measure(workload: Workload, arguments: argparse.Namespace) -> tuple[float, dict[str, dict[str, float]]]:
    """Seconds of the build, and what `time_epochs` says of each way, medians over the rounds."""
    builds: list[float] = []
    trained: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS[arguments.stage]}
    with tempfile.TemporaryDirectory(dir=workload.folder) as scratch:
        cache = Path(scratch) / "cache"
        for _ in range(arguments.rounds):
            shutil.rmtree(cache, ignore_errors=True)
            builds.append(time_build(workload, arguments, cache))
            if len(builds) == 1:
                time_training(workload, arguments, cache, "cached", 1)  # the first one in a process waits for imports
            for way, runs in trained.items():
                runs.append(time_epochs(workload, arguments, cache, way))
    medians = {
        way: {name: statistics.median(run[name] for run in runs) for name in runs[0]} for way, runs in trained.items()
    }
    return statistics.median(builds), medians


def break_even(build: float, cached: dict[str, float], online: dict[str, float]) -> float | None:
    """Epochs after which building and training from the cache take as long as training online; None: never."""
    saved = online["epoch"] - cached["epoch"]
    return max(0.0, (build + cached["around"] - online["around"]) / saved) if saved > 0 else None


def totals(build: float, ways: dict[str, dict[str, float]]) -> dict[str, dict[int, float]]:
    """Seconds of some numbers of epochs, start and end included, and with a cache the build."""
    return {
        way: {
            epochs: round((build if way == "cached" else 0.0) + row["around"] + epochs * row["epoch"], 2)
            for epochs in EXTRAPOLATED
        }
        for way, row in ways.items()
    }


def concluded(build: float, ways: dict[str, dict[str, float]], price: float | None) -> dict[str, Any]:
    """What follows from the seconds measured; see the module's text."""
    even = {way: break_even(build, ways["cached"], row) for way, row in ways.items() if way != "cached"}
    return {
        "build_seconds": round(build, 3),
        "ways": {
            way: {
                "epoch_seconds": round(row["epoch"], 4),
                "around_seconds": round(row["around"], 3),
                "loss": row["loss"],
                "epoch_cost": None if price is None else row["epoch"] / 3600 * price,
            }
            for way, row in ways.items()
        },
        "break_even_epochs": {way: None if epochs is None else round(epochs, 2) for way, epochs in even.items()},
        "extrapolated_seconds": totals(build, ways),
    }


def show(results: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Print what was measured, then what follows."""
    print(
        f"measured: {arguments.images} images, {arguments.epochs} epochs; the build took {results['build_seconds']} s"
    )
    print(f"{'':22}{'epoch s':>10}{'around s':>10}{'loss':>10}{'cost of an epoch':>20}")
    for way, row in results["ways"].items():
        cost = "" if row["epoch_cost"] is None else f"{row['epoch_cost']:.3g}"
        print(f"{way:22}{row['epoch_seconds']:>10}{row['around_seconds']:>10}{row['loss']:>10.5f}{cost:>20}")
    print("extrapolated linearly, seconds of a training with its build:")
    print(f"{'epochs':22}" + "".join(f"{epochs:>10}" for epochs in EXTRAPOLATED))
    for way, row in results["extrapolated_seconds"].items():
        print(f"{way:22}" + "".join(f"{seconds:>10,.1f}" for seconds in row.values()))
    for way, epochs in results["break_even_epochs"].items():
        when = "never" if epochs is None else f"after {epochs} epochs"
        print(f"against {way}, the cache has paid for itself {when}")


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload_arguments(parser, images=128)
    parser.add_argument("--stage", choices=("prior", "decoder"), required=True)
    parser.add_argument("--resolution", type=int, help="default 128, 768 with --model-size full")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lora-rank", type=int, help="train adapters of this rank instead of the network")
    parser.add_argument("--epochs", type=int, default=2, help="passes over the images in the shorter training")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--price", type=float, help="of an hour of this machine, in whatever money")
    parser.add_argument("--output", type=Path, help="where to write the JSON: a file or a folder")
    arguments = parser.parse_args(given)
    arguments.resolution = arguments.resolution or RESOLUTIONS[arguments.model_size]
    with open_workload(arguments) as workload:
        results = concluded(*measure(workload, arguments), arguments.price)
    show(results, arguments)
    write_outcome(arguments.output, "end_to_end", vars(arguments), results, arguments.stage)


if __name__ == "__main__":
    main()
