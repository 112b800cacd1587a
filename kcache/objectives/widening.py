"""A plain decoder widened: input channels more, whose weights begin at zero, so that it predicts what it did before.

To within rounding: a convolution of more channels may add up its products in another order.
"""

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import ImageHintTimeEmbedding
from torch.nn import Parameter

from kcache.objectives.hinting import HINT_CHANNELS

_SEED = 0
"""Of the hint block, which begins the same in every process and run."""


def widen(unet: UNet2DConditionModel, in_channels: int) -> None:
    """Give `unet`, in place, `in_channels` input channels; its own come first, the others' weights are zero."""
    conv = unet.conv_in
    old = conv.weight
    new = old.new_zeros(old.shape[0], in_channels, *old.shape[2:])
    new[:, : old.shape[1]] = old.detach()
    conv.weight, conv.in_channels = Parameter(new, requires_grad=old.requires_grad), in_channels
    unet.register_to_config(in_channels=in_channels)


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
