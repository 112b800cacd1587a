"""Inpainting: the decoder that fills holes, which sees beside the noisy latents those that are kept, and where.

As in Kandinsky's own training and in diffusers' pipeline it is the latents that are masked, not the pixels, so that the
rows of any cache will do. Those that are kept know something of what was in the hole: their encoder looks further than
one of them.
"""

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional

from kcache.errors import ModelError
from kcache.objectives.losses import Batch, DecoderObjective, mean_errors

_LEAST_HOLE = 0.02
"""Share of the picture that a smaller hole counts as in `hole_loss`: its few latents would outweigh all others."""


class InpaintObjective(DecoderObjective):
    """The decoder learns to predict the noise in a picture's latents, given its embedding and what is kept of it.

    A batch has a mask, too: (B, 1, h, w) float, 1 where a latent is kept and 0 in the hole.
    """

    measures = ("loss", "hole")
    drawn = ("noise", "timesteps", "mask")

    def __init__(self, unet: UNet2DConditionModel, scheduler: DDPMScheduler, *, hole_loss: bool = False) -> None:
        """`hole_loss` learns from the hole alone, rather than from all latents. Raises ModelError for another UNet."""
        super().__init__(unet, scheduler)
        found, expected = unet.config.in_channels, unet.config.out_channels + 1
        if found != expected or unet.config.addition_embed_type != "image":
            raise ModelError(
                f"the decoder has {found} input channels and embeds {unet.config.addition_embed_type!r}; expected "
                f"{expected}, of noisy latents, kept latents and the mask, and 'image'; widen a plain decoder by "
                "kcache.objectives.widening, or give one that fills holes"
            )
        self.hole_loss = hole_loss

    @property
    def row_shapes(self) -> dict[str, tuple[int | None, ...]]:
        """The embedding (D,) of the picture, and its latents (4, any side, any side)."""
        config = self.network.config
        return super().row_shapes | {"latents": ((config.in_channels - 1) // 2, None, None)}

    def network_input(self, noisy: Tensor, batch: Batch) -> Tensor:
        """The noisy latents, those that are kept, 0 in the hole, and the mask: (B, 9, h, w)."""
        mask = batch["mask"].float()
        return torch.cat([noisy, batch["latents"].float() * mask, mask], dim=1)

    def errors(self, batch: Batch, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The mean squared error of each sample, (B,) float32: over all latents, or over its hole."""
        if not self.hole_loss:
            return super().errors(batch, noise, timesteps)
        return _hole_errors(*self.predict(batch, noise, timesteps), batch["mask"], _LEAST_HOLE)

    def loss(self, batch: Batch, noise: Tensor, timesteps: Tensor, snr_gamma: float | None = None) -> Tensor:
        """The mean of `losses`, a float32 scalar."""
        if self.hole_loss:
            return self.losses(batch, noise, timesteps, snr_gamma).mean()
        return super().loss(batch, noise, timesteps, snr_gamma)

    forward = loss

    def measure(self, batch: Batch, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The mean squared error of each sample over all latents and over its hole, whatever is learnt from: (2, B)."""
        prediction, target = self.predict(batch, noise, timesteps)
        return torch.stack([mean_errors(prediction, target), _hole_errors(prediction, target, batch["mask"])])


def _hole_errors(prediction: Tensor, target: Tensor, mask: Tensor, least: float = 0.0) -> Tensor:
    """The mean squared error over each sample's hole, (B,) float32, as if that were a share `least` or more."""
    errors = functional.mse_loss(prediction.float(), target, reduction="none").mean(1)
    hole = 1 - mask[:, 0].float()
    return (errors * hole).mean((1, 2)) / hole.mean((1, 2)).clamp(min=max(least, 1 / hole[0].numel()))
