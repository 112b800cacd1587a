"""A plain decoder widened: input channels more, whose weights begin at zero, so that it predicts what it did before.

Bit for bit, as what is new is added to what there was. Saved and loaded it is an ordinary network, which predicts that
to within rounding: one convolution of more channels may add up its products in another order.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import ImageHintTimeEmbedding
from torch.nn import Conv2d, Parameter

from kcache.objectives.hinting import HINT_CHANNELS

LEARNT_WHOLE = ("conv_in", "add_embedding.input_hint_block")
"""What a widened decoder learns whole, beside adapters: what is new in it stands there, and adapters are of others."""
_SEED = 0
"""Of the hint block, which begins the same in every process and run."""


class WidenedConv2d(Conv2d):
    """The first layer of a UNet with new input channels: its own ones' products are summed as they were before.

    So it gives, bit for bit, what it gave while the weights of the new ones are zero.
    """

    def __init__(self, conv: Conv2d, weight: Parameter, own: int) -> None:
        """`conv`, of stride and padding 1, with a `weight` whose first `own` input channels were there before."""
        # On "meta", as it draws no numbers there.
        super().__init__(weight.shape[1], weight.shape[0], conv.kernel_size[0], padding=1, device="meta")
        self.weight, self.bias = weight, conv.bias
        self.own = own

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(B, in, h, w) to (B, out, h, w)."""
        before = self._conv_forward(input[:, : self.own], self.weight[:, : self.own], self.bias)
        return before + self._conv_forward(input[:, self.own :], self.weight[:, self.own :], None)


def is_plain(config: Mapping[str, Any]) -> bool:
    """Whether a UNet of such a configuration sees noisy latents and a picture's embedding, and nothing more."""
    inputs, outputs = config.get("in_channels"), config.get("out_channels")
    return config.get("addition_embed_type") == "image" and inputs is not None and outputs == 2 * inputs


def learnt_whole(unet: UNet2DConditionModel) -> tuple[str, ...]:
    """The modules of `LEARNT_WHOLE` that a widened decoder has."""
    there = {name for name, _ in unet.named_modules()}
    return tuple(name for name in LEARNT_WHOLE if name in there)


def widen(unet: UNet2DConditionModel, in_channels: int) -> None:
    """Give `unet`, in place, `in_channels` input channels; its own come first, the others' weights are zero."""
    old = unet.conv_in.weight
    new = old.new_zeros(old.shape[0], in_channels, *old.shape[2:])
    new[:, : old.shape[1]] = old.detach()
    unet.conv_in = WidenedConv2d(unet.conv_in, Parameter(new, requires_grad=old.requires_grad), old.shape[1])
    unet.register_to_config(in_channels=in_channels)


def widen_again(unet: UNet2DConditionModel, own: int) -> None:
    """Let `unet`, which was widened from `own` input channels, saved and loaded, compute as it did before that."""
    unet.conv_in = WidenedConv2d(unet.conv_in, unet.conv_in.weight, own)


def widen_for_masks(unet: UNet2DConditionModel) -> None:
    """Make of a plain decoder, in place, one that fills holes: it sees latents twice, and the mask."""
    widen(unet, 2 * unet.config.in_channels + 1)


def widen_for_hints(unet: UNet2DConditionModel) -> None:
    """Make of a plain decoder, in place, one that reads hints, by a block that begins as chance has it."""
    old = unet.add_embedding
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_SEED)
        new = ImageHintTimeEmbedding(old.image_proj.in_features, old.image_proj.out_features)
    for name in ("image_proj", "image_norm"):
        setattr(new, name, getattr(old, name))
    own = old.image_proj.weight
    unet.add_embedding = new.to(own.device, own.dtype).train(old.training)
    unet.register_to_config(addition_embed_type="image_hint")
    widen(unet, unet.config.in_channels + HINT_CHANNELS)
