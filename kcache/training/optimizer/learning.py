"""The parameters that learn."""

import torch


def trainable_parameters(network: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that learn, by name, in the order in which the optimizer holds them."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
