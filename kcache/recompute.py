"""Gradient checkpointing: blocks whose activations are computed again in the backward pass instead of being kept.

diffusers' own switch leaves out the attentions of Kandinsky's decoder and knows nothing for the prior.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch.utils.checkpoint import checkpoint

__all__ = ["outermost_blocks", "recompute_blocks"]

_BLOCKS = (Attention, BasicTransformerBlock, ResnetBlock2D)


def recompute_blocks(network: ModelMixin) -> None:
    """Keep between forward and backward only the input of each block of `network`, at the price of a second forward.

    Blocks are the prior's transformer blocks, and all resnets and attentions of the decoder's UNet. Losses and
    gradients stay the same, dropout included, as do the names of parameters. Chen et al. 2016, Training Deep Nets with
    Sublinear Memory Cost, arXiv 1604.06174.
    """
    for block in outermost_blocks(network):
        # A partial of a bound method: a deep copy of the network then calls its own blocks, as a closure would not.
        block.forward = partial(_recomputed, block.forward)


def outermost_blocks(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The prior's transformer blocks, or the resnets and attentions of the decoder's UNet, in the network's order.

    What lies in a block belongs to it, and is not given again.
    """
    for child in module.children():
        if isinstance(child, _BLOCKS):
            yield child
        else:
            yield from outermost_blocks(child)


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
