"""Whether a step that trains a decoder to fill holes takes as long as one that trains a plain decoder.

    python benchmarks/inpaint.py --output benchmarks/results
    python benchmarks/inpaint.py --model-size full --resolution 768 --batch-size 4 --mixed-precision bf16

Both read the same cache, each in the trainer's own step with a network and an optimizer of its own, and take turns: a
round is a turn of each, and what it comes to is the quotient of its two turns. Which one begins changes from round to
round. Beside the five more input channels a step of --inpaint has masks, which are drawn for it ahead, in the threads
that fill its batches: what the loop waits for them is told, and what drawing a batch of them takes in one thread. With
--model-size tiny the networks are a scale model, whose step is short beside the masks. Prints a table and a verdict,
and writes JSON.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from measuring.record import machine, write_outcome
from measuring.ways import Way, loader
from measuring.workload import RESOLUTIONS, Workload, add_workload_arguments, open_workload
from train_step import first_look, take_turn

from kcache.config import TrainConfig
from kcache.loader import draw_masks
from kcache.training.setup import prepare_run
from kcache.training.trainer import take_step

AIM = 1.03
"""What a step of --inpaint may take of a plain one."""


def way_of(cache: Path, folder: Path, arguments: argparse.Namespace, *, inpaint: bool) -> Way:
    """Training a decoder from `cache`, to fill holes or not; nothing is learned, so that all rounds do the same."""
    config = TrainConfig(
        stage="decoder", output_dir=str(folder), train_batch_size=arguments.batch_size, learning_rate=0.0,
        mixed_precision=arguments.mixed_precision, report_to="none", inpaint=inpaint,
    )  # fmt: skip
    run = prepare_run(str(cache), config)
    batches = loader(run, run.cache)
    name = "--inpaint" if inpaint else "plain"
    return Way(name=name, run=run, batches=batches.forever, step=partial(take_step, run))


def time_masks(batch_size: int, side: int, batches: int) -> float:
    """Seconds that drawing the masks of a batch takes in one thread; `side` is that of the latents."""
    start = perf_counter()
    for number in range(batches):
        draw_masks(0, np.arange(number * batch_size, (number + 1) * batch_size), side, side)
    return (perf_counter() - start) / batches


def measure(arguments: argparse.Namespace, workload: Workload) -> dict[str, Any]:
    """The turns of both ways, and the quotient of each round."""
    side = arguments.resolution or RESOLUTIONS[arguments.model_size]
    cache = workload.cache("decoder", side, arguments.batch_size, arguments.mixed_precision)
    with tempfile.TemporaryDirectory() as folder:
        ways = [way_of(cache, Path(folder), arguments, inpaint=inpaint) for inpaint in (False, True)]
    looks = {way.name: first_look(way) for way in ways}
    turns: dict[str, list[tuple[float, float]]] = {way.name: [] for way in ways}
    for number in range(arguments.rounds):
        for way in ways if number % 2 == 0 else reversed(ways):
            turns[way.name].append(take_turn(way, arguments.steps))
    of_plain = [filling / plain for (plain, _), (filling, _) in zip(*turns.values(), strict=True)]
    masks = time_masks(arguments.batch_size, side // 8, 2 * arguments.steps)
    return {
        "resolution": side,
        "ways": {name: summed_up(rounds) | looks[name] for name, rounds in turns.items()},
        "masks_milliseconds": round(masks * 1e3, 3),
        "of_plain": {
            "median": round(statistics.median(of_plain), 4), "rounds": [round(each, 4) for each in of_plain]
        },
    }  # fmt: skip


def summed_up(rounds: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Milliseconds of a step, the median and the fastest and slowest turn, and the share of it that is waited."""
    seconds = [step for step, _ in rounds]
    return {
        "milliseconds": round(statistics.median(seconds) * 1e3, 2),
        "milliseconds_range": [round(min(seconds) * 1e3, 2), round(max(seconds) * 1e3, 2)],
        "waiting_share": round(statistics.median(waited / step for step, waited in rounds), 5),
    }


def show(results: dict[str, Any]) -> None:
    """Print the table and the verdict."""
    print(f"{machine()['cpu']}, {results['resolution']} pixels\n{'':12}{'ms a step':>12}{'waiting':>10}{'loss':>10}")
    for name, row in results["ways"].items():
        low, high = row["milliseconds_range"]
        print(f"{name:12}{row['milliseconds']:>12,.1f}{row['waiting_share']:>10.2%}{row['loss']:>10.5f}", end="")
        print(f"   {low:,.1f} to {high:,.1f} ms")
    of = results["of_plain"]
    print(f"drawing the masks of a batch: {results['masks_milliseconds']:,.2f} ms in one thread, ahead of the step")
    print(f"{of['median']:.3f} of a plain step ({', '.join(f'{each:.3f}' for each in of['rounds'])})")
    print(f"at most {AIM}: {'yes' if of['median'] <= AIM else 'NO'}")


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload_arguments(parser, images=64)
    parser.add_argument("--resolution", type=int, help="pixels; default 128, 768 with --model-size full")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10, help="steps timed per turn")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="where to write the JSON: a file or a folder")
    arguments = parser.parse_args(given)
    with open_workload(arguments) as workload:
        results = measure(arguments, workload)
    show(results)
    write_outcome(arguments.output, "inpaint", vars(arguments), results)


if __name__ == "__main__":
    main()
