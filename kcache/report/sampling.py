"""Pictures from prompts, drawn by diffusers' own pipelines."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from kcache.config import DECODER_REPO, PRIOR_REPO
from kcache.encoders.pretrained import without_advice
from kcache.encoders.repositories import Repository
from kcache.errors import ConfigError
from kcache.foreign import within_memory
from kcache.machine import check_device, check_fits, default_device, kept_to_groups
from kcache.report.drawn.halves import by_network, class_of, find_half, load_half
from kcache.report.drawn.kept import put_back
from kcache.report.drawn.originals import STRENGTH, check_drawn_by, check_steps, read_original
from kcache.report.drawn.sizes import picture_size, shapes_in

with without_advice():
    from diffusers import (
        DiffusionPipeline,
        KandinskyV22Img2ImgPipeline,
        KandinskyV22PriorPipeline,
    )


def sample(
    prompts: Sequence[str],
    *,
    decoder: str = DECODER_REPO,
    prior: str = PRIOR_REPO,
    decoder_revision: str | None = None,
    prior_revision: str | None = None,
    lora: Sequence[str] = (),
    num_inference_steps: int = 50,
    prior_num_inference_steps: int = 25,
    guidance_scale: float = 4.0,
    prior_guidance_scale: float = 4.0,
    height: int | None = None,
    width: int | None = None,
    aspect_ratio: str | None = None,
    image: str | os.PathLike[str] | None = None,
    mask: str | os.PathLike[str] | None = None,
    strength: float | None = None,
    hint: str | os.PathLike[str] | None = None,
    seed: int = 0,
    device: str | None = None,
) -> list[Image.Image]:
    """One picture per prompt, of `height` × `width` pixels.

    Each is a multiple of what MoVQ and the UNet need: 64 with the published networks. None takes the shape that most of
    the pictures have that the decoder, or the last LoRA of it, was trained on, rounded up to such multiples; 768 where
    no run directory says. `aspect_ratio`, a width to a height such as "3:2", takes the nearest of the shapes that it
    was trained on, or the same area where it knows squares alone.

    With the file of an `image`, each prompt is drawn onto that one: with a decoder that fills holes where the file of a
    `mask` is white, and what is kept around has its own pixels, by `put_back`; with a plain one all over, by the last
    `strength` of its steps, from 0 to 1. Where nothing says how large, its own proportions take the place of
    `aspect_ratio`; to other proportions its middle is cropped. With the file of a `hint` each prompt is drawn by that
    one, whose size counts likewise, with a decoder that reads hints.

    `decoder` and `prior` are run directories, their checkpoints, folders or Hub ids of pipelines; the revisions are
    branches, tags or commits of the latter. `lora` are run directories, checkpoints or files of LoRA trainings of
    either network, recognised by the layers they adapt; several for one network add up, and one of a decoder that was
    widened makes a plain decoder as wide. A checkpoint draws with the average of its weights, where it has one, as its
    run's result would. Picture i starts from noise of `seed` + i drawn on the CPU, so it depends on no other picture.
    `device` None takes CUDA, then MPS, then the CPU; networks run in float16 on CUDA and in float32 elsewhere. Raises
    ConfigError for a device that is not there and for a size or a guidance that cannot be, ModelError for a repository
    or a LoRA that cannot be used.
    """
    check_device(device)
    place = torch.device(device or default_device())
    _check_guidance("--guidance-scale", guidance_scale)
    _check_guidance("--prior-guidance-scale", prior_guidance_scale)
    original = read_original(image, mask, strength, hint)
    adapters = by_network(lora)
    halves = {
        "prior": find_half("prior", prior, prior_revision),
        "unet": find_half("decoder", decoder, decoder_revision),
    }
    most = halves["unet"].repository.read("scheduler").values.get("num_train_timesteps", 1000)
    _check_steps("--num-inference-steps", num_inference_steps, 1, most)
    _check_steps("--prior-num-inference-steps", prior_num_inference_steps, 2, None)
    kind = class_of("decoder", halves["unet"], adapters["unet"])
    check_drawn_by(kind, " with ".join([decoder, *map(str, adapters["unet"])]), original, strength)
    onto: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    if original is not None and original.mask is None and not original.is_hint:
        kind, settings = KandinskyV22Img2ImgPipeline.__name__, {"strength": STRENGTH if strength is None else strength}
        check_steps(settings["strength"], num_inference_steps, most)
    trained = [path if path.is_dir() else path.parent for path in reversed(adapters["unet"])]
    counts = shapes_in([*trained, halves["unet"].learned])
    like = None if original is None else original.shape
    height, width = picture_size(height, width, aspect_ratio, counts, halves["unet"].repository, like=like)
    _check_fits(height, width, halves["unet"].repository, place)
    downsampling = halves["unet"].repository.read("movq").downsampling
    if original is not None:
        onto = original.fitted((height, width), downsampling)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]

    # One half after the other, each let go once it has drawn, so that the device never holds both.
    drawing = f"drawing {height}×{width} pixels on {place}", "give a smaller --height and --width, or another --device"
    with within_memory(*drawing):
        embeds = draw_embeds(
            load_half(KandinskyV22PriorPipeline, halves["prior"], place, "prior", adapters["prior"]),
            prompts,
            generators,
            num_inference_steps=prior_num_inference_steps,
            guidance_scale=prior_guidance_scale,
        )
        drawn = draw_pictures(
            load_half(getattr(diffusers, kind), halves["unet"], place, "unet", adapters["unet"]),
            embeds,
            generators,
            onto=onto,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            **settings,
        )
    if original is None or original.mask is None:
        return drawn
    return [put_back(picture, onto["image"], onto["mask_image"], downsampling) for picture in drawn]


Embeds = tuple[torch.Tensor, torch.Tensor]
"""What the decoder draws a picture from: image_embeds and negative_image_embeds, each (1, D), on the CPU."""


def draw_embeds(
    prior: KandinskyV22PriorPipeline,
    prompts: Sequence[str],
    generators: Sequence[torch.Generator],
    *,
    batch_size: int = 1,
    **settings: Any,
) -> list[Embeds]:
    """What the prior's pipeline makes of each prompt from noise of its generator, `batch_size` prompts at a time.

    `settings` are the pipeline's own, such as num_inference_steps and guidance_scale.
    """
    drawn: list[Embeds] = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        with kept_to_groups(prior.device.type):
            embeds = prior(list(prompts[part]), generator=list(generators[part]), **settings).to_tuple()
        drawn += zip(*(both.cpu().split(1) for both in embeds), strict=True)
    return drawn


def draw_pictures(
    decoder: DiffusionPipeline,
    embeds: Sequence[Embeds],
    generators: Sequence[torch.Generator],
    *,
    batch_size: int = 1,
    latents: Sequence[torch.Tensor] | None = None,
    onto: Mapping[str, Image.Image | torch.Tensor] | None = None,
    **settings: Any,
) -> list[Image.Image]:
    """The picture that the decoder's pipeline draws from each of `embeds`, `batch_size` pictures at a time.

    It begins with `latents`, (1, 4, height / 8, width / 8) each, or with noise of the picture's generator. All of them
    are drawn onto the same picture, "image", and in the same hole of it, "mask_image": the pipeline, which has them of
    the size that is drawn, takes what it keeps from the first of a batch. A "hint" (3, H, W) is that of all of them.
    """
    if isinstance(decoder, KandinskyV22Img2ImgPipeline):
        # Its own would resize the picture to a width of `height` and a height of `width`.
        decoder.image_processor = VaeImageProcessor(
            do_resize=False, vae_latent_channels=decoder.movq.config.latent_channels
        )
    drawn: list[Image.Image] = []
    for start in range(0, len(embeds), batch_size):
        part = slice(start, start + batch_size)
        positive, negative = (torch.cat(column).to(decoder.device) for column in zip(*embeds[part], strict=True))
        given = {
            name: torch.stack([each] * len(positive)) if isinstance(each, torch.Tensor) else [each] * len(positive)
            for name, each in (onto or {}).items()
        }
        begun = {} if latents is None else {"latents": torch.cat(list(latents[part]))}
        with kept_to_groups(decoder.device.type):
            drawn += decoder(
                image_embeds=positive,
                negative_image_embeds=negative,
                generator=list(generators[part]),
                **given,
                **begun,
                **settings,
            ).images
    return drawn


def _check_guidance(flag: str, scale: float) -> None:
    if not (math.isfinite(scale) and scale >= 0):
        raise ConfigError(
            f"{flag} is {scale:g}; expected a number from 0 up: 4 is usual, and 1 or less draws without guidance; "
            f"type {flag} 4, or leave it out"
        )


def _check_steps(flag: str, steps: int, least: int, most: int | None) -> None:
    """Refuse steps that the pipelines' schedulers cannot take."""
    if steps < least or (most is not None and steps > most):
        expected = f"{least} or more" if most is None else f"{least} to {most}"
        raise ConfigError(
            f"{flag} is {steps}; expected {expected}; type {flag} {least if steps < least else most}, or leave it out"
        )


def _check_fits(height: int, width: int, decoder: Repository, device: torch.device) -> None:
    """Refuse a picture that takes more than all memory: its pixels and what MoVQ's last layer makes them of."""
    channels = decoder.read("movq").values.get("block_out_channels", [64])[0]
    values = height * width * (3 + channels) * (2 if device.type == "cuda" else 4)
    check_fits(f"a picture of {height}×{width} pixels", values, "give a smaller --height and --width", str(device))
