"""How fast one training step is, from a cache, with the encoders in the loop, and with no data to wait for at all.

    python benchmarks/train_step.py --stage prior --output benchmarks/results
    python benchmarks/train_step.py --stage decoder --model-size full --resolution 512 768 --batch-size 4 16 \\
        --mixed-precision bf16

All ways take the trainer's own step and take turns with one network and one optimizer. The learning rate is zero: the
arithmetic is the same, and every way sees the same weights, so that the losses of their first batches can be compared.

    cached             rows come from the cache, as they do unless told otherwise
    online             the encoders run in the loop, as with --online: decoded in --workers threads, ahead of the step
    online, in step    nothing is done ahead, and one thread decodes: what upstream's default of 0 workers comes to;
                       only with the first batch size, as decoding takes its time per image
    compute only       one batch that stays on the device: no step can be faster
    encoders only      the online loader with no step behind it: whether it could feed a faster one

For the prior, "packed" leaves padding out and "not packed" computes it, as upstream does. Waiting is the share of a
step that the loop spends in asking for its batch. On a GPU the loop runs ahead of the device, so the share of "compute
only" says more. Online batches are encoded in one call: the cache is built with the same batch size. With --model-size
tiny the networks are a scale model: what comes out is no speed of Kandinsky's.

With --levers the cached step alone is measured, plain and with what may make it faster (see `levers.py`), and where its
time goes (see `roofline.py`); online ways are left out.

On a CPU each way has the number of torch's threads that it is faster with, one or one per core, tried before it is
timed: threads that wait for each other spin, and take the cores that encoders in the loop need.
"""

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring.device import busy_share, forget_peak, peak_memory, synchronize
from measuring.levers import lever_ways
from measuring.record import write_outcome
from measuring.roofline import count_flops, peak_flops, time_by_kind
from measuring.upstream import time_upstream
from measuring.ways import COMPUTE, Way, cached_ways, online_ways
from measuring.workload import RESOLUTIONS, Workload, add_workload_arguments, open_workload

from kcache.config import TrainConfig
from kcache.loader.batches import PREFETCH_BATCHES, Batch
from kcache.machine import usable_cores
from kcache.training.run import TrainingRun
from kcache.training.setup import prepare_run

WARM_UP = PREFETCH_BATCHES + 2
"""Steps before a turn is timed: as many batches then wait as will in the end, and no way gains or owes any."""


class Watched:
    """Batches, with the seconds that were spent in waiting for them."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self.waited = 0.0

    def __iter__(self) -> "Watched":
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        batch = next(self._batches)
        self.waited += time.perf_counter() - start
        return batch


def first_look(way: Way) -> dict[str, Any]:
    """The loss of a way's first batch, and the most memory that its steps take."""
    forget_peak()
    batches, start = way.batches(), time.perf_counter()
    with way.within():
        loss, _ = way.step(batches)
        way.step(batches)
        synchronize()
    batches.close()
    seconds = time.perf_counter() - start
    return {"loss": float(loss), "peak_memory_bytes": peak_memory(), "first_steps_seconds": round(seconds, 1)}


def take_turn(way: Way, steps: int) -> tuple[float, float]:
    """Seconds of a step, and seconds of it that were spent in waiting for its batch."""
    steps = steps if way.ahead else max(1, steps // 5)
    batches = way.batches()
    watched = Watched(batches)
    with way.within():
        for _ in range(WARM_UP if way.ahead else 1):
            way.step(watched)
        synchronize()
        start, watched.waited = time.perf_counter(), 0.0
        for _ in range(steps):
            way.step(watched)
        synchronize()
        seconds = time.perf_counter() - start
    batches.close()
    return seconds / steps, watched.waited / steps


@contextmanager
def with_threads(count: int, way: Way) -> Iterator[None]:
    """What is set while `way` has its turn, and `count` threads for torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with way.within():
            yield
    finally:
        torch.set_num_threads(before)


def with_best_threads(ways: Sequence[Way], steps: int) -> list[Way]:
    """The ways with one thread or with all that torch takes, whichever is faster; on a GPU as they are.

    A cached way takes as many as computing alone, which is the same step.
    """
    if torch.cuda.is_available():
        return list(ways)
    best: dict[str, Way] = {}
    for way in ways:
        alone = best.get(way.name.replace("cached", COMPUTE))
        counts = {1, torch.get_num_threads()} if alone is None else {alone.threads or 1}
        tried = [replace(way, threads=count, within=partial(with_threads, count, way)) for count in sorted(counts)]
        best[way.name] = min(tried, key=lambda each: min(take_turn(each, steps)[0] for _ in range(2)))
    return list(best.values())


def gpu_busy(way: Way, steps: int = 4) -> float | None:
    """Share of the time in which the GPU has something to do; None on a CPU."""
    batches = way.batches()

    def work() -> None:
        for _ in range(steps if way.ahead else 1):
            way.step(batches)

    with way.within():
        for _ in range(WARM_UP if way.ahead else 1):
            way.step(batches)
        share = busy_share(work)
    batches.close()
    return share


def look_inside(ways: Sequence[Way], rows: dict[str, Any], peak: float | None) -> None:
    """Add to the rows of the ways, the plain cached one first, where a step's time goes and what arithmetic it does."""
    flops: dict[tuple[int, int], int] = {}
    for way in ways:
        if way.name not in rows or not way.name.startswith("cached"):
            continue
        batches = way.batches()
        step = partial(way.step, batches)
        size = way.draws, way.run.config.train_batch_size
        if size not in flops:
            flops[size] = count_flops(step)  # uncompiled, as a graph shows none of its own
        with way.within():
            step()
            spent = time_by_kind(step)
        batches.close()
        row, done = rows[way.name], flops[size]
        achieved = done / row["step_milliseconds"] * 1e3
        row["kernel_milliseconds"] = spent
        row["teraflops"] = round(achieved / 1e12, 3)
        row["of_peak"] = None if peak is None else round(achieved / peak, 3)


def measure_case(arguments: argparse.Namespace, workload: Workload, resolution: int, batch_size: int) -> dict[str, Any]:
    """All ways with one batch size, in turns."""
    cache = workload.cache(arguments.stage, resolution, batch_size, arguments.mixed_precision)
    with tempfile.TemporaryDirectory() as output:
        config = TrainConfig(
            stage=arguments.stage, output_dir=output, train_batch_size=batch_size, learning_rate=0.0,
            lora_rank=arguments.lora_rank, mixed_precision=arguments.mixed_precision,
            gradient_checkpointing=arguments.gradient_checkpointing, report_to="none",
        )  # fmt: skip
        run = prepare_run(str(cache), config)
    if arguments.levers:
        return measure_levers(arguments, run)
    ways = cached_ways(run)
    # Before the encoders are loaded: the memory of a cached run has none.
    looks = {way.name: first_look(way) for way in ways}
    in_step = batch_size == arguments.batch_size[0]
    online = online_ways(ways, workload.pictures, arguments.workers, in_step)
    looks |= {way.name: first_look(way) for way in online if way.trains}
    ways += online
    measured, turns = measure_ways(arguments, ways, looks)
    return {"ways": measured, "speed_up": speed_ups(turns)}


def measure_levers(arguments: argparse.Namespace, run: TrainingRun) -> dict[str, Any]:
    """The plain cached step and every lever, in turns; one that fails is left out, and said to have."""
    ways, looks, failed = [], {}, {}
    for way in lever_ways(run):
        try:
            looks[way.name] = first_look(way)
            take_turn(way, arguments.steps)  # not timed: batches of other sizes have graphs of their own to be made
            ways.append(way)
        except RuntimeError as error:  # no memory, or what torch.compile could not do
            failed[way.name] = " ".join(str(error).split())[:300]
    measured, turns = measure_ways(arguments, ways, looks)
    images = {way.name: way.run.config.train_batch_size for way in ways}
    turns = {name: [(step / images[name], waited) for step, waited in rounds] for name, rounds in turns.items()}
    look_inside(ways, measured, peak_flops(arguments.peak_tflops))
    plain = next(name for name in measured if name.startswith("cached"))
    return {"ways": measured, "speed_up": speed_ups(turns, plain), "failed": failed}


def measure_ways(
    arguments: argparse.Namespace, ways: Sequence[Way], looks: dict[str, dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, list[tuple[float, float]]]]:
    """A row of numbers for each way, and what they are medians of."""
    ways, batch_size = with_best_threads(ways, arguments.steps), ways[0].run.config.train_batch_size
    turns: dict[str, list[tuple[float, float]]] = {way.name: [] for way in ways}
    for _ in range(arguments.rounds):
        for way in ways:
            turns[way.name].append(take_turn(way, arguments.steps))
    measured = {
        way.name: summed_up(way, turns, batch_size)
        | looks.get(way.name, {})
        | {"gpu_busy_share": busy, "threads": way.threads}
        for way, busy in zip(ways, [gpu_busy(way) if torch.cuda.is_available() else None for way in ways], strict=True)
    }
    return measured, turns


def summed_up(way: Way, turns: dict[str, list[tuple[float, float]]], batch_size: int) -> dict[str, Any]:
    """A way's medians over the rounds, and round by round its speed as a share of computing alone on `batch_size`."""
    seconds = statistics.median(step for step, _ in turns[way.name])
    rate = way.run.config.train_batch_size / seconds
    speed = {"images_per_second": round(rate, 2), "step_milliseconds": round(seconds * 1e3, 2)}
    if way.draws > 1:
        speed["draws_per_second"] = round(rate * way.draws, 2)
    if not way.trains:
        return speed
    limit, more = turns[f"{COMPUTE}{way.packing}"], way.run.config.train_batch_size / batch_size
    shares = [more * best / step for (best, _), (step, _) in zip(limit, turns[way.name], strict=True)]
    waiting = statistics.median(waited / step for step, waited in turns[way.name])
    return speed | {"waiting_share": round(waiting, 4), "of_compute_only": round(statistics.median(shares), 3)}


def speed_ups(turns: dict[str, list[tuple[float, float]]], plain: str | None = None) -> dict[str, dict[str, float]]:
    """How many times faster each cached way is than each online way, by the first of its numbers: medians over rounds.

    With `plain`, a cached way, how many times faster than that one the others are.
    """
    names = {kind: [name for name in turns if name.startswith(kind)] for kind in ("cached", "online")}
    if plain is not None:
        names = {"cached": [name for name in names["cached"] if name != plain], "online": [plain]}
    return {
        fast: {
            slow: round(statistics.median(s / f for (f, _), (s, _) in zip(turns[fast], turns[slow], strict=True)), 2)
            for slow in names["online"]
        }
        for fast in names["cached"]
    }


def show(case: dict[str, Any]) -> None:
    """Print one case as a table."""
    side = f", {case['resolution']} pixels" if case["resolution"] else ""
    print(f"\n{case['stage']}{side}, batch size {case['batch_size']}, ", end="")
    print(f"LoRA rank {case['lora_rank']}" if case["lora_rank"] else "whole network")
    if "out_of_memory" in case:
        print("  out of memory")
        return
    print(f"{'':40}{'threads':>9}{'img/s':>10}{'draws/s':>10}{'ms':>10}", end="")
    print(f"{'waiting':>9}{'of limit':>10}{'GPU busy':>10}{'peak B':>9}{'loss':>10}")
    columns = {
        "threads": "9", "images_per_second": "10,.1f", "draws_per_second": "10,.1f", "step_milliseconds": "10,.1f",
        "waiting_share": "9.1%", "of_compute_only": "10.3f",
        "gpu_busy_share": "10.1%", "peak_memory_bytes": "9.2e", "loss": "10.5f",
    }  # fmt: skip
    for name, row in case["ways"].items():
        print(f"{name:40}", end="")
        for column, form in columns.items():
            value = row.get(column)
            print(" " * int(form.split(",")[0].split(".")[0]) if value is None else format(value, form), end="")
        print()
    for fast, rows in case["speed_up"].items():
        print(f"  {fast}: " + ", ".join(f"{factor}x on {slow}" for slow, factor in rows.items()))
    for name, row in case["ways"].items():
        if "kernel_milliseconds" in row:
            spent = ", ".join(f"{kind} {ms}" for kind, ms in row["kernel_milliseconds"].items())
            share = "" if row["of_peak"] is None else f", {row['of_peak']:.1%} of the peak"
            print(
                f"  {name}: ms of {spent}; {row['teraflops']} TFLOP/s{share}; {row['first_steps_seconds']} s to begin"
            )
    for name, reason in case.get("failed", {}).items():
        print(f"  {name} failed: {reason}")
    if "upstream" in case:
        print(f"  upstream's script: {case['upstream']}")


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload_arguments(parser, images=256)
    parser.add_argument("--stage", choices=("prior", "decoder"), required=True)
    parser.add_argument("--resolution", type=int, nargs="+", help="of the decoder; default 128, 768 with full")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[8])
    parser.add_argument("--lora-rank", type=int, help="train adapters of this rank instead of the network")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="decoding threads of the online ways")
    parser.add_argument("--steps", type=int, default=10, help="steps timed per turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--levers", action="store_true", help="measure what may make the cached step faster")
    parser.add_argument("--peak-tflops", type=float, help="of the device, for --levers; known of some GPUs")
    parser.add_argument(
        "--upstream-script", type=Path,
        help="your copy of diffusers' script for the stage: timed too, with the best of 0, 2 and --workers workers",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="where to write the JSON: a file or a folder")
    arguments = parser.parse_args(given)
    default = [RESOLUTIONS[arguments.model_size]]
    resolutions = arguments.resolution or default if arguments.stage == "decoder" else default
    shown = resolutions if arguments.stage == "decoder" else []
    part = "-".join(
        [
            arguments.stage, *map(str, shown), *([f"lora{arguments.lora_rank}"] if arguments.lora_rank else []),
            *(["levers"] if arguments.levers else []),
        ]
    )  # fmt: skip
    results: list[dict[str, Any]] = []
    with open_workload(arguments) as workload:
        for resolution in resolutions:
            for batch_size in arguments.batch_size:
                case: dict[str, Any] = {
                    "stage": arguments.stage, "resolution": resolution if shown else None, "batch_size": batch_size,
                    "lora_rank": arguments.lora_rank, "mixed_precision": arguments.mixed_precision,
                    "model_size": arguments.model_size, "workers": arguments.workers,
                }  # fmt: skip
                try:
                    case |= measure_case(arguments, workload, resolution, batch_size)
                except torch.OutOfMemoryError:
                    case["out_of_memory"] = True
                gc.collect()  # networks and optimizer refer to each other in circles
                if arguments.upstream_script is not None:
                    case["upstream"] = time_upstream(arguments, workload, resolution, batch_size)
                results.append(case)
                show(case)
                # After each case: one that takes too long costs no other.
                write_outcome(arguments.output, "train_step", vars(arguments), results, part)


if __name__ == "__main__":
    main()
