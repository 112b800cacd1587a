"""Pictures from prompts, drawn by diffusers' own pipelines."""

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from kcache.config import DECODER_REPO, PRIOR_REPO
from kcache.encoders.pretrained import cast_pipeline, without_advice, without_bars
from kcache.encoders.repositories import PIPELINES, Repository, find_repository
from kcache.errors import ConfigError, ModelError
from kcache.foreign import told, within_memory
from kcache.machine import check_device, check_fits, default_device
from kcache.objectives.lora import WEIGHTS_FILE, adapted_network, fuse_lora, load_lora
from kcache.store.recipe import sides_of
from kcache.store.run_directory import CONFIG_FILE, METRICS_FILE, read_config

with without_advice():
    from diffusers import KandinskyV22Pipeline, KandinskyV22PriorPipeline

SIDE = 768
"""Height and width in pixels where nothing says what the decoder was trained at: what the published one is for."""


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
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    device: str | None = None,
) -> list[Image.Image]:
    """One picture per prompt, of `height` × `width` pixels.

    Each is a multiple of what MoVQ and the UNet need: 64 with the published networks. None takes the side of the
    pictures that the decoder, or the last LoRA of it, was trained on, rounded up to such a multiple; 768 where no run
    directory says.

    `decoder` and `prior` are run directories, folders or Hub ids of pipelines. `lora` are run directories or files of
    LoRA trainings of either network, recognised by the layers they adapt; several for one network add up. Picture i
    starts from noise of `seed` + i drawn on the CPU, so it depends on no other picture. `device` None takes CUDA, then
    MPS, then the CPU; networks run in float16 on CUDA and in float32 elsewhere. Raises ConfigError for a device that is
    not there and for a size or a guidance that cannot be, ModelError for a repository or a LoRA that cannot be used.
    """
    check_device(device)
    place = torch.device(device or default_device())
    _check_guidance("--guidance-scale", guidance_scale)
    _check_guidance("--prior-guidance-scale", prior_guidance_scale)
    adapters = _by_network(lora)
    repositories = _find("prior", prior), _find("decoder", decoder)
    height, width = _size(height, width, repositories[1], adapters["unet"])
    _check_fits(height, width, repositories[1], place)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]

    # One half after the other, each let go once it has drawn, so that the device never holds both.
    drawing = f"drawing {height}×{width} pixels on {place}", "give a smaller --height and --width, or another --device"
    with within_memory(*drawing):
        embeds = draw_embeds(
            _load(KandinskyV22PriorPipeline, repositories[0], place, "prior", adapters["prior"]),
            prompts,
            generators,
            num_inference_steps=prior_num_inference_steps,
            guidance_scale=prior_guidance_scale,
        )
        return draw_pictures(
            _load(KandinskyV22Pipeline, repositories[1], place, "unet", adapters["unet"]),
            embeds,
            generators,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
        )


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
        embeds = prior(list(prompts[part]), generator=list(generators[part]), **settings).to_tuple()
        drawn += zip(*(both.cpu().split(1) for both in embeds), strict=True)
    return drawn


def draw_pictures(
    decoder: KandinskyV22Pipeline,
    embeds: Sequence[Embeds],
    generators: Sequence[torch.Generator],
    *,
    batch_size: int = 1,
    latents: Sequence[torch.Tensor] | None = None,
    **settings: Any,
) -> list[Image.Image]:
    """The picture that the decoder's pipeline draws from each of `embeds`, `batch_size` pictures at a time.

    It begins with `latents`, (1, 4, height / 8, width / 8) each, or with noise of the picture's generator.
    """
    drawn: list[Image.Image] = []
    for start in range(0, len(embeds), batch_size):
        part = slice(start, start + batch_size)
        both = (torch.cat(column).to(decoder.device) for column in zip(*embeds[part], strict=True))
        begun = None if latents is None else torch.cat(list(latents[part]))
        drawn += decoder(*both, latents=begun, generator=list(generators[part]), **settings).images
    return drawn


def load_pipeline(kind: type[Any], folder: Path, *, purpose: str = "", **given: Any) -> Any:
    """The stock pipeline of class `kind` in `folder`, on the CPU and silent, with `given` in place of components.

    Raises ModelError, which says what for: its `purpose`.
    """
    what = f"{folder} cannot be loaded as {kind.__name__}{purpose}"
    with told(ModelError, what, "fetch or export it again, or give a repository that works"), without_bars():
        loaded = kind.from_pretrained(folder, use_safetensors=True, local_files_only=True, **given)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def _load(kind: type[Any], repository: Repository, device: torch.device, network: str, adapters: Sequence[Path]) -> Any:
    loaded = load_pipeline(kind, repository.path)
    for path in adapters:
        load_lora(loaded.components[network], path)
        # Fused in float32, as float16 would round once more; and a layer with one matrix draws faster than with three.
        fuse_lora(loaded.components[network])
    # Bars are for terminals: None hides them elsewhere.
    loaded.set_progress_bar_config(disable=None)
    cast_pipeline(loaded, torch.float16 if device.type == "cuda" else torch.float32)
    return loaded.to(device)


def _by_network(lora: Sequence[str]) -> Mapping[str, list[Path]]:
    adapters: dict[str, list[Path]] = {"prior": [], "unet": []}
    for path in map(Path, lora):
        adapters[adapted_network(path)].append(path)
    return adapters


def _check_guidance(flag: str, scale: float) -> None:
    if not (math.isfinite(scale) and scale >= 0):
        raise ConfigError(
            f"{flag} is {scale:g}; expected a number from 0 up: 4 is usual, and 1 or less draws without guidance; "
            f"type {flag} 4, or leave it out"
        )


def _find(half: str, name: str) -> Repository:
    """The repository `name` of `half`, "prior" or "decoder"; a run that has left none is told from others."""
    folder = Path(name).expanduser()
    if not any((folder / pipeline.network / "config.json").is_file() for pipeline in PIPELINES.values()):
        if (folder / WEIGHTS_FILE).is_file():
            learned = next(half for half, pipe in PIPELINES.items() if pipe.network == adapted_network(folder))
            base = _told(folder).get("base", {}).get("name")
            under = "" if base is None else f" --{learned} {shlex.quote(base)}"
            raise ModelError(
                f"{name} holds a LoRA of the {learned} ({WEIGHTS_FILE}) and no whole network; expected a pipeline, "
                f"with the LoRA beside it; type: kcache sample PROMPT{under} --lora {shlex.quote(name)}"
            )
        if (folder / METRICS_FILE).is_file():
            raise ModelError(
                f"{name} is the directory of a run that has left no trained network yet; expected one whose training "
                "has ended; go on with it by the same command and --resume-from-checkpoint latest"
            )
    return find_repository(name, None, PIPELINES[half].components)


def _size(height: int | None, width: int | None, decoder: Repository, lora: Sequence[Path]) -> tuple[int, int]:
    """Height and width in pixels: those asked for, checked, and what the decoder was trained at where one is None."""
    # MoVQ halves the sides once between two blocks, and the pipeline rounds those of latents to that factor, too.
    unit = 4 ** (len(decoder.read("movq").values.get("block_out_channels", [64])) - 1)
    for flag, side in (("--height", height), ("--width", width)):
        if side is not None and (side < unit or side % unit):
            near = max(unit, side // unit * unit)
            raise ConfigError(
                f"{flag} is {side}; expected a multiple of {unit}, which the decoder {decoder.name} draws in; type "
                f"{flag} {near}" + (f" or {flag} {near + unit}" if near < side else "")
            )
    if height is not None and width is not None:
        return height, width
    trained = math.ceil(_trained_side(decoder, lora) / unit) * unit
    return height or trained, width or trained


def _check_fits(height: int, width: int, decoder: Repository, device: torch.device) -> None:
    """Refuse a picture that takes more than all memory: its pixels and what MoVQ's last layer makes them of."""
    channels = decoder.read("movq").values.get("block_out_channels", [64])[0]
    values = height * width * (3 + channels) * (2 if device.type == "cuda" else 4)
    check_fits(f"a picture of {height}×{width} pixels", values, "give a smaller --height and --width", str(device))


def _trained_side(decoder: Repository, lora: Sequence[Path]) -> int:
    """Pixels of a side of what was trained on last: by a LoRA, then by the decoder; `SIDE` where no run says."""
    for path in (*reversed(lora), decoder.path):
        tables = _told(path if path.is_dir() else path.parent).get("cache", {}).get("tables", {})
        if sides := sides_of(tables):
            return sides[0]
    return SIDE


def _told(folder: Path) -> Mapping[str, Any]:
    """What a run directory says of itself; nothing where there is none."""
    return read_config(folder) if (folder / CONFIG_FILE).is_file() and (folder / METRICS_FILE).is_file() else {}
