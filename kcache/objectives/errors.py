"""How much the error of each draw of noise counts: of a sample, of a timestep, of a part of a picture."""

from collections.abc import Mapping

from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor
from torch.nn import functional

Batch = Mapping[str, Tensor]

LOSS_MASKS = "loss_masks"
"""The field of loss masks."""
LEAST_COUNTED = 0.02
"""Share of the picture that less of it counts as, where not all counts: its few latents would outweigh all others."""


def weighted(errors: Tensor, batch: Batch) -> Tensor:
    """The errors of all draws of noise (B K, …) times the `weight` (B,) of their samples, where the batch has it."""
    if "weight" not in batch:
        return errors
    weight = batch["weight"].repeat_interleave(len(errors) // len(batch["weight"]))
    return errors * weight.reshape(-1, *[1] * (errors.ndim - 1))


def mean_errors(prediction: Tensor, target: Tensor, counted: Tensor | None = None, least: float = 0.0) -> Tensor:
    """The mean squared error of each row, (B,) float32.

    Of rows (C, h, w) it may be the mean over what is `counted` (B, h, w), as if that were a share `least` or more.
    """
    errors = functional.mse_loss(prediction.float(), target, reduction="none")
    if counted is None:
        return errors.flatten(1).mean(1)
    share = counted.mean((1, 2)).clamp(min=max(least, 1 / counted[0].numel()))
    return (errors.mean(1) * counted).mean((1, 2)) / share


def snr_weights(scheduler: DDPMScheduler, timesteps: Tensor, snr_gamma: float) -> Tensor:
    """What each draw of noise counts by Min-SNR weighting, (B,) float32; see `Objective.losses`."""
    snr = compute_snr(scheduler, timesteps)
    weight = snr.clamp(max=snr_gamma)
    return weight / snr if scheduler.config.prediction_type == "epsilon" else weight
