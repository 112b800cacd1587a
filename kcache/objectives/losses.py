"""The training objectives of Kandinsky 2.2: a batch of cached rows, noise and timesteps in, losses out.

An objective owns the network that learns and calls it in `forward`, so that whatever wraps the objective (autocast,
data-parallel training) sees the network too. Noise and timesteps are arguments: nothing here draws anything, and
nothing here waits for the device. All that the training loop knows of what is learnt, it asks of an `Objective`.
"""

from functools import partial
from typing import Any, ClassVar, Literal

import torch
from diffusers import DDPMScheduler, ModelMixin, PriorTransformer, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional

from kcache.errors import ModelError
from kcache.objectives.errors import LEAST_COUNTED, LOSS_MASKS, Batch, mean_errors, snr_weights, weighted
from kcache.objectives.packing import allow_packing, predict_packed, predict_padded


class Objective(torch.nn.Module):
    """What the objectives have in common. A new one says what stands first here, and how its network predicts."""

    stage: ClassVar[Literal["prior", "decoder"]]
    """The setting that chooses it, and the half of Kandinsky 2.2 that its network is of."""
    network_class: ClassVar[type[ModelMixin]]
    noised_field: ClassVar[str]
    """The field that noise is added to: noise has the shape of its rows."""
    dropped: ClassVar[Literal["caption", "image"]]
    """What some samples train without, for classifier-free guidance."""
    measures: ClassVar[tuple[str, ...]] = ("loss",)
    """What `measure` gives of each sample."""
    drawn: tuple[str, ...] = ("noise", "timesteps")
    """What a batch has beside its rows, drawn for each sample's turn."""
    own_share = 0.0
    """In which share of its turns a sample takes a mask of its own."""
    logged: ClassVar[tuple[str, ...]] = ("loss",)
    """What `told` gives of each step."""

    network: Any
    """The one that learns."""
    scheduler: DDPMScheduler
    """The schedule of the noise in training."""
    most_tokens: int | None = None
    """Tokens that a caption may have; None where no captions are read."""
    packed = False
    """Whether the network runs on valid tokens only."""

    @property
    def row_shapes(self) -> dict[str, tuple[int | None, ...]]:
        """The fields of a batch, and the shape that the network wants of one row; None stands for any side.

        Of a ragged field it is the shape of one token.
        """
        raise NotImplementedError

    def predict(self, batch: Batch, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """What the network predicts of each draw of noise, and what it should."""
        raise NotImplementedError

    def errors(self, batch: Batch, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The mean squared error of each draw of noise, (B,) float32."""
        return mean_errors(*self.predict(batch, noise, timesteps))

    def losses(self, batch: Batch, noise: Tensor, timesteps: Tensor, snr_gamma: float | None = None) -> Tensor:
        """The `errors` as they are learnt from, (B,) float32; the arguments are those of `predict`.

        With `snr_gamma` each is weighted by min(SNR, gamma), over SNR if noise is predicted. Hang et al. 2023,
        Efficient Diffusion Training via Min-SNR Weighting Strategy, arXiv 2303.09556. Where the batch has a `weight`
        (B,) float32, each counts as much: all draws of noise of a sample by its one.
        """
        errors = weighted(self.errors(batch, noise, timesteps), batch)
        return errors if snr_gamma is None else errors * snr_weights(self.scheduler, timesteps, snr_gamma)

    def loss(self, batch: Batch, noise: Tensor, timesteps: Tensor, snr_gamma: float | None = None) -> Tensor:
        """The mean of `losses`, a float32 scalar: not divided by the sum of weights, where there are some."""
        if snr_gamma is not None or "weight" in batch:
            return self.losses(batch, noise, timesteps, snr_gamma).mean()
        # In one sum over all numbers, as in the upstream scripts: a mean of means is rounded otherwise.
        prediction, target = self.predict(batch, noise, timesteps)
        return functional.mse_loss(prediction.float(), target)

    forward = loss

    def told(self, loss: Tensor) -> Tensor:
        """What is `logged` of the batch whose `loss` that was, detached: a scalar, or (logged,)."""
        return loss.detach()

    def measure(self, batch: Batch, noise: Tensor, timesteps: Tensor) -> Tensor:
        """How well each draw of noise is predicted, by all `measures`: (measures, B) float32."""
        return self.losses(batch, noise, timesteps)[None]


class PriorObjective(Objective):
    """The prior learns to predict a picture's CLIP embedding from its caption (the "sample" prediction of DDPM)."""

    stage = "prior"
    network_class = PriorTransformer
    noised_field = "image_embeds"
    dropped = "caption"
    measures = ("loss", "cosine")

    def __init__(self, prior: PriorTransformer, *, packed: bool = True, bucketed: bool = False) -> None:
        """`packed` runs the network on valid tokens only, with the same result; `bucketed` then meets few shapes.

        See `kcache.objectives.packing`.
        """
        super().__init__()
        if packed:
            allow_packing(prior)
        self.packed = packed
        self._predict = partial(predict_packed, bucketed=bucketed) if packed else predict_padded
        # Constants of the model, kept as parameters: forward never uses them, and data-parallel training stops with an
        # error at parameters that want a gradient and get none.
        prior.clip_mean.requires_grad_(False)
        prior.clip_std.requires_grad_(False)
        self.network = prior
        self.most_tokens = prior.config.num_embeddings
        # The schedule that the released prior was trained with; the one in its repository is for sampling.
        self.scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")

    @property
    def row_shapes(self) -> dict[str, tuple[int | None, ...]]:
        """Embeddings (D,) of the picture and its caption, and the state of one token of that, (C,)."""
        config = self.network.config
        return {
            "image_embeds": (config.clip_embed_dim or config.embedding_dim,),
            "text_embeds": (config.embedding_proj_dim or config.embedding_dim,),
            "text_encoder_hidden_states": (config.embedding_dim,),
        }

    def predict(self, batch: Batch, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """What the network predicts, and what it should: the normalised image_embeds, both (B K, D).

        `batch`: image_embeds (B, D), text_embeds (B, D), text_encoder_hidden_states (T, D) with the valid tokens of all
        captions behind each other, text_offsets (B + 1,) int64: caption i is tokens text_offsets[i] to text_offsets[i
        + 1]. `noise` (B K, D) float32, `timesteps` (B K,) int64: draw j of sample i at i K + j, K of each, often one.
        Rows may be float16.
        """
        text_embeds, hidden_states = batch["text_embeds"].float(), batch["text_encoder_hidden_states"].float()
        target = (batch["image_embeds"].float() - self.network.clip_mean) / self.network.clip_std
        target = target.repeat_interleave(noise.shape[0] // text_embeds.shape[0], 0)
        noisy, offsets = self.scheduler.add_noise(target, noise, timesteps), batch["text_offsets"]
        return self._predict(self.network, noisy, timesteps, text_embeds, hidden_states, offsets), target

    def measure(self, batch: Batch, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Each draw's loss, and the cosine of the angle between the predicted embedding and the true one: (2, B)."""
        prediction, target = self.predict(batch, noise, timesteps)
        predicted, true = map(self.network.post_process_latents, (prediction.float(), target))
        return torch.stack([mean_errors(prediction, target), functional.cosine_similarity(predicted, true)])


class DecoderObjective(Objective):
    """The decoder learns to predict the noise in a picture's latents, given its CLIP embedding."""

    stage = "decoder"
    network_class = UNet2DConditionModel
    noised_field = "latents"
    dropped = "image"

    def __init__(self, unet: UNet2DConditionModel, scheduler: DDPMScheduler, *, loss_mask: bool = False) -> None:
        """With `loss_mask` latents count as much as a batch's loss_masks, (B, 1, h, w) uint8 of 255, say."""
        super().__init__()
        if scheduler.config.prediction_type != "epsilon":
            raise ModelError(
                f"the decoder's scheduler has prediction_type {scheduler.config.prediction_type!r}; expected "
                "'epsilon', as Kandinsky 2.2's decoder predicts noise; use the scheduler of a Kandinsky 2.2 decoder"
            )
        self.network = unet
        self.scheduler = scheduler
        self.loss_mask = loss_mask

    @property
    def row_shapes(self) -> dict[str, tuple[int | None, ...]]:
        """The embedding (D,) of the picture, its latents (4, any side, any side), and its loss mask if that is read."""
        config = self.network.config
        shapes: dict[str, tuple[int | None, ...]] = {
            "image_embeds": (config.encoder_hid_dim,),
            "latents": (config.out_channels // 2, None, None),
        }
        return shapes | ({LOSS_MASKS: (1, None, None)} if self.loss_mask else {})

    def predict(self, batch: Batch, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """What the network predicts, and what it should: the noise, both (B, 4, h, w).

        `batch`: image_embeds (B, D), latents (B, 4, h, w). `noise` (B, 4, h, w) float32, `timesteps` (B,) int64. Rows
        may be float16. The network's last four channels predict a variance; nothing trains them, as in the upstream
        script.
        """
        latents = batch["latents"].float()
        prediction = self.network(
            self.network_input(self.scheduler.add_noise(latents, noise, timesteps), batch),
            timesteps,
            encoder_hidden_states=None,
            added_cond_kwargs=self.conditions(batch),
        ).sample[:, : latents.shape[1]]
        return prediction, noise

    def errors(self, batch: Batch, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The mean squared error of each sample, (B,) float32, over its latents as much as they count."""
        return mean_errors(*self.predict(batch, noise, timesteps), self.counted(batch), LEAST_COUNTED)

    def loss(self, batch: Batch, noise: Tensor, timesteps: Tensor, snr_gamma: float | None = None) -> Tensor:
        """The mean of `losses`, a float32 scalar."""
        if self.counted(batch) is not None:
            return self.losses(batch, noise, timesteps, snr_gamma).mean()
        return super().loss(batch, noise, timesteps, snr_gamma)

    forward = loss

    def counted(self, batch: Batch) -> Tensor | None:
        """How much of each latent counts, (B, h, w) float32 from 0 to 1; None where all count alike."""
        return batch[LOSS_MASKS][:, 0].float() / 255 if self.loss_mask else None

    def network_input(self, noisy: Tensor, batch: Batch) -> Tensor:
        """All channels that the network sees, (B, C, h, w)."""
        return noisy

    def conditions(self, batch: Batch) -> dict[str, Tensor]:
        """What it sees beside them, by the names that diffusers has."""
        return {"image_embeds": batch["image_embeds"].float()}


OBJECTIVES: dict[str, type[Objective]] = {kind.stage: kind for kind in (PriorObjective, DecoderObjective)}
"""By stage."""
