"""The network that learns, as a run's settings want it: with adapters or whole, lean or quick, in which dtype."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import DDPMScheduler, ModelMixin

from kcache.config import COMPUTE_DTYPES, TrainConfig
from kcache.encoders.pretrained import load_pretrained
from kcache.encoders.repositories import PIPELINES, Repository
from kcache.errors import ModelError
from kcache.foreign import told
from kcache.objectives.blocks import choose_attention, compile_blocks, recompute_blocks
from kcache.objectives.hinting import HintObjective, hint_field
from kcache.objectives.inpainting import InpaintObjective
from kcache.objectives.lora import add_lora, load_lora
from kcache.objectives.losses import OBJECTIVES, DecoderObjective, Objective, PriorObjective
from kcache.objectives.preservation import PreservationObjective
from kcache.training.network.decoder import begin, go_on, say_whole


def load_network(stage: str, folder: Path) -> ModelMixin:
    """The network of `stage` ("prior" or "decoder") in a pipeline's `folder`, float32 on the CPU; raises ModelError."""
    return load_pretrained(OBJECTIVES[stage].network_class, folder / PIPELINES[stage].network, torch.float32)


def load_objective(
    config: TrainConfig,
    base: Repository,
    saved: Path | None,
    *,
    shaped: bool = False,
    own_masks: bool = False,
    load: Callable[[str, Path], ModelMixin] = load_network,
) -> Objective:
    """The objective of `config.stage` with its network from `base`, or as `save_network` put it into `saved`.

    The parameters that learn have the dtype of --weights. With adapters, float32, the others never change, and are kept
    in the dtype that mixed precision computes in, as the upstream scripts keep them. Where it is `shaped`, batches are
    of pictures of several shapes; with `own_masks` samples have such. `load` is what gives the network of a stage in a
    pipeline's folder. Raises the KcacheError of what does not fit the network.
    """
    network = load(config.stage, base.path if saved is None or config.lora_rank is not None else saved)
    whole: tuple[str, ...] = ()
    if saved is None:
        whole = begin(network, config, base)
    else:
        go_on(network, config, base)
    if config.lora_rank is not None:
        _keep_in(network, getattr(torch, COMPUTE_DTYPES[config.mixed_precision]), whole)
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
                whole=whole,
                use_dora=config.use_dora,
                use_rslora=config.use_rslora,
            )
            say_whole(network, whole)
    elif config.weights == "bf16":
        _keep_in(network, torch.bfloat16, ())
    choose_attention(network, config.attention)
    if config.gradient_checkpointing:
        recompute_blocks(network)
    objective: Objective
    if config.stage == "prior":
        objective = _prior_objective(config, network)
    else:
        objective = _decoder_objective(config, network, base, own_masks)
    if config.compile:
        compile_blocks(network, packed=objective.packed, shaped=shaped)
    return objective


def _prior_objective(config: TrainConfig, network: ModelMixin) -> PriorObjective:
    packing = {"packed": config.packing, "bucketed": config.compile}
    if config.class_prompt:
        return PreservationObjective(network, weight=config.prior_loss_weight, **packing)
    return PriorObjective(network, **packing)


def _decoder_objective(config: TrainConfig, network: ModelMixin, base: Repository, own_masks: bool) -> DecoderObjective:
    with told(ModelError, f"{base.path / 'scheduler'} cannot be loaded", "fetch or export the repository again"):
        scheduler = DDPMScheduler.from_pretrained(base.path, subfolder="scheduler", local_files_only=True)
    loss_mask = config.loss_mask
    if config.hint is not None:
        return HintObjective(network, scheduler, hint=hint_field(config.hint), loss_mask=loss_mask)
    if not config.inpaint:
        return DecoderObjective(network, scheduler, loss_mask=loss_mask)
    return InpaintObjective(
        network,
        scheduler,
        hole_loss=config.hole_loss,
        loss_mask=loss_mask,
        own_share=config.own_share if own_masks else 0.0,
        growth=config.mask_growth,
    )


def _keep_in(network: ModelMixin, dtype: torch.dtype, whole: Sequence[str]) -> None:
    """Bring all weights into `dtype`, but those that the target is normalised by, and those of the modules `whole`."""
    kept = ("clip_mean", "clip_std", *(f"{module}." for module in whole))
    for name, parameter in network.named_parameters():
        if not name.startswith(kept):
            parameter.data = parameter.data.to(dtype)
