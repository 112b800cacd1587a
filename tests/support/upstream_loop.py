"""The mathematics of the diffusers training scripts as a plain loop of diffusers, PEFT and torch, to compare with."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, PriorTransformer, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor
from torch.nn import functional

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]


def losses(
    oracle: Path,
    stage: str,
    steps: Sequence[tuple[Mapping[str, Tensor], Tensor, Tensor]],
    *,
    rank: int | None = None,
    snr_gamma: float | None = None,
    learning_rate: float = 1e-4,
) -> list[float]:
    """The loss before each optimizer step, one step per (batch, noise, timesteps); `rank` trains a LoRA of it."""
    network, scheduler = _load(oracle, stage)
    if rank is not None:
        network.requires_grad_(False)
        torch.default_generator.manual_seed(0)
        targets = [name for name in TARGETS if stage == "decoder" or not name.startswith("add")]
        network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets))
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, eps=1e-8)
    seen = []
    for batch, noise, timesteps in steps:
        predict = _predict_prior if stage == "prior" else _predict_decoder
        prediction, target = predict(network, scheduler, batch, noise, timesteps)
        loss = functional.mse_loss(prediction, target)
        if snr_gamma is not None:
            alphas = scheduler.alphas_cumprod[timesteps]
            snr = alphas / (1 - alphas)
            weights = torch.stack([snr, torch.full_like(snr, snr_gamma)]).min(0).values
            weights = weights if stage == "prior" else weights / snr
            each = functional.mse_loss(prediction, target, reduction="none")
            loss = (each.mean(dim=list(range(1, each.ndim))) * weights).mean()
        seen.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return seen


def _load(oracle: Path, stage: str) -> tuple[Any, DDPMScheduler]:
    if stage == "prior":
        scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
        return PriorTransformer.from_pretrained(oracle / "prior", subfolder="prior").train(), scheduler
    scheduler = DDPMScheduler.from_pretrained(oracle / "decoder", subfolder="scheduler")
    return UNet2DConditionModel.from_pretrained(oracle / "decoder", subfolder="unet").train(), scheduler


def _predict_prior(
    prior: Any, scheduler: DDPMScheduler, batch: Mapping[str, Tensor], noise: Tensor, timesteps: Tensor
) -> tuple[Tensor, Tensor]:
    states, bounds = batch["text_encoder_hidden_states"], batch["text_offsets"].tolist()
    padded = torch.zeros(len(noise), prior.config.num_embeddings, states.shape[1])
    mask = torch.zeros(padded.shape[:2], dtype=torch.bool)
    for i, (start, end) in enumerate(pairwise(bounds)):
        padded[i, : end - start] = states[start:end]
        mask[i, : end - start] = True
    target = (batch["image_embeds"] - prior.clip_mean.detach()) / prior.clip_std.detach()
    prediction = prior(
        scheduler.add_noise(target, noise, timesteps),
        timestep=timesteps,
        proj_embedding=batch["text_embeds"],
        encoder_hidden_states=padded,
        attention_mask=mask,
    ).predicted_image_embedding
    return prediction, target


def _predict_decoder(
    unet: Any, scheduler: DDPMScheduler, batch: Mapping[str, Tensor], noise: Tensor, timesteps: Tensor
) -> tuple[Tensor, Tensor]:
    noisy = scheduler.add_noise(batch["latents"], noise, timesteps)
    conditions = {"image_embeds": batch["image_embeds"]}
    return unet(noisy, timesteps, None, added_cond_kwargs=conditions).sample[:, :4], noise
