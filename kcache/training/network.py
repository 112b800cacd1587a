"""The network that learns, as a run's settings want it: with adapters or whole, lean or quick, in which dtype."""

from pathlib import Path

import torch
from diffusers import DDPMScheduler, ModelMixin

from kcache.config import COMPUTE_DTYPES, TrainConfig
from kcache.encoders.pretrained import load_pretrained
from kcache.encoders.repositories import PIPELINES, Repository, weights_digest
from kcache.objectives.blocks import choose_attention, compile_blocks, recompute_blocks
from kcache.objectives.lora import add_lora, load_lora, save_lora
from kcache.objectives.losses import OBJECTIVES, DecoderObjective, Objective, PriorObjective
from kcache.store.digests import DigestMemo


def load_objective(config: TrainConfig, base: Repository, saved: Path | None) -> Objective:
    """The objective of `config.stage` with its network from `base`, or as `save_network` put it into `saved`.

    The parameters that learn are float32. With adapters the others never change, and are kept in the dtype that mixed
    precision computes in, as the upstream scripts keep them. Raises the KcacheError of what does not fit the network.
    """
    network = load_network(config.stage, base.path if saved is None or config.lora_rank is not None else saved)
    if config.lora_rank is not None:
        dtype = getattr(torch, COMPUTE_DTYPES[config.mixed_precision])
        for name, parameter in network.named_parameters():
            if name not in ("clip_mean", "clip_std"):  # the target is normalised by these, in float32
                parameter.data = parameter.data.to(dtype)
        if saved is not None:
            load_lora(network, saved, trainable=True, dropout=config.lora_dropout)
        else:
            add_lora(
                network,
                rank=config.lora_rank,
                alpha=config.lora_alpha,
                dropout=config.lora_dropout,
                target_modules=config.lora_target_modules,
                seed=config.seed,
            )
    choose_attention(network, config.attention)
    if config.gradient_checkpointing:
        recompute_blocks(network)
    objective: Objective
    if config.stage == "prior":
        objective = PriorObjective(network, packed=config.packing, bucketed=config.compile)
    else:
        scheduler = DDPMScheduler.from_pretrained(base.path, subfolder="scheduler", local_files_only=True)
        objective = DecoderObjective(network, scheduler)
    if config.compile:
        compile_blocks(network, packed=objective.packed)
    return objective


def load_network(stage: str, folder: Path) -> ModelMixin:
    """The network of `stage` ("prior" or "decoder") in a pipeline's `folder`, float32 on the CPU; raises ModelError."""
    return load_pretrained(OBJECTIVES[stage].network_class, folder / PIPELINES[stage].network, torch.float32)


def find_adapted(config: TrainConfig, base: Repository) -> dict[str, str] | None:
    """Name of `base` and digest (hex) of the weights in it that adapters are trained on; None where all weights learn.

    Raises ModelError when there are no such weights.
    """
    if config.lora_rank is None:
        return None
    with DigestMemo() as memo:
        return {"name": base.name, "weights": weights_digest(base, PIPELINES[config.stage].network, memo)}


def save_network(stage: str, network: ModelMixin, folder: Path) -> None:
    """Write what learned into `folder`: adapters as one file for diffusers, a whole network where a pipeline has it."""
    if getattr(network, "peft_config", None):
        save_lora(network, folder)
    else:
        network.save_pretrained(folder / PIPELINES[stage].network)


def network_bytes(network: ModelMixin) -> int:
    """What a whole network's weights take, in memory and on the disk."""
    return sum(tensor.nbytes for tensor in network.state_dict().values())
