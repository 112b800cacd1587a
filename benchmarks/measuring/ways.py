"""The ways to feed a training step that `train_step.py` compares: see there what each one is."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kcache.encoders.online import OnlineEncoders
from kcache.loader.batches import Batch, CacheLoader
from kcache.loader.chance import epoch_order
from kcache.loader.parts import RowReader
from kcache.loader.turns import draw_turns
from kcache.objectives.losses import PriorObjective
from kcache.sources import open_source
from kcache.training.run import TrainingRun
from kcache.training.trainer import take_step

COMPUTE = "compute only"


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to feed a step."""

    name: str
    run: TrainingRun
    batches: Callable[[], Generator[Batch, None, None]]
    step: Callable[[Iterator[Batch]], Any]
    ahead: bool = True
    """Whether batches are made ahead; without it a turn is warm at once, and a fifth of the steps will do."""
    draws: int = 1
    """Draws of noise that it learns from per image."""
    threads: int | None = None
    """Torch's, where it is said."""
    within: Callable[[], AbstractContextManager[object]] = nullcontext
    """What is set while it has its turn."""

    @property
    def trains(self) -> bool:
        """Whether there is a step behind the batches."""
        return self.step is not next

    @property
    def packing(self) -> str:
        """What follows the kind of the way in its name: ", packed", ", not packed" or nothing."""
        return next((end for end in (", not packed", ", packed") if end in self.name), "")


def draws(run: TrainingRun) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """What goes with the samples at given turns, as the trainer draws them."""
    shape = run.cache.field(run.raw_objective.noised_field).shape
    timesteps = run.raw_objective.scheduler.config.num_train_timesteps
    seed, each = run.config.seed, run.config.noise_draws
    drawn, growth = run.raw_objective.drawn, run.config.mask_growth
    return lambda turns: draw_turns(seed, turns, shape, timesteps, each, drawn=drawn, growth=growth)


def loader(run: TrainingRun, rows: RowReader) -> CacheLoader:
    """The loader that the trainer would have."""
    fields, device = tuple(run.raw_objective.row_shapes), run.accelerator.device
    return CacheLoader(rows, fields, run.config.train_batch_size, seed=run.config.seed, device=device, draws=draws(run))


def batches_in_step(run: TrainingRun, rows: OnlineEncoders) -> Generator[Batch, None, None]:
    """The loader's batches, each made when it is asked for, in the thread that asks."""
    config, device, fields = run.config, run.accelerator.device, tuple(run.raw_objective.row_shapes)
    order, draw = epoch_order(config.seed, 0, len(rows), config.shuffle), draws(run)
    for start in count(0, config.train_batch_size):
        turns = np.arange(start, start + config.train_batch_size)
        batch = rows.read(order[turns % len(order)], fields) | draw(turns)
        yield {name: torch.as_tensor(values).to(device) for name, values in batch.items()}


def same_batch(batch: Batch) -> Generator[Batch, None, None]:
    """`batch`, without end."""
    while True:
        yield batch


def runs_by_packing(run: TrainingRun) -> dict[str, TrainingRun]:
    """The run with and without packing, on one network and one optimizer; of a decoder's, there is only one."""
    if run.config.stage == "decoder":
        return {"": run}
    padded = PriorObjective(run.network, packed=False).train()
    return {
        ", packed": run,
        ", not packed": replace(run, raw_objective=padded, objective=run.accelerator.prepare(padded)),
    }


def cached_ways(run: TrainingRun) -> list[Way]:
    """The ways that need no encoders."""
    first = loader(run, run.cache).forever()
    batch = next(first)
    first.close()
    ways = []
    for packing, its_run in runs_by_packing(run).items():
        step = partial(take_step, its_run)
        ready = loader(its_run, run.cache)
        ways += [
            Way(name=f"{COMPUTE}{packing}", run=its_run, batches=partial(same_batch, batch), step=step),
            Way(name=f"cached{packing}", run=its_run, batches=ready.forever, step=step),
        ]
    return ways


def online_ways(cached: Sequence[Way], pictures: Path, workers: int, in_step: bool) -> list[Way]:
    """The ways with the encoders in the loop, on the networks and optimizer of the `cached` ones."""
    run = cached[0].run
    source, fields, device = open_source(str(pictures)), tuple(run.raw_objective.row_shapes), run.accelerator.device
    encoders = OnlineEncoders(run.cache, source, fields, device, num_workers=workers)
    ways = [
        Way(
            name=way.name.replace("cached", "online"), run=way.run, batches=loader(run, encoders).forever, step=way.step
        )
        for way in cached
        if way.name.startswith("cached")
    ]
    if in_step:
        # As upstream: on the last run, which computes padding.
        alone, last = OnlineEncoders(run.cache, source, fields, device, num_workers=1), ways[-1]
        batches = partial(batches_in_step, run, alone)
        ways.append(replace(last, name=f"online{last.packing}, in step", batches=batches, ahead=False))
    return [*ways, replace(ways[0], name="encoders only", batches=loader(run, encoders).forever, step=next)]
