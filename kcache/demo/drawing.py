"""Pictures of the demo: drawn by diffusers' own pipelines, or put through the MoVQ and back."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import KandinskyV22Pipeline, KandinskyV22PriorPipeline, VQModel
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from kcache.demo.digits import SIDE

__all__ = ["draw", "round_trip"]

BATCH_SIZE = 50
GUIDANCE = 1.5
"""Of both halves; chosen on prompts that were trained on: more makes the pictures of a prompt more alike."""


def draw(prompts: Sequence[str], prior: Path, decoder: Path, *, steps: int, seed: int) -> list[Image.Image]:
    """A picture per prompt from the pipelines in two run directories, with `steps` steps each.

    Picture i starts from noise of `seed` + i. They are drawn in batches, which with networks this small are many times
    faster than one by one.
    """
    pipelines = (
        KandinskyV22PriorPipeline.from_pretrained(prior, local_files_only=True),
        KandinskyV22Pipeline.from_pretrained(decoder, local_files_only=True),
    )
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), BATCH_SIZE):
        batch = list(prompts[start : start + BATCH_SIZE])
        settings = {
            "num_inference_steps": steps,
            "guidance_scale": GUIDANCE,
            "generator": [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))],
        }
        embeds = pipelines[0](batch, **settings).to_tuple()
        pictures += pipelines[1](*embeds, height=SIDE, width=SIDE, **settings).images
    return pictures


@torch.no_grad()
def round_trip(pictures: Sequence[Image.Image], decoder: Path) -> list[Image.Image]:
    """`pictures` as the MoVQ of a decoder pipeline gives them back: the best that the decoder could draw."""
    movq = VQModel.from_pretrained(decoder, subfolder="movq", local_files_only=True)
    processor = VaeImageProcessor(vae_scale_factor=1)
    latents = movq.encode(processor.preprocess(list(pictures))).latents
    return processor.postprocess(movq.decode(latents, force_not_quantize=True).sample)
