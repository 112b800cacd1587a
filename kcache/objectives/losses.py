"""The two training objectives of Kandinsky 2.2: a batch of cached rows, noise and timesteps in, the loss out.

An objective owns the network that learns and calls it in `forward`, so that whatever wraps the objective (autocast,
data-parallel training) sees the network too. Noise and timesteps are arguments: nothing here draws anything, and
nothing here waits for the device.
"""

from collections.abc import Mapping

import torch
from diffusers import DDPMScheduler, PriorTransformer, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from torch import Tensor
from torch.nn import functional

from kcache.errors import ModelError
from kcache.objectives.packing import allow_packing, predict_packed

Batch = Mapping[str, Tensor]


class PriorObjective(torch.nn.Module):
    """The prior learns to predict a picture's CLIP embedding from its caption (the "sample" prediction of DDPM)."""

    network_name = "prior"
    """Its folder in a pipeline."""
    noised_field = "image_embeds"
    """The field that noise is added to: noise has the shape of its rows."""

    def __init__(self, prior: PriorTransformer, *, packed: bool = True, bucketed: bool = False) -> None:
        """`packed` runs the network on valid tokens only, with the same result; `bucketed` then meets few shapes.

        See `kcache.objectives.packing`.
        """
        super().__init__()
        if packed:
            allow_packing(prior)
        self._packed = packed
        self._bucketed = bucketed
        # Constants of the model, kept as parameters: forward never uses them, and data-parallel training stops with an
        # error at parameters that want a gradient and get none.
        prior.clip_mean.requires_grad_(False)
        prior.clip_std.requires_grad_(False)
        self.network = prior
        # The schedule that the released prior was trained with; the one in its repository is for sampling.
        self.scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")

    @property
    def row_shapes(self) -> dict[str, tuple[int | None, ...]]:
        """The fields of a batch, and the shape that the network wants of one row (of one token for ragged text)."""
        config = self.network.config
        return {
            "image_embeds": (config.clip_embed_dim or config.embedding_dim,),
            "text_embeds": (config.embedding_proj_dim or config.embedding_dim,),
            "text_encoder_hidden_states": (config.embedding_dim,),
        }

    def loss(self, batch: Batch, noise: Tensor, timesteps: Tensor, snr_gamma: float | None = None) -> Tensor:
        """The mean loss of a batch, a float32 scalar, weighted by `snr_gamma` (see `_weighted_mse`).

        The arguments are those of `predict`.
        """
        return _weighted_mse(*self.predict(batch, noise, timesteps), self.scheduler, timesteps, snr_gamma)

    def predict(self, batch: Batch, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """What the network predicts, and what it should: the normalised image_embeds, both (B K, D).

        `batch`: image_embeds (B, D), text_embeds (B, D), text_encoder_hidden_states (T, D) with the valid tokens of all
        captions behind each other, text_offsets (B + 1,) int64: caption i is tokens text_offsets[i] to text_offsets[i
        + 1]. `noise` (B K, D) float32, `timesteps` (B K,) int64: draw j of sample i at i K + j, K of each, often one.
        Rows may be float16.
        """
        network, offsets = self.network, batch["text_offsets"]
        text_embeds, hidden_states = batch["text_embeds"].float(), batch["text_encoder_hidden_states"].float()
        draws = noise.shape[0] // text_embeds.shape[0]
        target = (batch["image_embeds"].float() - network.clip_mean) / network.clip_std
        target = target.repeat_interleave(draws, 0)
        noisy = self.scheduler.add_noise(target, noise, timesteps)
        if self._packed:
            prediction = predict_packed(
                network, noisy, timesteps, text_embeds, hidden_states, offsets, bucketed=self._bucketed
            )
            return prediction, target
        hidden_states, mask = pad_text(hidden_states, offsets, network.config.num_embeddings)
        prediction = network(
            noisy,
            timestep=timesteps,
            proj_embedding=text_embeds.repeat_interleave(draws, 0),
            encoder_hidden_states=hidden_states.repeat_interleave(draws, 0),
            attention_mask=mask.repeat_interleave(draws, 0),
        ).predicted_image_embedding
        return prediction, target

    forward = loss


class DecoderObjective(torch.nn.Module):
    """The decoder learns to predict the noise in a picture's latents, given its CLIP embedding."""

    network_name = "unet"
    """Its folder in a pipeline."""
    noised_field = "latents"
    """The field that noise is added to: noise has the shape of its rows."""

    def __init__(self, unet: UNet2DConditionModel, scheduler: DDPMScheduler) -> None:
        super().__init__()
        if scheduler.config.prediction_type != "epsilon":
            raise ModelError(
                f"the decoder's scheduler has prediction_type {scheduler.config.prediction_type!r}; expected "
                "'epsilon', as Kandinsky 2.2's decoder predicts noise; use the scheduler of a Kandinsky 2.2 decoder"
            )
        self.network = unet
        self.scheduler = scheduler

    @property
    def row_shapes(self) -> dict[str, tuple[int | None, ...]]:
        """The fields of a batch, and the shape that the network wants of one row; None stands for any side."""
        config = self.network.config
        return {"image_embeds": (config.encoder_hid_dim,), "latents": (config.in_channels, None, None)}

    def loss(self, batch: Batch, noise: Tensor, timesteps: Tensor, snr_gamma: float | None = None) -> Tensor:
        """The mean loss of a batch, a float32 scalar, weighted by `snr_gamma` (see `_weighted_mse`).

        The arguments are those of `predict`.
        """
        return _weighted_mse(*self.predict(batch, noise, timesteps), self.scheduler, timesteps, snr_gamma)

    def predict(self, batch: Batch, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """What the network predicts, and what it should: the noise, both (B, 4, h, w).

        `batch`: image_embeds (B, D), latents (B, 4, h, w). `noise` (B, 4, h, w) float32, `timesteps` (B,) int64. Rows
        may be float16. The network's last four channels predict a variance; nothing trains them, as in the upstream
        script.
        """
        latents = batch["latents"].float()
        prediction = self.network(
            self.scheduler.add_noise(latents, noise, timesteps),
            timesteps,
            encoder_hidden_states=None,
            added_cond_kwargs={"image_embeds": batch["image_embeds"].float()},
        ).sample[:, : latents.shape[1]]
        return prediction, noise

    forward = loss


Objective = PriorObjective | DecoderObjective


def pad_text(hidden_states: Tensor, offsets: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Captions laid out as the prior wants them: (B, length, D) filled up with zeros, and (B, length) bool, True where
    valid.

    `hidden_states` (T, D) holds caption i at offsets[i] to offsets[i + 1]. What stands in the filled-up rows has no
    influence on the prior's output: its attention mask and the read-out at the last token exclude them.
    """
    position = torch.arange(length, device=offsets.device)
    mask = position < offsets.diff()[:, None]
    # A gather, as assigning through a boolean mask would wait for the device to count it.
    index = (offsets[:-1, None] + position).clamp(max=hidden_states.shape[0] - 1)
    return hidden_states[index].where(mask[..., None], 0), mask


def _weighted_mse(
    prediction: Tensor, target: Tensor, scheduler: DDPMScheduler, timesteps: Tensor, snr_gamma: float | None
) -> Tensor:
    """Mean squared error; with `snr_gamma` each sample is weighted by min(SNR, gamma), over SNR if noise is predicted.

    Hang et al. 2023, Efficient Diffusion Training via Min-SNR Weighting Strategy, arXiv 2303.09556.
    """
    if snr_gamma is None:
        return functional.mse_loss(prediction.float(), target)
    snr = compute_snr(scheduler, timesteps)
    weight = snr.clamp(max=snr_gamma)
    if scheduler.config.prediction_type == "epsilon":
        weight = weight / snr
    loss = functional.mse_loss(prediction.float(), target, reduction="none").flatten(1).mean(1)
    return (loss * weight).mean()
