"""What may make a training step from the cache faster, each beside the plain one: `train_step.py --levers`.

    compiled           the blocks compiled in place, as with --compile
    CUDA graphs        compiled so that whole blocks are launched at once (torch.compile's mode "reduce-overhead"); on a
                       GPU only, and no setting of the trainer
    noise draws 4      four draws of noise per caption, as with --noise-draws 4; its loss is of other draws
    batch x 4          no lever: as many draws a step as with the one before, each of an image of its own
    channels-last      the decoder's weights in the order that puts a pixel's channels together; no setting of the
                       trainer

All share one network and one optimizer; a lever is set for its own turns and undone behind them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from diffusers import ModelMixin

from kcache.objectives.blocks import compile_blocks, outermost_blocks
from kcache.objectives.losses import PriorObjective
from kcache.training.run import TrainingRun
from kcache.training.trainer import take_step
from measuring.ways import Way, cached_ways, loader

DRAWS = 4


def lever_ways(run: TrainingRun) -> list[Way]:
    """Computing alone and the plain way of a cached run, then every lever that its network and device have."""
    plain = cached_ways(run)[:2]
    prior, network = run.config.stage == "prior", run.network
    name = plain[1].name.replace("cached", "cached + {}")
    rounded = _with_objective(run, PriorObjective(network, bucketed=True).train()) if prior else run
    levers = [_lever(name.format("compiled"), rounded, partial(compiled, network, None, packed=prior))]
    if torch.cuda.is_available():
        graphs = partial(compiled, network, "reduce-overhead", packed=prior)
        levers.append(_lever(name.format("CUDA graphs"), rounded, graphs))
    if prior:
        several = replace(run, config=replace(run.config, noise_draws=DRAWS))
        levers.append(replace(_lever(name.format(f"noise draws {DRAWS}"), several), draws=DRAWS))
        larger = replace(run, config=replace(run.config, train_batch_size=DRAWS * run.config.train_batch_size))
        levers.append(_lever(name.format(f"batch x {DRAWS}"), larger))
        both = replace(rounded, config=several.config)
        setting = partial(compiled, network, None, packed=True)
        levers.append(replace(_lever(name.format(f"compiled, noise draws {DRAWS}"), both, setting), draws=DRAWS))
    else:
        order = partial(channels_last, network, run.optimizer)
        levers.append(_lever(name.format("channels-last"), run, order))
    return [*plain, *levers]


def _with_objective(run: TrainingRun, objective: PriorObjective) -> TrainingRun:
    return replace(run, raw_objective=objective, objective=run.accelerator.prepare(objective))


def _lever(name: str, run: TrainingRun, setting: partial | None = None) -> Way:
    way = Way(name=name, run=run, batches=loader(run, run.cache).forever, step=partial(take_step, run))
    return way if setting is None else replace(way, within=setting)


@contextmanager
def compiled(network: ModelMixin, mode: str | None, *, packed: bool) -> Iterator[None]:
    """The blocks of `network` compiled, by torch's `mode`; graphs are kept for the next time."""
    compile_blocks(network, packed=packed)
    blocks = [block for block in outermost_blocks(network) if block._compiled_call_impl is not None]
    for block in blocks if mode else ():
        block.compile(mode=mode, dynamic=False)
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None


@contextmanager
def channels_last(network: ModelMixin, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Weights, and what the optimizer keeps of them, with the channels of a pixel side by side."""
    _lay_out(network, optimizer, torch.channels_last)
    try:
        yield
    finally:
        _lay_out(network, optimizer, torch.contiguous_format)


def _lay_out(network: ModelMixin, optimizer: torch.optim.Optimizer, order: torch.memory_format) -> None:
    states = chain.from_iterable(state.values() for state in optimizer.state.values())
    # The fused optimizer wants them to lie alike.
    for tensor in chain(network.parameters(), states):
        if isinstance(tensor, torch.Tensor) and tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=order)
