"""A step of training without data: the run's own objective, optimizer and average, on tensors that hold nothing.

What is rehearsed is what a run does, in the order in which it does it (`kcache.training.trainer.take_step`): as many
batches as make a difference, the gradient clipped, the optimizer's step, the average's. It is a step as the second one
of a run is: the optimizer has its states already, which come with the first.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from diffusers import ModelMixin

from kcache.config import TrainConfig
from kcache.encoders.repositories import PIPELINES
from kcache.errors import ModelError
from kcache.forecast.ledger import HOST, Ledger, no_scratch
from kcache.forecast.scratch import cpu_scratch
from kcache.foreign import told
from kcache.objectives.losses import OBJECTIVES, Objective
from kcache.training.optimizer.average import make_average
from kcache.training.optimizer.learning import trainable_parameters
from kcache.training.optimizer.libraries import OPTIMIZERS, Parameters, make_optimizer
from kcache.training.optimizer.one_by_one import one_by_one_in

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
"""What autocast computes in, by --mixed-precision."""
_OWN_KERNELS = ("adamw-8bit", "prodigy")
"""Optimizers whose step looks at numbers, or calls kernels that take no fake tensors."""


def empty_network(stage: str, folder: Path) -> ModelMixin:
    """The network of `stage` in a pipeline's `folder`, of its config.json alone: on the meta device, without weights.

    Raises ModelError for a configuration of which none can be made.
    """
    kind, place = OBJECTIVES[stage].network_class, folder / PIPELINES[stage].network
    fetch = "expected what its config.json describes; fetch or export the repository again"
    with told(ModelError, f"{place} cannot be made as {kind.__name__}", fetch), torch.device("meta"):
        network: ModelMixin = kind.from_config(kind.load_config(place, local_files_only=True))
    return network.requires_grad_(True)


def rehearse(
    objective: Objective,
    config: TrainConfig,
    batch: Mapping[str, torch.Tensor],
    device: torch.device,
    *,
    elsewhere: bool = False,
) -> Ledger:
    """Count the memory of training `objective` on batches like `batch` by the settings of `config`, on `device`.

    The objective's network comes from `empty_network`, and is one of fake tensors afterwards. Of `batch`, what lies on
    the meta device has no data, either; what does not, captions' offsets (B + 1,) and timesteps (B,), is computed with.
    `elsewhere` counts for a GPU that is not here: without what a CPU's operations take for themselves.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # not at the top: it brings the compiler with it

    has_host = elsewhere or device.type != "cpu"  # whose memory is another than the device's
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    ledger = Ledger(fake, no_scratch if has_host else cpu_scratch)

    def hollow(tensor: torch.Tensor) -> torch.Tensor:
        with fake:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    _hollow_out(objective, hollow)
    given = {name: hollow(value) if value.is_meta else value for name, value in batch.items()}
    ledger.count(objective.parameters(), "weights")
    ledger.count(objective.buffers(), "weights")
    ledger.count(given.values(), "batch")
    for parameter in trainable_parameters(objective.network).values():
        parameter.register_post_accumulate_grad_hook(lambda each: ledger.count([each.grad], "gradients"))
    with ledger:
        _take_step(objective.train(), config, given, device, ledger, has_host=has_host)
    return ledger


def _hollow_out(objective: Objective, hollow: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace what lies on the meta device among the parameters and buffers, in their places: PEFT's are no others."""
    for module in objective.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                module._parameters[name] = torch.nn.Parameter(hollow(parameter), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = hollow(buffer)


def _take_step(
    objective: Objective,
    config: TrainConfig,
    batch: Mapping[str, torch.Tensor],
    device: torch.device,
    ledger: Ledger,
    *,
    has_host: bool,
) -> None:
    learning = list(trainable_parameters(objective.network).values())
    average = make_average(objective.network, config) if config.use_ema else None
    if average is not None:
        ledger.count(average.shadow_params, HOST if has_host and config.ema_device else "average")
    make = _CountedOptimizer if config.chosen_optimizer in _OWN_KERNELS else None
    optimizer = make_optimizer(objective.network, config, device, make)
    offloaded = has_host and config.offload_optimizer
    ledger.count(_states_of(optimizer, learning), HOST if offloaded else "optimizer")
    if offloaded:  # one parameter's comes to the device at a time
        ledger.now["optimizer"] += max(OPTIMIZERS[config.chosen_optimizer].state(each.shape) for each in learning)
    ledger.forget_peak()
    one_by_one = one_by_one_in(optimizer) if config.fused_backward else None
    batches = min(config.gradient_accumulation_steps, 2)  # a third one meets what the second one does
    for _ in range(batches):
        with _autocast(config, device):
            loss = objective(batch, batch["noise"], batch["timesteps"], config.snr_gamma)
        (loss / batches).backward()
        del loss
    if one_by_one is None:
        torch.nn.utils.clip_grad_norm_(objective.parameters(), config.max_grad_norm)
    else:
        one_by_one.take_norm()
    optimizer.step()
    optimizer.zero_grad()
    if average is not None:
        average.step(learning)


def _states_of(optimizer: torch.optim.Optimizer, learning: Iterable[torch.nn.Parameter]) -> list[torch.Tensor]:
    """The states that an optimizer makes in its first step, after which there are no gradients."""
    for parameter in learning:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]


class _CountedOptimizer(torch.optim.Optimizer):
    """Has a state as large as that of an optimizer whose own step takes no fake tensors, and moves nothing."""

    def __init__(self, parameters: Parameters, config: TrainConfig, _: torch.device) -> None:
        super().__init__(parameters, {})
        self._bytes = OPTIMIZERS[config.chosen_optimizer].state

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # it takes none
        """Make the states of parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    size = self._bytes(parameter.shape)
                    self.state[parameter] = {"state": parameter.detach().new_empty(size, dtype=torch.uint8)}


def _autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[object]:
    dtype = _DTYPES.get(config.mixed_precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)
