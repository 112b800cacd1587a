"""Whether training on buckets of shapes is as fast as the areas of its pictures say, and waits for no loader.

    python benchmarks/shapes.py --output benchmarks/results

Writes a cache of random rows in buckets, at two resolutions and with mirrored pictures, that has as many pictures of
each proportion as a collection of photos may have. Then it trains the decoder for some epochs on the buckets of the
first resolution, and foretells the seconds of each twice:

    by passes   each pass takes what one of its shape and size takes alone, over and over, on a batch that is there
    by area     each pixel of a pass takes what one takes alone in the square, as in a cache of squares

Passes alone are timed before and after each epoch, and the mean of the two is what foretells it: so what else the
machine does hits both. At last it says what share of its time the loop spends in asking for its batches, for each
residency, with mirrored pictures and with two resolutions, in passes whose first ones are not timed. Networks are a
scale model unless --model-size says otherwise. Prints tables and two verdicts, and writes JSON.
"""

import argparse
import os
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal
from unittest import mock

import torch
from measuring.device import device_kind, synchronize
from measuring.models import SIZES, read_configs, write_models
from measuring.record import machine, write_outcome
from measuring.synthetic import write_synthetic_cache
from measuring.ways import same_batch
from train_step import WARM_UP, Watched

from kcache import Cache
from kcache.config import TrainConfig
from kcache.config.shapes import auto_set
from kcache.errors import KcacheError
from kcache.loader.batches import Batch
from kcache.machine import default_device
from kcache.training.run import TrainingRun
from kcache.training.setup import _make_loader, prepare_run
from kcache.training.trainer import take_step

PROPORTIONS = {(3, 2): 17, (4, 3): 12, (2, 3): 6, (1, 1): 6, (3, 4): 4, (16, 9): 2, (21, 9): 1}
"""Width to height of photos, and how many of 48 have it: a guess at what people have, no count."""
LONG_SIDE = 4032
STEP = 64
"""Pixels that the sides of shapes are multiples of."""
AIM = 1.05
"""What an epoch may take of the seconds that its passes foretell."""
WAITING_AIM = 0.01
KINDS = ("one resolution", "with mirrored pictures", "two resolutions, mirrored")

Residency = Literal["ram", "mmap", "stream", "gpu"]
Size = tuple[int, int, int]
"""Samples, height and width in pixels of a pass."""


def sizes() -> list[tuple[int, int]]:
    """Widths and heights of 48 photos, each proportion spread over them."""
    listed = sorted(
        ((number + 0.5) / count, pair) for pair, count in PROPORTIONS.items() for number in range(count)
    )  # fmt: skip
    return [(LONG_SIDE * wide // max(wide, tall), LONG_SIDE * tall // max(wide, tall)) for _, (wide, tall) in listed]


def open_kind(folder: Path, kind: str, resolutions: Sequence[int]) -> Cache:
    """The cache as `kind` reads it: of some `resolutions`, ascending, all or the first."""
    chosen = resolutions if kind == "two resolutions, mirrored" else resolutions[:1]
    return Cache.open(folder, tuple(chosen), None, kind != "one resolution")


def run_of(run: TrainingRun, cache: Cache, residency: Residency) -> TrainingRun:
    """The run on another cache, with the loader that the trainer would make; network and optimizer are the same."""
    config = replace(run.config, residency=residency, shuffle="stream" if residency == "stream" else "full")
    return replace(
        run, config=config, cache=cache, loader=_make_loader(cache, run.raw_objective, config, run.accelerator)
    )


def size_of(batch: Batch) -> Size:
    samples, _, height, width = batch["latents"].shape
    return samples, 8 * height, 8 * width


class Counted(Watched):
    """Batches, with the seconds that were spent in waiting for them, and how many there were of each size."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        super().__init__(batches)
        self.sizes: Counter[Size] = Counter()

    def __next__(self) -> Batch:
        batch = super().__next__()
        self.sizes[size_of(batch)] += 1
        return batch


def time_passes(run: TrainingRun, batches: Counted, passes: int) -> tuple[float, float]:
    """Seconds of so many passes, and their mean loss."""
    losses = []
    synchronize()
    start = perf_counter()
    for _ in range(passes):
        losses.append(take_step(run, batches)[0])
    synchronize()
    return perf_counter() - start, float(torch.stack(losses).mean())


def a_batch_of_each(run: TrainingRun) -> dict[Size, Batch]:
    """One batch of every size that passes of an epoch have, the largest area first; the loader stands as before."""
    begun, found = run.loader.standing, dict[Size, Batch]()
    with closing(run.loader.forever()) as batches:
        while len(found) < len(run.loader.shapes):
            batch = next(batches)
            found.setdefault(size_of(batch), batch)
    run.loader.standing = begun
    return dict(sorted(found.items(), key=lambda pair: -area(pair[0])))


def area(size: Size) -> int:
    """Pixels of a pass."""
    samples, height, width = size
    return samples * height * width


def time_alone(run: TrainingRun, ready: Mapping[Size, Batch], steps: int) -> dict[Size, float]:
    """Seconds of a pass of each size, one size after the other; the first pass of each is not timed."""
    found = {}
    for size, batch in ready.items():
        batches = Counted(same_batch(batch))
        take_step(run, batches)
        found[size] = time_passes(run, batches, steps)[0] / steps
    return found


def measure_epochs(run: TrainingRun, square: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Epochs and what foretells them, in turns: how long both are, and the quotient of each round."""
    ready = a_batch_of_each(run)
    alone, epochs = [time_alone(run, ready, arguments.steps)], []
    (squares,) = [size for size in ready if size[1:] == (square, square)]
    with closing(run.loader.forever()) as batches:
        for epoch in range(arguments.rounds):
            counted = Counted(batches)
            seconds, loss = time_passes(run, counted, run.loader.batches_until(epoch + 1))
            alone.append(time_alone(run, ready, arguments.steps))
            taken = {size: (alone[-1][size] + alone[-2][size]) / 2 for size in ready}
            pixel = taken[squares] / area(squares)
            epochs.append(
                {
                    "passes": counted.sizes.total(),
                    "seconds": round(seconds, 3),
                    "by_passes_seconds": round(sum(n * taken[size] for size, n in counted.sizes.items()), 3),
                    "by_area_seconds": round(sum(n * area(size) * pixel for size, n in counted.sizes.items()), 3),
                    "waiting_share": round(counted.waited / seconds, 5),
                    "loss": round(loss, 5),
                }
            )
    of = {way: [epoch["seconds"] / epoch[f"{way}_seconds"] for epoch in epochs] for way in ("by_passes", "by_area")}
    return {
        "shapes": [told(shape, ready, alone) for shape in run.loader.shapes],
        "epochs": epochs,
        "of_foretold": {
            way: {"median": round(statistics.median(found), 4), "rounds": [round(each, 4) for each in found]}
            for way, found in of.items()
        },
    }


def told(shape: dict[str, Any], ready: Mapping[Size, Batch], alone: Sequence[Mapping[Size, float]]) -> dict[str, Any]:
    """What there is of a shape, and its passes alone: the median of all turns, and the fastest and slowest turn."""
    size = next(size for size in ready if list(size[1:]) == shape["shape"])
    seconds = [turn[size] for turn in alone]
    middle = statistics.median(seconds)
    return shape | {
        "milliseconds": round(middle * 1e3, 2),
        "milliseconds_range": [round(min(seconds) * 1e3, 2), round(max(seconds) * 1e3, 2)],
        "nanoseconds_per_pixel": round(middle / area(size) * 1e9, 1),
    }


def measure_waits(run: TrainingRun, folder: Path, resolutions: Sequence[int], passes: int) -> dict[str, dict[str, Any]]:
    """By residency and kind of cache, what the loop waits for in so many passes; a way that fails says why."""
    found: dict[str, dict[str, Any]] = {}
    residencies: list[Residency] = ["ram", "mmap", "stream"]
    if device_kind() == "gpu":
        residencies.append("gpu")
    for kind in KINDS:
        for residency in residencies:
            try:
                row = measure_wait(run_of(run, open_kind(folder, kind, resolutions), residency), passes)
            except (KcacheError, RuntimeError) as error:
                row = {"failed": " ".join(str(error).split())[:300]}
            found.setdefault(kind, {})[residency] = row
    return found


def measure_wait(run: TrainingRun, passes: int) -> dict[str, Any]:
    with closing(run.loader.forever()) as batches:
        time_passes(run, Counted(batches), WARM_UP)
        counted = Counted(batches)
        seconds, loss = time_passes(run, counted, passes)
    return {
        "waiting_share": round(counted.waited / seconds, 5),
        "milliseconds": round(seconds / passes * 1e3, 2),
        "sizes": len(counted.sizes),
        "loss": round(loss, 5),
    }


def show(results: dict[str, Any]) -> None:
    """Print the tables and the verdicts."""
    print(f"{machine()['cpu']}\n{'height x width':16}{'pictures':>10}{'a pass':>8}{'ms alone':>10}{'ns a pixel':>12}")
    for row in results["shapes"]:
        low, high = row["milliseconds_range"]
        named = " x ".join(map(str, row["shape"]))
        print(f"{named:16}{row['samples']:>10}{row['batch']:>8}{row['milliseconds']:>10,.1f}", end="")
        print(f"{row['nanoseconds_per_pixel']:>12,.1f}   {low:,.1f} to {high:,.1f} ms")
    print(f"{'epoch':8}{'passes':>8}{'seconds':>10}{'by passes':>11}{'by area':>10}{'waiting':>10}{'loss':>10}")
    for number, row in enumerate(results["epochs"]):
        print(f"{number:<8}{row['passes']:>8}{row['seconds']:>10,.2f}{row['by_passes_seconds']:>11,.2f}", end="")
        print(f"{row['by_area_seconds']:>10,.2f}{row['waiting_share']:>10.2%}{row['loss']:>10.5f}")
    of = results["of_foretold"]
    for way, found in of.items():
        rounds = ", ".join(f"{each:.3f}" for each in found["rounds"])
        print(f"an epoch takes {found['median']:.3f} of the seconds foretold {way.replace('_', ' ')} ({rounds})")
    for kind, rows in results["waits"].items():
        for residency, row in rows.items():
            if "failed" in row:
                print(f"{kind}, {residency}: failed: {row['failed']}")
                continue
            print(
                f"{kind}, {residency}: waits {row['waiting_share']:.2%} of a pass of {row['milliseconds']:,.1f} ms, ",
                end="",
            )
            print(f"{row['sizes']} sizes, loss {row['loss']:.5f}")
    print(f"at most {AIM} by passes: {'yes' if of['by_passes']['median'] <= AIM else 'NO'}")
    rows = [row for kind in results["waits"].values() for row in kind.values()]
    waits = all(row.get("waiting_share", 1.0) <= WAITING_AIM for row in [*rows, *results["epochs"]])
    print(f"waits at most {WAITING_AIM:.0%} everywhere: {'yes' if waits else 'NO'}")


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything, in a folder that is kept or not."""
    os.environ.setdefault("KCACHE_HOME", str(folder / "home"))
    size, resolutions = arguments.model_size, sorted(arguments.resolution)
    prior, decoder = write_models(folder / size, size, default_device())
    unet = read_configs(size)["unet"]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        cache = Path(scratch) / "cache"
        write_synthetic_cache(
            cache, arguments.images, dim=unet["encoder_hid_dim"], tables=("image_embeds", "latents"), sizes=sizes(),
            sets=[auto_set(resolution, STEP, None) for resolution in resolutions], flip=True,
        )  # fmt: skip
        config = TrainConfig(
            stage="decoder", output_dir=str(Path(scratch) / "run"), train_batch_size=arguments.batch_size,
            residency="ram", mixed_precision=arguments.mixed_precision, learning_rate=0.0, report_to="none",
            pretrained_prior_model_name_or_path=str(prior), pretrained_decoder_model_name_or_path=str(decoder),
        )  # fmt: skip
        # No encoder made these rows.
        with mock.patch("kcache.training.setup.check_cache_fits"):
            run = prepare_run(open_kind(cache, KINDS[0], resolutions), config)
        found = measure_epochs(run, resolutions[0], arguments)
        return found | {"waits": measure_waits(run, cache, resolutions, arguments.passes)}


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-size", choices=SIZES, default="tiny", help="full: as published, with random weights")
    parser.add_argument("--resolution", type=int, nargs=2, default=[256, 384], help="epochs are at the smaller one")
    parser.add_argument("--images", type=int, default=96, help="how many pictures (default 96)")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), default="no")
    parser.add_argument("--steps", type=int, default=3, help="passes of each shape timed alone, per turn")
    parser.add_argument("--rounds", type=int, default=5, help="epochs")
    parser.add_argument("--passes", type=int, default=12, help="passes timed of each residency and kind")
    parser.add_argument("--folder", type=Path, help="where networks are kept for the next time")
    parser.add_argument("--output", type=Path, help="where to write the JSON: a file or a folder")
    arguments = parser.parse_args(given)
    with tempfile.TemporaryDirectory() as scratch:
        folder = (arguments.folder or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        results = measure(folder, arguments)
    show(results)
    write_outcome(arguments.output, "shapes", vars(arguments), results)


if __name__ == "__main__":
    main()
