"""The exponential moving average of the weights that learn, float32 on their device or on the host."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file

from kcache.config import TrainConfig
from kcache.errors import RunError
from kcache.training.optimizer.kept import check_names
from kcache.training.optimizer.learning import trainable_parameters


class MovingAverage(EMAModel):
    """diffusers' average, which moves one tensor at a time, and may lie elsewhere and in more bits than the weights."""

    @torch.no_grad()
    def step(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Take in where `parameters` are now."""
        self.optimization_step += 1
        moved = 1 - self.get_decay(self.optimization_step)
        for average, parameter in zip(self.shadow_params, parameters, strict=True):
            average.sub_(average - parameter.to(average), alpha=moved)


def make_average(network: torch.nn.Module, config: TrainConfig) -> MovingAverage:
    """The exponential moving average of the parameters that learn, float32, beginning where they are now.

    Its decay is min(ema_decay, (1 + step) / (10 + step)), as in the upstream scripts.
    """
    average = MovingAverage([], decay=config.ema_decay)
    average.shadow_params = [
        parameter.detach().to(config.ema_device or parameter.device, torch.float32, copy=True)
        for parameter in trainable_parameters(network).values()
    ]
    return average


def restore_average(path: Path, average: EMAModel, network: torch.nn.Module, step: int) -> None:
    """Give `average` the tensors by parameter name in the file at `path`, as they were after optimizer step `step`.

    Raises RunError when they are not of the parameters that learn.
    """
    stored, names = load_file(path), list(trainable_parameters(network))
    check_names(path, stored, names, network)
    for name, tensor in zip(names, average.shadow_params, strict=True):
        if name not in stored or stored[name].shape != tensor.shape:
            raise RunError(
                f"{path} has no average of {name} of shape {tuple(tensor.shape)}; expected one of every parameter that "
                "learns; resume from another checkpoint"
            )
        tensor.copy_(stored[name])
    average.optimization_step = step


@contextmanager
def averaged(average: EMAModel | None, network: torch.nn.Module) -> Iterator[None]:
    """Within the block `network` has the averaged weights, in its own dtype; without an average, its own."""
    if average is None:
        yield
        return
    parameters = list(trainable_parameters(network).values())
    average.store(parameters)
    average.copy_to(parameters)
    try:
        yield
    finally:
        average.restore(parameters)
