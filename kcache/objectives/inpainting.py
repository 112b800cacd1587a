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
from kcache.objectives.errors import Batch, mean_errors
from kcache.objectives.losses import DecoderObjective

OWN_MASKS = "masks"
"""The field of masks that samples have of their own."""


class InpaintObjective(DecoderObjective):
    """The decoder learns to predict the noise in a picture's latents, given its embedding and what is kept of it.

    A batch has a mask, too: (B, 1, h, w) float, 1 where a latent is kept and 0 in the hole. With an `own_share` it has
    masks of the samples' own, (B, 1, h, w) uint8 of the same meaning, without a hole where there is none, and own_mask
    (B,) bool, who takes that.
    """

    measures = ("loss", "hole")

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: DDPMScheduler,
        *,
        hole_loss: bool = False,
        loss_mask: bool = False,
        own_share: float = 0.0,
        growth: bool = True,
    ) -> None:
        """`hole_loss` learns from the hole alone, rather than from all latents; `growth` is of the samples' own holes.

        Held-out samples' holes grow in any case, as holes do in use. Raises ModelError for another UNet.
        """
        super().__init__(unet, scheduler, loss_mask=loss_mask)
        found, expected = unet.config.in_channels, unet.config.out_channels + 1
        if found != expected or unet.config.addition_embed_type != "image":
            raise ModelError(
                f"the decoder has {found} input channels and embeds {unet.config.addition_embed_type!r}; expected "
                f"{expected}, of noisy latents, kept latents and the mask, and 'image'; widen a plain decoder by "
                "kcache.objectives.widening, or give one that fills holes"
            )
        self.hole_loss = hole_loss
        self.own_share = own_share
        self.drawn = ("noise", "timesteps", "mask", *(("own_mask",) if own_share else ()))
        self.growth = growth

    @property
    def row_shapes(self) -> dict[str, tuple[int | None, ...]]:
        """The embedding (D,) of the picture, its latents (4, any side, any side), and its own mask if that is read."""
        return super().row_shapes | ({OWN_MASKS: (1, None, None)} if self.own_share else {})

    def mask(self, batch: Batch) -> Tensor:
        """What each sample keeps of its picture, (B, 1, h, w) float32: as drawn, or as its own mask has it."""
        drawn = batch["mask"].float()
        if not self.own_share:
            return drawn
        own = batch[OWN_MASKS].float()
        takes = batch["own_mask"][:, None, None, None] & (own.amin((1, 2, 3), keepdim=True) == 0)
        return torch.where(takes, grown(own) if self.growth or not self.training else own, drawn)

    def network_input(self, noisy: Tensor, batch: Batch) -> Tensor:
        """The noisy latents, those that are kept, 0 in the hole, and the mask: (B, 9, h, w)."""
        mask = self.mask(batch)
        return torch.cat([noisy, batch["latents"].float() * mask, mask], dim=1)

    def counted(self, batch: Batch) -> Tensor | None:
        """How much of each latent counts, (B, h, w) float32: by the loss mask; with `hole_loss` in the hole alone."""
        return self._of_hole(batch) if self.hole_loss else super().counted(batch)

    def _of_hole(self, batch: Batch) -> Tensor:
        hole, counted = 1 - self.mask(batch)[:, 0], super().counted(batch)
        return hole if counted is None else hole * counted

    def measure(self, batch: Batch, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The mean squared error of each sample over all latents and over its hole, whatever is learnt from: (2, B)."""
        prediction, target = self.predict(batch, noise, timesteps)
        counted = (super().counted(batch), self._of_hole(batch))
        return torch.stack([mean_errors(prediction, target, each) for each in counted])


def grown(keep: Tensor) -> Tensor:
    """Holes that are a latent larger, as `KandinskyV22InpaintPipeline` grows them: (B, 1, h, w) of 0 and 1.

    Two of the eight neighbours, across the rising diagonal, are not in it, as in the pipeline's `prepare_mask`.
    """
    padded = functional.pad(keep, (1, 1, 1, 1), value=1)
    height, width = keep.shape[2:]
    shifts = [(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, -1)]
    moved = [padded[..., 1 + y : 1 + y + height, 1 + x : 1 + x + width] for y, x in shifts]
    return torch.stack(moved).amin(0)
