"""What it costs to verify the checksum of every row that training reads.

    python benchmarks/read_checks.py --output read_checks.json

Trains both stages from a memory-mapped cache of the demo's pictures, with its tiny networks, in runs that take turns:
as always, and with a stand-in for the checksum that agrees with everything. Compares the CPU time of the steps, on one
thread, as it hardly moves when the machine is busy with other work; the wall time is shown beside it. Then measures
the check alone, on rows of the demo's size and of the published networks' size: its share of a step is what the ratio
would be without noise. Prints a table, says whether the check costs less than 5 % of a run, and writes JSON with the
hardware and the versions.

The demo's networks are the hard case: the published ones compute far more for each byte that they read.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
from awscrt.checksums import crc32c
from measuring.record import machine

from kcache.build.build import build_cache
from kcache.config import BuildConfig, TrainConfig
from kcache.demo.digits import SIDE, write_digits
from kcache.demo.tiny import demo_models
from kcache.training.trainer import train

Network = Literal["prior", "decoder"]
AIM = 0.05
"""What the check may cost, as a share of the run without it."""
DEMO_ROWS = {"prior": (128, 128, 8 * 128), "decoder": (128, 4 * 8 * 8 * 2)}
PUBLISHED_ROWS = {"prior": (2560, 2560, 17 * 2560), "decoder": (2560, 4 * 96 * 96 * 2)}
"""Bytes of the float16 rows that a sample of a stage reads, captions having 8 or 17 tokens."""
WIDTHS = (10, 18, 8, 13, 10, 8, 11)


class Agreeing:
    """A checksum that is what was expected, whatever that was."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


@contextmanager
def without_checks() -> Iterator[None]:
    """Rows are read as always, but for their checksums, which are neither computed nor compared."""
    agreeing = Agreeing()
    with patch("kcache.store.rows.crc32c", lambda *_: agreeing):
        yield


def step_seconds(stage: Network, cache: Path, output: Path, steps: int, batch_size: int) -> tuple[float, float]:
    """CPU and wall seconds per step of one run, its first steps, its start and its end left out."""
    seen: list[tuple[int, float, float]] = []
    config = TrainConfig(
        stage=stage, output_dir=str(output), residency="mmap", train_batch_size=batch_size, max_train_steps=steps,
        checkpointing_steps=steps + 1, report_to="none",
    )  # fmt: skip
    train(str(cache), config, report=lambda p: seen.append((p.step, time.process_time(), time.perf_counter())))
    (first, cpu, wall), (last, cpu_end, wall_end) = seen[0], seen[-1]
    return (cpu_end - cpu) / (last - first), (wall_end - wall) / (last - first)


def compare(stage: Network, cache: Path, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians over rounds of two runs each, one with the checks and one without; who goes first alternates."""
    ways: dict[str, Callable[[], AbstractContextManager[None]]] = {"checked": nullcontext, "unchecked": without_checks}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(arguments.rounds):
        for name in list(ways)[:: 1 if number % 2 else -1]:
            with ways[name]():
                run = folder / f"{stage}-{name}-{number}"
                seconds[name].append(step_seconds(stage, cache, run, arguments.steps, arguments.batch_size))
    pairs = list(zip(seconds["checked"], seconds["unchecked"], strict=True))
    cpu, wall = (sorted(with_[i] / without[i] for with_, without in pairs) for i in (0, 1))
    sample = statistics.median(c for c, _ in seconds["unchecked"]) / arguments.batch_size
    check = check_seconds(DEMO_ROWS[stage])
    return {
        "cpu_ratio": round(statistics.median(cpu), 4),
        "cpu_ratio_quartiles": [round(value, 4) for value in statistics.quantiles(cpu)],
        "wall_ratio": round(statistics.median(wall), 4),
        "cpu_seconds_per_sample": sample,
        "check_cpu_seconds_per_sample": check,
        "check_share": check / sample,
        "check_cpu_seconds_per_published_sample": check_seconds(PUBLISHED_ROWS[stage]),
    }


def check_seconds(row_bytes: tuple[int, ...], rounds: int = 9, count: int = 2000) -> float:
    """CPU seconds of the check of one sample's rows, as the reader does it: the median of some rounds."""
    # Each row lies elsewhere, as in a batch, and has just been copied there.
    rows = [np.random.default_rng(0).integers(0, 256, (count, size), np.uint8) for size in row_bytes]
    checksums = [[crc32c(row) for row in field] for field in rows]
    measured = []
    for _ in range(rounds):
        start = time.process_time()
        for field, expected in zip(rows, checksums, strict=True):
            for row, checksum in zip(field, expected, strict=True):
                if crc32c(row) != checksum:
                    raise AssertionError("a checksum changed while nothing was written")
        measured.append((time.process_time() - start) / count)
    return statistics.median(measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_digits(folder / "pictures", arguments.images)
        prior, decoder = demo_models(folder / "models")
        config = BuildConfig(
            resolution=(SIDE,), device="cpu",
            pretrained_prior_model_name_or_path=str(prior), pretrained_decoder_model_name_or_path=str(decoder),
        )  # fmt: skip
        build_cache(str(folder / "pictures"), str(folder / "cache"), config)
        stages: tuple[Network, ...] = ("prior", "decoder")
        results: dict[str, Any] = {stage: compare(stage, folder / "cache", folder, arguments) for stage in stages}
    show(results)
    if arguments.output:
        settings = {name: getattr(arguments, name) for name in ("images", "steps", "batch_size", "rounds")}
        report = {"benchmark": "read_checks", "machine": machine(), "settings": settings, "results": results}
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


def show(results: dict[str, dict[str, Any]]) -> None:
    """One line per stage, and the verdict."""
    names = zip(("CPU ratio", "quartiles", "wall", "CPU/sample", "check", "share", "published"), WIDTHS, strict=True)
    print(" " * 10 + "".join(f"{name:>{width}}" for name, width in names))
    for stage, row in results.items():
        low, _, high = row["cpu_ratio_quartiles"]
        times = [row[f"{name}_per_sample"] * 1e6 for name in ("cpu_seconds", "check_cpu_seconds")]
        times.append(row["check_cpu_seconds_per_published_sample"] * 1e6)
        print(f"{stage:10}{row['cpu_ratio']:>10.4f}{low:>9.4f}–{high:.4f}  {row['wall_ratio']:>7.4f}", end="")
        print(f"{times[0]:>10.0f} µs{times[1]:>7.1f} µs{row['check_share']:>8.3%}{times[2]:>8.1f} µs")
    cost = max(row["cpu_ratio"] for row in results.values()) - 1
    print(f"verifying every row costs {max(cost, 0):.1%} of a run; below {AIM:.0%}: {'yes' if cost < AIM else 'no'}")


if __name__ == "__main__":
    main()
