"""An optimizer's state as named tensors, and back."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from kcache.errors import RunError
from kcache.training.optimizer.learning import trainable_parameters
from kcache.training.optimizer.one_by_one import one_by_one_in

_GROUP = "param_groups.0"
"""Under which name stands what is of all parameters together."""
_FOUND = ("d", "d_max", "d_numerator", "k")
"""What Prodigy finds, and keeps beside its settings."""


def optimizer_tensors(optimizer: torch.optim.Optimizer, network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state of `optimizer`, each tensor named "parameter.entry"."""
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, parameter in trainable_parameters(network).items():
        for entry, value in optimizer.state.get(parameter, {}).items():
            tensor = _as_tensor(value)
            # bitsandbytes shares its quantisation tables between parameters, which safetensors does not write.
            tensors[f"{name}.{entry}"] = tensor.clone() if tensor.data_ptr() in seen else tensor
            seen.add(tensor.data_ptr())
    (group,) = optimizer.param_groups
    found = {entry: group[entry] for entry in _FOUND if entry in group}
    return tensors | {f"{_GROUP}.{entry}": _as_tensor(value) for entry, value in found.items()}


def restore_optimizer(path: Path, optimizer: torch.optim.Optimizer, network: torch.nn.Module) -> None:
    """Give `optimizer` the `optimizer_tensors` in the file at `path`; its settings stay its own.

    Not by its `load_state_dict`, which would bring all into the dtype of the weights. Raises RunError when they are not
    of the parameters that learn.
    """
    parameters = trainable_parameters(network)
    stored: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(path).items():
        name, _, entry = key.rpartition(".")
        stored.setdefault(name, {})[entry] = tensor
    (group,) = optimizer.param_groups
    group |= {entry: tensor.item() for entry, tensor in stored.pop(_GROUP, {}).items() if entry in _FOUND}
    check_names(path, stored, parameters, network)
    # Parameters without an entry have never had a gradient, as the optimizer would have made one.
    for name, entries in stored.items():
        parameter = parameters[name]
        optimizer.state[parameter] = {
            entry: _placed(entry, tensor, parameter, optimizer) for entry, tensor in entries.items()
        }


def check_names(path: Path, stored: Iterable[str], names: Iterable[str], network: torch.nn.Module) -> None:
    """Raise RunError when the file at `path` has `stored` something of parameters that are not among `names`."""
    foreign = set(stored) - set(names)
    if foreign:
        raise RunError(
            f"{path} has {len(foreign)} parameters that the network does not train, such as {min(foreign)}; expected "
            f"those of {type(network).__name__}; resume with the stage that wrote it"
        )


def _as_tensor(value: Any) -> torch.Tensor:
    """Some count steps in a Python int, others in a float tensor; what Prodigy finds are Python's floats."""
    if isinstance(value, torch.Tensor):
        return value
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)


def _placed(
    entry: str, tensor: torch.Tensor, parameter: torch.Tensor, optimizer: torch.optim.Optimizer
) -> torch.Tensor | int:
    """`tensor` where `optimizer` keeps it: beside its parameter, but counts of steps that torch keeps on the host."""
    if tensor.ndim == 0 and tensor.dtype == torch.int64:
        return int(tensor)
    on_host = entry == "step" and not optimizer.param_groups[0].get("fused")
    moves = one_by_one_in(optimizer)
    return tensor if on_host or (moves is not None and moves.offloaded) else tensor.to(parameter.device)
