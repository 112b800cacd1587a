"""Pictures from prompts, drawn by diffusers' own pipelines."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from safetensors.torch import load_file

from kcache.config import DECODER_REPO, PRIOR_REPO
from kcache.encoders.pretrained import cast_pipeline, load_pretrained, without_advice, without_bars
from kcache.encoders.repositories import COMPONENTS, PIPELINES, Repository, check_revision, find_repository
from kcache.errors import ConfigError, ModelError, RunError
from kcache.foreign import told, within_memory
from kcache.machine import check_device, check_fits, default_device, kept_to_groups
from kcache.objectives.lora import WEIGHTS_FILE, adapted_network, fuse_lora, load_lora
from kcache.store.checkpoint import STATE_FILE, checkpoint_steps
from kcache.store.recipe import sides_of
from kcache.store.run_directory import (
    AVERAGE_FILE,
    CONFIG_FILE,
    RAW_FOLDER,
    base_of,
    is_run,
    logger,
    read_config,
    run_of,
)  # fmt: skip

with without_advice():
    from diffusers import KandinskyV22Pipeline, KandinskyV22PriorPipeline

SIDE = 768
"""Height and width in pixels where nothing says what the decoder was trained at: what the published one is for."""


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
    seed: int = 0,
    device: str | None = None,
) -> list[Image.Image]:
    """One picture per prompt, of `height` × `width` pixels.

    Each is a multiple of what MoVQ and the UNet need: 64 with the published networks. None takes the side of the
    pictures that the decoder, or the last LoRA of it, was trained on, rounded up to such a multiple; 768 where no run
    directory says.

    `decoder` and `prior` are run directories, their checkpoints, folders or Hub ids of pipelines; the revisions are
    branches, tags or commits of the latter. `lora` are run directories, checkpoints or files of LoRA trainings of
    either network, recognised by the layers they adapt; several for one network add up. A checkpoint draws with the
    average of its weights, where it has one, as its run's result would. Picture i
    starts from noise of `seed` + i drawn on the CPU, so it depends on no other picture. `device` None takes CUDA, then
    MPS, then the CPU; networks run in float16 on CUDA and in float32 elsewhere. Raises ConfigError for a device that is
    not there and for a size or a guidance that cannot be, ModelError for a repository or a LoRA that cannot be used.
    """
    check_device(device)
    place = torch.device(device or default_device())
    _check_guidance("--guidance-scale", guidance_scale)
    _check_guidance("--prior-guidance-scale", prior_guidance_scale)
    adapters = _by_network(lora)
    halves = {"prior": _find("prior", prior, prior_revision), "unet": _find("decoder", decoder, decoder_revision)}
    height, width = _size(height, width, halves["unet"], adapters["unet"])
    _check_fits(height, width, halves["unet"].repository, place)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]

    # One half after the other, each let go once it has drawn, so that the device never holds both.
    drawing = f"drawing {height}×{width} pixels on {place}", "give a smaller --height and --width, or another --device"
    with within_memory(*drawing):
        embeds = draw_embeds(
            _load(KandinskyV22PriorPipeline, halves["prior"], place, "prior", adapters["prior"]),
            prompts,
            generators,
            num_inference_steps=prior_num_inference_steps,
            guidance_scale=prior_guidance_scale,
        )
        return draw_pictures(
            _load(KandinskyV22Pipeline, halves["unet"], place, "unet", adapters["unet"]),
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
        with kept_to_groups(prior.device.type):
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
        with kept_to_groups(decoder.device.type):
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


@dataclass(frozen=True, kw_only=True)
class _Half:
    """One half of Kandinsky 2.2 to draw with."""

    repository: Repository
    learned: Path
    """Where its network lies: in the repository, in a checkpoint or in raw/."""


def _load(kind: type[Any], half: _Half, device: torch.device, network: str, adapters: Sequence[Path]) -> Any:
    given = {}
    if half.learned != half.repository.path:
        kind_of_network = getattr(diffusers, str(COMPONENTS[network].class_name))
        given = {network: load_pretrained(kind_of_network, half.learned / network, torch.float32)}
    loaded = load_pipeline(kind, half.repository.path, **given)
    _take_average(loaded.components[network], half.learned)
    for path in adapters:
        load_lora(loaded.components[network], path)
        _take_average(loaded.components[network], path)
        # Fused in float32, as float16 would round once more; and a layer with one matrix draws faster than with three.
        fuse_lora(loaded.components[network])
    # Bars are for terminals: None hides them elsewhere.
    loaded.set_progress_bar_config(disable=None)
    cast_pipeline(loaded, torch.float16 if device.type == "cuda" else torch.float32)
    return loaded.to(device)


def _take_average(network: torch.nn.Module, checkpoint: Path) -> None:
    """Give `network` the averages of what learned that the folder of a checkpoint has, if it has some."""
    file = checkpoint / AVERAGE_FILE
    if not file.is_file():
        return
    what = f"{file} cannot be taken as the average of {type(network).__name__}'s weights"
    with told(ModelError, what, "expected what a run with --use-ema wrote; give another checkpoint"):
        for name, tensor in load_file(file).items():
            network.get_parameter(name).data.copy_(tensor)
    logger.warning("%s: drawn with the average of its weights, as its run's result", checkpoint)


def _by_network(lora: Sequence[str]) -> Mapping[str, list[Path]]:
    adapters: dict[str, list[Path]] = {"prior": [], "unet": []}
    for path in map(Path, lora):
        whole = [] if (path / WEIGHTS_FILE).is_file() else _networks_in(path)
        if whole:
            raise ModelError(
                f"--lora {path} holds a whole network of the {whole[0]}, and no adapters ({WEIGHTS_FILE}); expected a "
                f"LoRA; type: --{whole[0]} {shlex.quote(str(path))}"
            )
        _check_begun(path)
        adapters[adapted_network(path)].append(path)
    return adapters


def _networks_in(folder: Path) -> list[str]:
    """The halves whose networks lie in `folder`."""
    return [half for half, pipeline in PIPELINES.items() if (folder / pipeline.network / "config.json").is_file()]


def _check_begun(folder: Path) -> None:
    """Raise ModelError where `folder` is a run that has left nothing yet, and say what it has."""
    if not is_run(folder) or (folder / WEIGHTS_FILE).is_file() or _networks_in(folder):
        return
    steps = checkpoint_steps(folder)
    newest = f", or draw with its newest checkpoint: {folder / f'checkpoint-{steps[-1]}'}" if steps else ""
    raise ModelError(
        f"{folder} is the directory of a run that has left no trained network yet; expected one whose training has "
        f"ended; go on with it by the same command and --resume-from-checkpoint latest{newest}"
    )


def _check_guidance(flag: str, scale: float) -> None:
    if not (math.isfinite(scale) and scale >= 0):
        raise ConfigError(
            f"{flag} is {scale:g}; expected a number from 0 up: 4 is usual, and 1 or less draws without guidance; "
            f"type {flag} 4, or leave it out"
        )


def _find(half: str, name: str, revision: str | None) -> _Half:
    """What `name` is of `half`, "prior" or "decoder": a pipeline, or a network that a run left beside one."""
    check_revision(f"--{half}-revision", name, revision)
    folder, pipeline = Path(name).expanduser(), PIPELINES[half]
    if not _networks_in(folder) and (folder / WEIGHTS_FILE).is_file():
        learned = next(half for half, pipe in PIPELINES.items() if pipe.network == adapted_network(folder))
        base = base_of(folder)
        under = "" if base is None else f" --{learned} {shlex.quote(base[0])}"
        raise ModelError(
            f"{name} holds a LoRA of the {learned} ({WEIGHTS_FILE}) and no whole network; expected a pipeline, "
            f"with the LoRA beside it; type: kcache sample PROMPT{under} --lora {shlex.quote(name)}"
        )
    is_part = (folder / STATE_FILE).is_file() or folder.name == RAW_FOLDER
    if is_part and half in _networks_in(folder):
        return _Half(repository=_pipeline_of(folder, half), learned=folder.resolve())
    _check_begun(folder)
    repository = find_repository(name, revision, pipeline.components)
    return _Half(repository=repository, learned=repository.path)


def _pipeline_of(folder: Path, half: str) -> Repository:
    """The pipeline that the network in `folder`, a checkpoint or raw/, goes into: its run's, or that it was begun from.

    Raises ModelError where there is neither.
    """
    run_dir, base = run_of(folder), base_of(folder)
    components = PIPELINES[half].components
    if run_dir is not None and all((run_dir / name).is_dir() for name in components):
        return find_repository(str(run_dir), None, components)
    others = [name for name in components if name != PIPELINES[half].network]
    if base is None:
        raise ModelError(
            f"{folder} holds a network of the {half} alone, and nothing tells what pipeline it was trained in; "
            f"expected it in the directory of its run ({CONFIG_FILE}); put it back there, or put {', '.join(others)} "
            "beside it"
        )
    try:
        return find_repository(*base, components)
    except ModelError as error:
        raise ModelError(
            f"{folder} holds a network of the {half} alone, trained in the pipeline {base[0]}: {error}; put that back, "
            f"or put its {', '.join(others)} beside the network"
        ) from error


def _size(height: int | None, width: int | None, half: _Half, lora: Sequence[Path]) -> tuple[int, int]:
    """Height and width in pixels: those asked for, checked, and what the decoder was trained at where one is None."""
    # MoVQ halves the sides once between two blocks, and the pipeline rounds those of latents to that factor, too.
    decoder = half.repository
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
    trained = math.ceil(_trained_side(half, lora) / unit) * unit
    return height or trained, width or trained


def _check_fits(height: int, width: int, decoder: Repository, device: torch.device) -> None:
    """Refuse a picture that takes more than all memory: its pixels and what MoVQ's last layer makes them of."""
    channels = decoder.read("movq").values.get("block_out_channels", [64])[0]
    values = height * width * (3 + channels) * (2 if device.type == "cuda" else 4)
    check_fits(f"a picture of {height}×{width} pixels", values, "give a smaller --height and --width", str(device))


def _trained_side(decoder: _Half, lora: Sequence[Path]) -> int:
    """Pixels of a side of what was trained on last: by a LoRA, then by the decoder; `SIDE` where no run says."""
    for path in (*reversed(lora), decoder.learned):
        cache = _told(path if path.is_dir() else path.parent).get("cache")
        tables = cache.get("tables") if isinstance(cache, dict) else None
        if isinstance(tables, dict) and (sides := sides_of(tables)):
            return sides[0]
    return SIDE


def _told(folder: Path) -> Mapping[str, Any]:
    """What the run that `folder` is, or is of, says of itself; nothing where there is none, or none to read."""
    run_dir = run_of(folder)
    try:
        return {} if run_dir is None else read_config(run_dir)
    except RunError as error:
        logger.warning("%s: pictures are drawn as large as no run says", error)
        return {}
