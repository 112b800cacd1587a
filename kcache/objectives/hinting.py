"""Hints: the decoder that follows a picture of depths, edges or the like, beside the embedding (its "ControlNet")."""

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from kcache.errors import ModelError
from kcache.objectives.errors import Batch
from kcache.objectives.losses import DecoderObjective

HINT_CHANNELS = 4
"""Channels that the UNet's own block makes of a hint (diffusers' ImageHintTimeEmbedding)."""


def hint_field(name: str) -> str:
    """The field in which a cache has the hint called `name`."""
    return f"hint_{name}"


def as_fed(hint: Tensor) -> Tensor:
    """Hints as `KandinskyV22ControlnetPipeline` feeds them, (B, 3, H, W) float32 in [0, 1].

    They come in one channel or three, as uint8 of 255 or as floating-point numbers in [0, 1].
    """
    scaled = hint.float() / 255 if hint.dtype == torch.uint8 else hint.float()
    return scaled.expand(-1, 3, -1, -1)


class HintObjective(DecoderObjective):
    """The decoder learns to predict the noise in a picture's latents, given its embedding and a hint.

    A batch has a hint, too, of eight times the latents' height and width: (B, 3, H, W) float in [0, 1], or uint8 of
    255, as the cache has it, which may be of one channel.
    """

    def __init__(
        self, unet: UNet2DConditionModel, scheduler: DDPMScheduler, *, hint: str = "hint", loss_mask: bool = False
    ) -> None:
        """`hint` is the field that it stands in. Raises ModelError for a UNet that reads no hints."""
        super().__init__(unet, scheduler, loss_mask=loss_mask)
        self.hint = hint
        found, expected = unet.config.in_channels, unet.config.out_channels // 2 + HINT_CHANNELS
        if found != expected or unet.config.addition_embed_type != "image_hint":
            raise ModelError(
                f"the decoder has {found} input channels and embeds {unet.config.addition_embed_type!r}; expected "
                f"{expected}, of noisy latents and what is made of the hint, and 'image_hint'; widen a plain decoder "
                "by kcache.objectives.widening, or give one that reads hints"
            )

    @property
    def row_shapes(self) -> dict[str, tuple[int | None, ...]]:
        """The embedding (D,) of the picture, its latents (4, any side, any side) and its hint (any, any, any)."""
        return super().row_shapes | {self.hint: (None, None, None)}

    def conditions(self, batch: Batch) -> dict[str, Tensor]:
        """The embedding, and the hint `as_fed`."""
        return super().conditions(batch) | {"hint": as_fed(batch[self.hint])}
