"""The loss on samples that were not trained on, always at the same noise and timesteps: what changes it is learning."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kcache.cache import Cache
from kcache.heldout import key_numbers
from kcache.noise import draw_noise, draw_timesteps
from kcache.objectives import Batch, Objective, PriorObjective

__all__ = ["BANDS", "MAX_SAMPLES", "Validation", "evaluating"]

MAX_SAMPLES = 1024
"""Samples looked at, however many are held out: their mean is known to 3 % (1 / √1024) of the spread of one."""
BANDS = 4
"""Equal parts of the timesteps: the loss of nearly clean samples and that of nearly pure noise move differently."""


class Validation:
    """Measures an objective on held-out samples; equal weights give equal numbers, however often it is asked.

    Of `cache`, which holds the held-out samples only, the first 1,024 in order of their `key_numbers` are taken, each
    with its first caption and nothing dropped. A sample meets one noise and one timestep of each band, the same place
    in every band; both follow from `seed` and the image's key, so they are the same in every run and beside any other
    samples. Process `rank` of `world_size` measures its share.
    """

    def __init__(
        self,
        cache: Cache,
        objective: Objective,
        *,
        batch_size: int,
        seed: int,
        device: str | torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        numbers = np.array(key_numbers(cache), np.uint64)
        self._cache = cache
        self._objective = objective
        self._samples = np.argsort(numbers, kind="stable")[:MAX_SAMPLES][rank::world_size]
        # Far above the turns of training, so that no noise is met there too; one bit less, to be an int64.
        self._turns = (numbers[self._samples] >> np.uint64(1)).astype(np.int64)
        self._batch_size = batch_size
        self._seed = seed
        self._device = torch.device(device)
        self._width = objective.scheduler.config.num_train_timesteps // BANDS
        self._names = ("loss", "cosine") if isinstance(objective, PriorObjective) else ("loss",)

    def totals(self) -> Tensor:
        """What this process's samples add up to, (BANDS, 1 + measures) float32 on the device: a count, then the sums.

        Added up over all processes it is what `summary` wants. The network runs without gradients in evaluation mode,
        and is left as it was; no generator of random numbers is touched. Precision is the caller's, by autocast.
        """
        totals = torch.zeros(BANDS, 1 + len(self._names), device=self._device)
        with torch.no_grad(), evaluating(self._objective):
            for batch, noise, places in self._batches():
                for band in range(BANDS):
                    measures = self._measure(batch, noise, places + band * self._width)
                    totals[band, 0] += len(places)
                    totals[band, 1:] += measures.sum(1)
        return totals

    def summary(self, totals: Tensor) -> dict[str, float]:
        """Means by name: val_loss, val_loss_t000_249 and so on for each band of timesteps, and val_cosine of the prior.

        The loss is the mean squared error that the network trains on, unweighted; val_loss is its mean over all bands.
        val_cosine is the mean cosine of the angle between the image embedding that the prior predicts and the true one.
        """
        counts, sums = totals.double().cpu().split([1, len(self._names)], dim=1)
        means = dict(zip(self._names, (sums / counts).T, strict=True))
        last = BANDS * self._width - 1
        bands = {
            f"val_loss_t{band * self._width:0{len(str(last))}}_{(band + 1) * self._width - 1}": loss
            for band, loss in enumerate(means["loss"].tolist())
        }
        return {"val_loss": means["loss"].mean().item(), **bands} | {
            f"val_{name}": means[name].mean().item() for name in self._names if name != "loss"
        }

    def _batches(self) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        """Batches of rows, their noise, and their places in a band: timesteps from 0 to the width of one."""
        fields = tuple(self._objective.row_shapes)
        shape = self._cache.field(self._objective.noised_field).shape
        for start in range(0, len(self._samples), self._batch_size):
            part = slice(start, start + self._batch_size)
            rows = self._cache.read(self._samples[part], fields)
            noise = draw_noise(self._seed, self._turns[part], shape)
            places = draw_timesteps(self._seed, self._turns[part], self._width)
            batch = {name: torch.from_numpy(array).to(self._device) for name, array in rows.items()}
            yield batch, torch.from_numpy(noise).to(self._device), torch.from_numpy(places).to(self._device)

    def _measure(self, batch: Batch, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Each sample's loss and, of a prior, its cosine: (measures, B) float32."""
        prediction, target = self._objective.predict(batch, noise, timesteps)
        prediction, target = prediction.float(), target.float()
        losses = functional.mse_loss(prediction, target, reduction="none").flatten(1).mean(1)
        if not isinstance(self._objective, PriorObjective):
            return losses[None]
        network = self._objective.network
        predicted, true = network.post_process_latents(prediction), network.post_process_latents(target)
        return torch.stack([losses, functional.cosine_similarity(predicted, true)])


@contextmanager
def evaluating(network: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode for `network`; afterwards each of its modules is in the mode that it was in."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
