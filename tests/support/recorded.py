"""The training steps that the unmodified diffusers scripts recorded, and objectives to take them with."""

from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, PriorTransformer, UNet2DConditionModel
from torch import Tensor

from kcache.objectives.losses import DecoderObjective, Objective, PriorObjective


def load_objective(oracle: Path, stage: str, *, packed: bool = True) -> Objective:
    if stage == "prior":
        return PriorObjective(PriorTransformer.from_pretrained(oracle / "prior", subfolder="prior"), packed=packed)
    unet = UNet2DConditionModel.from_pretrained(oracle / "decoder", subfolder="unet")
    return DecoderObjective(unet, DDPMScheduler.from_pretrained(oracle / "decoder", subfolder="scheduler"))


def recorded_steps(oracle: Path, stage: str) -> list[dict[str, Tensor]]:
    with np.load(oracle / f"upstream_{stage}.npz") as arrays:
        steps: list[dict[str, Tensor]] = [{} for _ in range(int(arrays["n"]))]
        for key in set(arrays.files) - {"n"}:
            number, name = key.split("/")
            steps[int(number)][name] = torch.from_numpy(arrays[key])
    return [{**step, **flat_text(step)} if stage == "prior" else step for step in steps]


def flat_text(step: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = step["text_mask"]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    return {"text_encoder_hidden_states": step["last_hidden_state"][mask], "text_offsets": offsets}
