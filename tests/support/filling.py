"""Decoders of other kinds than the recorded one, made of it."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from kcache.objectives.widening import widen_for_hints, widen_for_masks

MODEL = "pretrained_decoder_model_name_or_path"


def decoder_like(folder: Path, oracle: Path, change: Callable[[UNet2DConditionModel], None]) -> str:
    """The recorded decoder in `folder`, its network changed."""
    folder.mkdir(parents=True)
    for component in ("movq", "scheduler", "model_index.json"):
        (folder / component).symlink_to(oracle / "decoder" / component)
    unet = UNet2DConditionModel.from_pretrained(oracle / "decoder", subfolder="unet")
    change(unet)
    unet.save_pretrained(folder / "unet")
    return str(folder)


def fills_holes(unet: UNet2DConditionModel) -> None:
    """Widen a plain decoder, and have it see what is new."""
    widen_for_masks(unet)
    with torch.no_grad():
        unet.conv_in.weight[:, 4:] = 0.1


def sees_hints(unet: UNet2DConditionModel) -> None:
    """Widen a plain decoder, and have it see a hint."""
    widen_for_hints(unet)
    with torch.no_grad():
        unet.conv_in.weight[:, 4:] = 0.1
        # As chance has it the block lets hardly anything of a hint through.
        for name, parameter in unet.add_embedding.input_hint_block.named_parameters():
            parameter *= 3 if name.endswith("weight") else 1
