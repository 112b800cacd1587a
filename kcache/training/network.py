"""The network that learns, as a run's settings want it: with adapters or whole, lean or quick, in which dtype."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DDPMScheduler, ModelMixin
from diffusers.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from kcache.config import COMPUTE_DTYPES, DECODER_REPO, DEPTH_REPO, INPAINT_REPO, TrainConfig
from kcache.disk.memo import DigestMemo
from kcache.disk.room import Reserve, write_file
from kcache.encoders.pretrained import load_pretrained
from kcache.encoders.repositories import FOLLOWING, INPAINTING, PIPELINES, Repository, pipeline_class
from kcache.encoders.weights import weights_digest
from kcache.errors import ModelError
from kcache.foreign import told, within_memory
from kcache.machine import check_fits, default_device
from kcache.objectives.blocks import choose_attention, compile_blocks, recompute_blocks
from kcache.objectives.hinting import HintObjective, hint_field
from kcache.objectives.inpainting import InpaintObjective
from kcache.objectives.lora import add_lora, load_lora, save_lora
from kcache.objectives.losses import OBJECTIVES, DecoderObjective, Objective, PriorObjective
from kcache.objectives.preservation import PreservationObjective
from kcache.objectives.widening import is_plain, learnt_whole, widen_for_hints, widen_for_masks
from kcache.store.checkpoint import checkpoint_steps
from kcache.store.run_directory import logger
from kcache.training.optimizer import trainable_parameters

_BASE = "--pretrained-decoder-model-name-or-path"


class _Kind(NamedTuple):
    """What a decoder is for."""

    does: str
    lacks: str
    """What one that is not for it does."""
    flag: str
    """How it is trained as what it is."""
    published: str


_KINDS = {
    PIPELINES["decoder"].class_name: _Kind("draws whole pictures", "", "neither --inpaint nor --hint", DECODER_REPO),
    INPAINTING: _Kind("fills holes", "fills no holes yet", "--inpaint", INPAINT_REPO),
    # The published one has pickled weights alone on its main branch.
    FOLLOWING: _Kind("reads hints", "reads no hints yet", "--hint NAME", f"{DEPTH_REPO} --revision refs/pr/5"),
}
"""By the class of its pipeline."""
_FEWEST_TOKENS = 6
"""Of a caption without words: its begin and its end; and the four that the prior puts behind them."""
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""What safetensors calls them."""


def load_objective(
    config: TrainConfig, base: Repository, saved: Path | None, *, shaped: bool = False, own_masks: bool = False
) -> Objective:
    """The objective of `config.stage` with its network from `base`, or as `save_network` put it into `saved`.

    The parameters that learn are float32. With adapters the others never change, and are kept in the dtype that mixed
    precision computes in, as the upstream scripts keep them. Where it is `shaped`, batches are of pictures
    of several shapes; with `own_masks` samples have such. Raises the KcacheError of what does not fit the network.
    """
    network = load_network(config.stage, base.path if saved is None or config.lora_rank is not None else saved)
    whole = _begin(network, config, base) if saved is None else ()
    if config.lora_rank is not None:
        _keep_frozen(network, getattr(torch, COMPUTE_DTYPES[config.mixed_precision]), whole)
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
            )
            _say_whole(network, whole)
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


def _decoder_class(config: TrainConfig) -> str:
    """Name of the diffusers class that the run of `config` trains a decoder for."""
    return INPAINTING if config.inpaint else PIPELINES["decoder"].class_name if config.hint is None else FOLLOWING


def _begin(network: ModelMixin, config: TrainConfig, base: Repository) -> tuple[str, ...]:
    """Widen a plain decoder for what it is to learn, say what a run begins with, and which modules are new in part."""
    wanted = _decoder_class(config) if config.stage == "decoder" else None
    if wanted not in (INPAINTING, FOLLOWING):
        return ()
    kind, before = _KINDS[wanted], network.config.in_channels
    asked = "--inpaint" if config.inpaint else f"--hint {config.hint}"
    if not is_plain(network.config):
        logger.warning("%s begins with %s, which %s already", asked, base.name, kind.does)
        return ()
    (widen_for_masks if config.inpaint else widen_for_hints)(network)
    logger.warning(
        "%s begins with %s, which %s: its %d input channels are now %d; to begin with the published decoder that "
        "%s, give %s %s",
        asked,
        base.name,
        kind.lacks,
        before,
        network.config.in_channels,
        "does" if config.inpaint else "reads depths",
        _BASE,
        kind.published,
    )
    return learnt_whole(network)


def _keep_frozen(network: ModelMixin, dtype: torch.dtype, whole: Sequence[str]) -> None:
    """Bring what never changes beside adapters into `dtype`: not what the target is normalised by, nor what learns."""
    kept = ("clip_mean", "clip_std", *(f"{module}." for module in whole))
    for name, parameter in network.named_parameters():
        if not name.startswith(kept):
            parameter.data = parameter.data.to(dtype)


def _say_whole(network: ModelMixin, whole: Sequence[str]) -> None:
    if not whole:
        return
    sizes = {name: parameter.numel() for name, parameter in trainable_parameters(network).items()}
    logger.warning(
        "%s: trained whole beside the adapters, at the same learning rate, %s of %s parameters; the LoRA widens the "
        "plain decoder that it is loaded into",
        " and ".join(whole),
        f"{sum(size for name, size in sizes.items() if '.lora_' not in name):,}",
        f"{sum(sizes.values()):,}",
    )


def check_decoder(config: TrainConfig, base: Repository) -> None:
    """Check, before it is loaded, that the decoder of `base` is one that the run of `config` can begin with.

    Raises ModelError.
    """
    if config.stage != "decoder":
        return
    told = base.read(PIPELINES[config.stage].network).values
    inputs, outputs = (told.get(name) for name in ("in_channels", "out_channels"))
    if not isinstance(inputs, int) or not isinstance(outputs, int):
        return  # whoever loads it says so
    found, wanted = pipeline_class("decoder", told), _decoder_class(config)
    kind, asked = _KINDS[found], _KINDS[wanted]
    seen = f"the decoder of {base.name} has {inputs} input channels"
    if found not in (wanted, PIPELINES["decoder"].class_name):
        raise ModelError(
            f"{seen}: it {kind.does}; expected one that {asked.does}; train it on as what it is with {kind.flag}, or "
            f"give another such as {_BASE} {asked.published}"
        )
    if found != wanted and not is_plain(told):
        wider = 9 if config.inpaint else 8
        raise ModelError(
            f"{seen} and {outputs} output channels; expected for {asked.flag} 4 or {wider}, and 8; give a decoder of "
            f"Kandinsky 2.2 such as {_BASE} {asked.published}"
        )


def load_network(stage: str, folder: Path) -> ModelMixin:
    """The network of `stage` ("prior" or "decoder") in a pipeline's `folder`, float32 on the CPU; raises ModelError."""
    return load_pretrained(OBJECTIVES[stage].network_class, folder / PIPELINES[stage].network, torch.float32)


def within_run_memory(config: TrainConfig) -> AbstractContextManager[None]:
    """Turn lack of memory in the block, which does a run's work, into MemoryShortError: which settings take less."""
    return within_memory(f"training in batches of {config.train_batch_size}", partial(_what_takes_less, config))


def _what_takes_less(config: TrainConfig) -> str:
    smaller = max(1, config.train_batch_size // 2)
    turned = {
        f"--train-batch-size {smaller} with --gradient-accumulation-steps {2 * config.gradient_accumulation_steps}": (
            config.train_batch_size > 1
        ),
        "--gradient-checkpointing": not config.gradient_checkpointing,
        "--mixed-precision bf16": config.mixed_precision == "no",
        "--lora-rank 16": config.lora_rank is None,
        "--use-8bit-adam": not config.use_8bit_adam and config.lora_rank is None,
        "--residency mmap": config.residency not in ("mmap", "stream"),
        "no --validation-prompts": bool(config.validation_prompts),
    }
    flags = ", ".join(flag for flag, is_left in turned.items() if is_left) or "a GPU with more memory"
    folder, steps = Path(config.output_dir), []
    with suppress(OSError):
        steps = checkpoint_steps(folder)
    kept = (
        f"{folder / f'checkpoint-{steps[-1]}'} is kept: --resume-from-checkpoint latest goes on from it"
        if steps
        else "no checkpoint was saved"
    )
    return f"take less by {flags}; {kept}"


def check_batch(config: TrainConfig, base: Repository, noised: tuple[int, ...], samples: int) -> None:
    """Refuse a batch of `samples` that takes more than all memory, before anything is loaded.

    `noised` is the shape of what is noised, (4, h, w) or (D,). What is counted is what must be in memory at once, in
    two bytes a number: of the decoder what its first layers make of the latents, of the prior what goes into each layer
    for the fewest tokens that a caption has. Raises ConfigError.
    """
    network = base.read(PIPELINES[config.stage].network).values
    if config.stage == "decoder":
        channels = network.get("block_out_channels")
        width = _count(channels[0] if isinstance(channels, list) and channels else 1)
        values = width * (1 + _count(network.get("layers_per_block"))) * math.prod(noised[1:])
    else:
        sizes = ("num_attention_heads", "attention_head_dim", "num_layers")
        values = math.prod(_count(network.get(name)) for name in sizes) * _FEWEST_TOKENS
    check_fits(
        f"--train-batch-size {config.train_batch_size}",
        samples * values * 2,
        "give a smaller one, and more --gradient-accumulation-steps",
        default_device(),
    )


def _count(value: Any) -> int:
    """A size that a configuration says; 1 where it says none, to count too little rather than too much."""
    return value if isinstance(value, int) else 1


def find_adapted(config: TrainConfig, base: Repository, known: str | None = None) -> dict[str, str] | None:
    """Name of `base` and digest (hex) of the weights in it that adapters are trained on; None where all weights learn.

    The digest on record is `known`, by which these weights may have been named earlier. Raises ModelError when there
    are no such weights.
    """
    if config.lora_rank is None:
        return None
    with DigestMemo() as memo:
        return {"name": base.name, "weights": weights_digest(base, PIPELINES[config.stage].network, memo, known=known)}


def save_network(stage: str, network: ModelMixin, folder: Path, reserve: Reserve | None = None) -> None:
    """Write what learned into `folder`: adapters as one file for diffusers, a whole network where a pipeline has it.

    Into the room that `reserve` has for these files, if any.
    """
    save = partial(save_tensors, reserve=reserve)
    if getattr(network, "peft_config", None):
        save_lora(network, folder, save)
        return
    folder = folder / PIPELINES[stage].network
    folder.mkdir(parents=True)
    save(network.state_dict(), folder / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
    write_file(folder / CONFIG_NAME, lambda: [network.to_json_string().encode()], reserve)


def save_tensors(
    tensors: Mapping[str, torch.Tensor],
    path: Path,
    metadata: Mapping[str, str] | None = None,
    *,
    reserve: Reserve | None = None,
) -> None:
    """Write a safetensors file, one tensor after the other; equal tensors give equal bytes. Raises OSError.

    Not by safetensors, which writes into no file that is there already, and for its own user only. The format:
    https://huggingface.co/docs/safetensors/index#format
    """
    # Wide numbers first, so that each lies at a multiple of its size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def parts() -> Iterator[Any]:
        yield len(text).to_bytes(8, "little") + text
        for _, tensor in ordered:
            yield tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data

    write_file(path, parts, reserve)


def network_bytes(network: ModelMixin) -> int:
    """What a whole network's weights take, in memory and on the disk."""
    return sum(tensor.nbytes for tensor in network.state_dict().values())
