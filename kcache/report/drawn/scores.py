"""How well drawn pictures fit their prompts: the cosine that `caption_cosine` is of samples, by the prior's CLIP."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from kcache.encoders.pixels import clip_pixels, clip_processor
from kcache.encoders.pretrained import cast_pipeline, without_advice
from kcache.encoders.recipes import processor_settings
from kcache.encoders.repositories import Repository
from kcache.report.drawn.halves import load_pipeline

with without_advice():
    from diffusers import KandinskyV22PriorPipeline


@torch.inference_mode()
def prompt_scores(
    prior: Repository,
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    dtype: torch.dtype,
    device: str | torch.device,
) -> list[float]:
    """The cosine of the embeddings of each picture and its prompt, by the encoders of a prior's repository.

    They are loaded for it and let go: nothing of them stays on the device. Raises ModelError.
    """
    purpose = ", which is to say how well drawn pictures fit their prompts"
    encoders = load_pipeline(KandinskyV22PriorPipeline, prior.path, purpose=purpose, prior=None)
    cast_pipeline(encoders, dtype)
    encoders.to(device)
    texts = {prompt: encoders._encode_prompt([prompt], device, 1, False)[0] for prompt in dict.fromkeys(prompts)}
    processor = clip_processor(processor_settings(prior))
    scores = []
    for picture, prompt in zip(pictures, prompts, strict=True):
        pixels = torch.from_numpy(np.stack([clip_pixels(picture.convert("RGB"), processor)])).to(device, dtype)
        image = encoders.image_encoder(pixels).image_embeds
        scores.append(torch.cosine_similarity(image.float(), texts[prompt].float()).item())
    return scores
