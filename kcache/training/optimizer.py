"""What moves the weights: AdamW, its schedule, the average of where they have been; their state as named tensors."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR

from kcache.config import TrainConfig
from kcache.errors import ConfigError, RunError


def trainable_parameters(network: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that learn, by name, in the order in which the optimizer holds them."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def check_optimizer(config: TrainConfig) -> None:
    """Raise ConfigError when the optimizer that `config` asks for is not installed."""
    if config.use_8bit_adam:
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"--use-8bit-adam needs bitsandbytes ({error}); install it with pip install bitsandbytes, or "
                "leave the flag out"
            ) from error


def make_optimizer(network: torch.nn.Module, config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW over the parameters of `network` that learn; fused where torch can: one pass over memory."""
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    parameters = trainable_parameters(network).values()
    if config.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **settings)
    return torch.optim.AdamW(parameters, **settings, fused=device.type in ("cpu", "cuda"))


def make_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, max_steps: int) -> LambdaLR:
    """The learning rate by optimizer step, whatever the accumulation and the number of processes."""
    return get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=max_steps
    )


def go_on(schedule: LambdaLR, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set `schedule` and `optimizer` to the learning rate after `step` steps, of the schedule as it was made now.

    It depends on the step and the settings alone, not on what an earlier schedule of another length gave last.
    """
    schedule.last_epoch = step
    rates = [peak * share(step) for peak, share in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    schedule._last_lr = rates
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def optimizer_tensors(optimizer: torch.optim.Optimizer, network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state of `optimizer`, each tensor named "parameter.entry"."""
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, parameter in trainable_parameters(network).items():
        for entry, value in optimizer.state.get(parameter, {}).items():
            # bitsandbytes counts steps in a Python int, torch in a float tensor.
            tensor = torch.tensor(value) if isinstance(value, int) else value
            # And it shares its quantisation tables between parameters, which safetensors does not write.
            tensors[f"{name}.{entry}"] = tensor.clone() if tensor.data_ptr() in seen else tensor
            seen.add(tensor.data_ptr())
    return tensors


def restore_optimizer(path: Path, optimizer: torch.optim.Optimizer, network: torch.nn.Module) -> None:
    """Give `optimizer` the `optimizer_tensors` in the file at `path`; its settings stay its own.

    Raises RunError when they are not of the parameters that learn.
    """
    stored: dict[str, dict[str, torch.Tensor | int]] = {}
    for key, tensor in load_file(path).items():
        name, _, entry = key.rpartition(".")
        is_count = tensor.ndim == 0 and tensor.dtype == torch.int64
        stored.setdefault(name, {})[entry] = int(tensor) if is_count else tensor
    names = list(trainable_parameters(network))
    _check_names(path, stored, names, network)
    # Parameters without an entry have never had a gradient, as the optimizer would have made one.
    state = {index: stored[name] for index, name in enumerate(names) if name in stored}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def make_average(network: torch.nn.Module, config: TrainConfig) -> EMAModel:
    """The exponential moving average of the parameters that learn, beginning where they are now.

    Its decay is min(ema_decay, (1 + step) / (10 + step)), as in the upstream scripts.
    """
    return EMAModel(trainable_parameters(network).values(), decay=config.ema_decay, foreach=True)


def restore_average(path: Path, average: EMAModel, network: torch.nn.Module, step: int) -> None:
    """Give `average` the tensors by parameter name in the file at `path`, as they were after optimizer step `step`.

    Raises RunError when they are not of the parameters that learn.
    """
    stored, names = load_file(path), list(trainable_parameters(network))
    _check_names(path, stored, names, network)
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
    """Within the block `network` has the averaged weights; without an average, its own."""
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


def _check_names(path: Path, stored: Mapping[str, object], names: list[str], network: torch.nn.Module) -> None:
    foreign = stored.keys() - set(names)
    if foreign:
        raise RunError(
            f"{path} has {len(foreign)} parameters that the network does not train, such as {min(foreign)}; expected "
            f"those of {type(network).__name__}; resume with the stage that wrote it"
        )
