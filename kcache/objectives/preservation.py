"""Prior preservation: beside the pictures the prior learns what it would have drawn itself, and so keeps it.

Ruiz et al. 2022, DreamBooth, arXiv 2208.12242, equation 2, with image embeddings in place of pictures.
"""

import torch
from diffusers import PriorTransformer
from torch import Tensor
from torch.nn import functional

from kcache.objectives.errors import Batch, snr_weights, weighted
from kcache.objectives.losses import PriorObjective

CLASS = "class_"
"""What the names of a batch's fields begin with that are of class rows."""


class PreservationObjective(PriorObjective):
    """The prior learns from the pictures of a batch, the instances, and from class rows that it drew before.

    The loss of class rows is added `weight` times, whatever the samples of the batch weigh. A batch has them by the
    names of `PriorObjective.predict`, noise and timesteps, too, each with `CLASS` in front; both go through the network
    together. Held-out samples have none.
    """

    logged = ("loss", "class_loss")

    def __init__(self, prior: PriorTransformer, *, weight: float, packed: bool = True, bucketed: bool = False) -> None:
        super().__init__(prior, packed=packed, bucketed=bucketed)
        self._weight = weight
        self._parts = torch.full((2,), torch.nan)

    def loss(self, batch: Batch, noise: Tensor, timesteps: Tensor, snr_gamma: float | None = None) -> Tensor:
        """The mean loss of the instances and `weight` times that of the class rows, a float32 scalar."""
        both = torch.cat([timesteps, batch[f"{CLASS}timesteps"]])
        prediction, target = self.predict(joined(batch), torch.cat([noise, batch[f"{CLASS}noise"]]), both)
        errors = functional.mse_loss(prediction.float(), target, reduction="none")
        if snr_gamma is not None:
            errors = errors * snr_weights(self.scheduler, both, snr_gamma)[:, None]
        instances, kept = weighted(errors[: len(noise)], batch).mean(), errors[len(noise) :].mean()
        self._parts = torch.stack([instances.detach(), kept.detach()])
        return instances + self._weight * kept

    forward = loss

    def told(self, loss: Tensor) -> Tensor:
        """The instances' part of the last loss, and that of the class rows, unweighted: (2,)."""
        return self._parts


def joined(batch: Batch) -> dict[str, Tensor]:
    """The rows of a batch and its class rows behind them, as one batch of the prior's."""
    rows = {
        name: torch.cat([batch[name], batch[CLASS + name]])
        for name in ("image_embeds", "text_embeds", "text_encoder_hidden_states")
    }
    offsets, more = batch["text_offsets"], batch[f"{CLASS}text_offsets"]
    return rows | {"text_offsets": torch.cat([offsets, offsets[-1] + more[1:]])}
