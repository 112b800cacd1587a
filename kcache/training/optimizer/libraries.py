"""Which optimizer moves the weights, of which library, and what its state takes."""

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from kcache.config import TrainConfig
from kcache.config.words import OptimizerName
from kcache.errors import ConfigError
from kcache.training.optimizer.learning import trainable_parameters
from kcache.training.optimizer.one_by_one import OneByOne

Parameters = Iterable[torch.nn.Parameter]
Make = Callable[[Parameters, TrainConfig, torch.device], torch.optim.Optimizer]

logger = logging.getLogger(__name__)

_SMALLEST_RATE = 0.1
"""Below it Prodigy, which multiplies what it finds by the learning rate, hardly learns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """An optimizer of a library."""

    make: Make
    state: Callable[[torch.Size], int]
    """Bytes of the state of a parameter by its shape."""
    library: str = "torch"
    """The package to import."""
    extra: str | None = None
    """What kcache calls it among its extras; None where it is always there."""
    unread: tuple[str, ...] = ()
    """Settings that it does not read."""


def check_optimizer(config: TrainConfig) -> None:
    """Raise ConfigError when the optimizer that `config` asks for is not installed, and say what it does not read."""
    name, kind = config.chosen_optimizer, OPTIMIZERS[config.chosen_optimizer]
    if kind.extra is not None:
        try:
            import_module(kind.library)
        except ImportError as error:
            flag = "--use-8bit-adam" if config.use_8bit_adam else f"--optimizer {name}"
            raise ConfigError(
                f"{flag} needs {kind.library} ({error}); install it with pip install 'kcache[{kind.extra}]', or leave "
                "the flag out"
            ) from error
    for setting in kind.unread:
        if getattr(config, setting) != type(config).__dataclass_fields__[setting].default:
            flag = setting.replace("_", "-")
            logger.warning("--%s changes nothing with --optimizer %s, which does not read it", flag, name)
    if name == "prodigy" and config.learning_rate < _SMALLEST_RATE:
        logger.warning(
            "--learning-rate %s with --optimizer prodigy, which finds its own and multiplies it by this one: hardly "
            "anything will be learnt; expected about 1; give --learning-rate 1.0",
            config.learning_rate,
        )
    if config.fused_backward:
        logger.warning("--fused-backward: gradients are not scaled down to --max-grad-norm, as none are there together")


def check_placement(config: TrainConfig, device: torch.device, processes: int) -> None:
    """Say what `config` puts on a host that the run computes on; ConfigError for what several processes cannot do."""
    if config.fused_backward and processes > 1:
        raise ConfigError(
            f"--fused-backward with {processes} processes, whose gradients are only added up when all are there; "
            "expected one process; start one, or leave --fused-backward out"
        )
    for flag, asked in {"--offload-optimizer": config.offload_optimizer, "--ema-device cpu": config.ema_device}.items():
        if asked and device.type == "cpu":
            logger.warning("%s changes nothing here, as the run computes on the CPU", flag)


def make_optimizer(
    network: torch.nn.Module, config: TrainConfig, device: torch.device, make: Make | None = None
) -> torch.optim.Optimizer:
    """The optimizer that `config` asks for over the parameters of `network` that learn; `make` may make another."""
    parameters = trainable_parameters(network).values()
    made = (make or OPTIMIZERS[config.chosen_optimizer].make)(parameters, config, device)
    if config.weights == "fp32" and not config.fused_backward and not config.offload_optimizer:
        return made
    return OneByOne(made, seed=config.seed, fused_backward=config.fused_backward, offloaded=config.offload_optimizer)


def state_bytes(parameters: Iterable[torch.Tensor], config: TrainConfig) -> int:
    """About how many bytes the state of `parameters` takes, in memory and in a checkpoint."""
    state = OPTIMIZERS[config.chosen_optimizer].state
    return sum(state(parameter.shape) for parameter in parameters)


def _adam(config: TrainConfig) -> dict[str, Any]:
    return {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }


def _adamw(parameters: Parameters, config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """torch's, fused where it can be: one pass over memory."""
    return torch.optim.AdamW(parameters, **_adam(config), fused=device.type in ("cpu", "cuda"))


def _adamw_8bit(parameters: Parameters, config: TrainConfig, _: torch.device) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, **_adam(config))


def _adafactor(parameters: Parameters, config: TrainConfig, _: torch.device) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(
        parameters,
        lr=config.learning_rate,
        weight_decay=config.adam_weight_decay,
        scale_parameter=False,
        relative_step=False,
    )


def _prodigy(parameters: Parameters, config: TrainConfig, _: torch.device) -> torch.optim.Optimizer:
    from prodigyopt import Prodigy

    return Prodigy(parameters, **_adam(config))


def _in_8_bits(shape: torch.Size) -> int:
    """Two codes for each weight, a float32 scale for each 256, two tables; of small tensors two float32 numbers."""
    numbers = shape.numel()
    return 8 * numbers if numbers < 4096 else 2 * (numbers + 4 * math.ceil(numbers / 256) + 4 * 256)


def _of_adafactor(shape: torch.Size) -> int:
    """A mean of squares for each row and each column of the last two sides; of vectors for each number."""
    numbers = shape.numel()
    return 4 * (numbers // shape[-1] + numbers // shape[-2]) if len(shape) > 1 else 4 * numbers


OPTIMIZERS: dict[OptimizerName, Kind] = {
    "adamw": Kind(make=_adamw, state=lambda shape: 8 * shape.numel()),
    "adamw-8bit": Kind(make=_adamw_8bit, state=_in_8_bits, library="bitsandbytes", extra="bitsandbytes"),
    "adafactor": Kind(make=_adafactor, state=_of_adafactor, unread=("adam_beta1", "adam_beta2", "adam_epsilon")),
    "prodigy": Kind(make=_prodigy, state=lambda shape: 16 * shape.numel(), library="prodigyopt", extra="prodigy"),
}
"""By the name of --optimizer."""
