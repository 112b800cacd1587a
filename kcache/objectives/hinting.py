"""Hints: the decoder that follows a picture of depths, edges or the like, beside the embedding (its "ControlNet")."""

from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from kcache.errors import ModelError
from kcache.objectives.losses import Batch, DecoderObjective

HINT_CHANNELS = 4
"""Channels that the UNet's own block makes of a hint (diffusers' ImageHintTimeEmbedding)."""


class HintObjective(DecoderObjective):
    """The decoder learns to predict the noise in a picture's latents, given its embedding and a hint.

    A batch has a hint, too: (B, 3, H, W) float in [0, 1], of eight times the latents' height and width.
    """

    def __init__(self, unet: UNet2DConditionModel, scheduler: DDPMScheduler) -> None:
        """Raises ModelError for a UNet that reads no hints."""
        super().__init__(unet, scheduler)
        found, expected = unet.config.in_channels, unet.config.out_channels // 2 + HINT_CHANNELS
        if found != expected or unet.config.addition_embed_type != "image_hint":
            raise ModelError(
                f"the decoder has {found} input channels and embeds {unet.config.addition_embed_type!r}; expected "
                f"{expected}, of noisy latents and what is made of the hint, and 'image_hint'; widen a plain decoder "
                "by kcache.objectives.widening, or give one that reads hints"
            )

    @property
    def row_shapes(self) -> dict[str, tuple[int | None, ...]]:
        """The embedding (D,) of the picture, and its latents (4, any side, any side)."""
        return super().row_shapes | {"latents": (self.network.config.in_channels - HINT_CHANNELS, None, None)}

    def conditions(self, batch: Batch) -> dict[str, Tensor]:
        """The embedding and the hint."""
        return super().conditions(batch) | {"hint": batch["hint"].float()}
