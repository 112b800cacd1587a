"""Pictures from prompts, drawn by diffusers' own pipelines."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import KandinskyV22Pipeline, KandinskyV22PriorPipeline

from kcache.adapters import adapted_network, fuse_lora, load_lora
from kcache.config import DECODER_REPO, PRIOR_REPO
from kcache.export import COMPONENTS
from kcache.pretrained import cast_pipeline, without_bars
from kcache.repositories import Repository, find_repository

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["sample"]


def sample(
    prompts: Sequence[str],
    *,
    decoder: str = DECODER_REPO,
    prior: str = PRIOR_REPO,
    lora: Sequence[str] = (),
    num_inference_steps: int = 50,
    prior_num_inference_steps: int = 25,
    guidance_scale: float = 4.0,
    prior_guidance_scale: float = 4.0,
    height: int = 768,
    width: int = 768,
    seed: int = 0,
    device: str | None = None,
) -> "list[Image.Image]":
    """One picture per prompt, of `height` × `width` pixels rounded up to a multiple of 64.

    `decoder` and `prior` are run directories, folders or Hub ids of pipelines. `lora` are run directories or files of
    LoRA trainings of either network, recognised by the layers they adapt; several for one network add up. Picture i
    starts from noise of `seed` + i drawn on the CPU, so it depends on no other picture. `device` None takes CUDA, then
    MPS, then the CPU; networks run in float16 on CUDA and in float32 elsewhere. Raises ModelError for a repository or a
    LoRA that cannot be used.
    """
    place = torch.device(device) if device is not None else _default_device()
    adapters = _by_network(lora)
    repositories = find_repository(prior, None, COMPONENTS["prior"]), find_repository(decoder, None, COMPONENTS["unet"])
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]

    # One half after the other, each let go at its function's end, so that the device never holds both.
    embeds = _draw_embeds(
        repositories[0],
        place,
        adapters["prior"],
        prompts,
        generators,
        num_inference_steps=prior_num_inference_steps,
        guidance_scale=prior_guidance_scale,
    )
    return _draw_pictures(
        repositories[1],
        place,
        adapters["unet"],
        embeds,
        generators,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
    )


Embeds = tuple[torch.Tensor, torch.Tensor]
"""What the decoder draws from: image_embeds and negative_image_embeds, each (1, D)."""


def _draw_embeds(
    repository: Repository,
    device: torch.device,
    adapters: Sequence[Path],
    prompts: Sequence[str],
    generators: Sequence[torch.Generator],
    **settings: Any,
) -> list[Embeds]:
    pipeline = _load(KandinskyV22PriorPipeline, repository, device, "prior", adapters)
    return [
        pipeline(prompt, generator=generator, **settings).to_tuple()
        for prompt, generator in zip(prompts, generators, strict=True)
    ]


def _draw_pictures(
    repository: Repository,
    device: torch.device,
    adapters: Sequence[Path],
    embeds: Sequence[Embeds],
    generators: Sequence[torch.Generator],
    **settings: Any,
) -> "list[Image.Image]":
    pipeline = _load(KandinskyV22Pipeline, repository, device, "unet", adapters)
    return [
        pipeline(image_embeds, negative_image_embeds, generator=generator, **settings).images[0]
        for (image_embeds, negative_image_embeds), generator in zip(embeds, generators, strict=True)
    ]


def _load(
    pipeline: type[KandinskyV22PriorPipeline] | type[KandinskyV22Pipeline],
    repository: Repository,
    device: torch.device,
    network: str,
    adapters: Sequence[Path],
) -> KandinskyV22PriorPipeline | KandinskyV22Pipeline:
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    with without_bars():
        loaded = pipeline.from_pretrained(repository.path, use_safetensors=True, local_files_only=True)
    for path in adapters:
        load_lora(loaded.components[network], path)
        # Fused in float32, as float16 would round once more; and a layer with one matrix draws faster than with three.
        fuse_lora(loaded.components[network])
    # Bars are for terminals: None hides them elsewhere.
    loaded.set_progress_bar_config(disable=None)
    cast_pipeline(loaded, dtype)
    return loaded.to(device)


def _by_network(lora: Sequence[str]) -> Mapping[str, list[Path]]:
    adapters: dict[str, list[Path]] = {"prior": [], "unet": []}
    for path in map(Path, lora):
        adapters[adapted_network(path)].append(path)
    return adapters


def _default_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
