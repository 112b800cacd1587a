"""Pictures that show how training goes: the same prompts from the same noise, drawn by the network as it is now.

The stock pipelines draw them. What the frozen networks make of the prompts never changes, so they are asked once,
before training: the large encoders never share the device with the network that learns.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from kcache.config import TrainConfig
from kcache.durable import write_bytes
from kcache.encoders.pretrained import cast_pipeline, without_advice, without_bars
from kcache.encoders.repositories import Repository, component_config
from kcache.errors import ModelError
from kcache.objectives.blocks import evaluating
from kcache.report.grid import captioned_grid, png_bytes
from kcache.store.run_directory import PICTURES_FOLDER

with without_advice():
    from diffusers import KandinskyV22Pipeline, KandinskyV22PriorPipeline

if TYPE_CHECKING:
    from PIL import Image

PRIOR_STEPS = 25
DECODER_STEPS = 20
"""Half of what a finished picture takes: enough to see what was learned."""
GUIDANCE_SCALE = 4.0
"""Of both halves, as in the pipelines' own examples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Beginning:
    """What the decoder draws one picture from."""

    image_embeds: Tensor
    """(1, D), on the CPU."""
    negative_image_embeds: Tensor
    generator_state: Tensor
    """Of the picture's generator, as the prior left it."""


class PromptPictures:
    """Draws `config.num_validation_images` pictures of each of `config.validation_prompts`, whenever it is asked.

    `base` is the repository of the half that learns, `counterpart` that of the other one. Pictures have `resolution`
    pixels a side, rounded up to a multiple of 64. Picture i starts from noise of `config.seed` + i drawn on the CPU,
    the same at each call: it is what `kcache sample` draws with equal settings. One process of a run is enough for it.
    """

    def __init__(
        self,
        config: TrainConfig,
        base: Repository,
        counterpart: Repository,
        resolution: int,
        device: str | torch.device,
    ) -> None:
        self._learning = config.stage
        self._seed = config.seed
        self._base = base
        self._counterpart = counterpart
        self._resolution = resolution
        self._device = torch.device(device)
        self._learning_dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[
            config.mixed_precision
        ]
        # As in `kcache sample`.
        self._frozen_dtype = torch.float16 if self._device.type == "cuda" else torch.float32
        self._prompts = [text for text in config.validation_prompts for _ in range(config.num_validation_images)]

    @property
    def prompts(self) -> list[str]:
        """The prompt of each picture that `draw` returns."""
        return list(self._prompts)

    def prepare(self) -> None:
        """Ask the frozen networks all that they will be asked; to be called once, before anything else.

        Afterwards the device is free of them. In the host's memory stay some vectors per prompt and what turns image
        embeddings into pictures: MoVQ and, where the prior learns, the UNet. Raises ModelError when the two halves do
        not belong together or one of them cannot be loaded.
        """
        if self._learning == "prior":
            _check_widths(self._base, self._counterpart)
            self._prior = _remember_prompts(self._base, self._prompts, self._frozen_dtype, self._device)
            self._decoder = _load(KandinskyV22Pipeline, self._counterpart, self._frozen_dtype)
        else:
            _check_widths(self._counterpart, self._base)
            prior = _load(KandinskyV22PriorPipeline, self._counterpart, self._frozen_dtype)
            self._beginnings = _begin(prior.to(self._device), self._prompts, self._seed)
            self._decoder = _load(KandinskyV22Pipeline, self._base, torch.float32, unet=None)

    def draw(self, network: torch.nn.Module) -> "list[Image.Image]":
        """The pictures, in the order of `prompts`, drawn by `network`, the PriorTransformer or UNet2DConditionModel.

        It must be on the device. It runs in evaluation mode, in the precision of training, and is left as it was; no
        global generator of random numbers is touched.
        """
        with evaluating(network):
            if self._learning == "prior":
                self._prior.prior = network
                with self._computing_in(self._learning_dtype):
                    beginnings = _begin(self._prior, self._prompts, self._seed)
                with (
                    _on_device(self._decoder.unet, self._decoder.movq, device=self._device),
                    self._computing_in(self._frozen_dtype),
                ):
                    return _finish(self._decoder, beginnings, self._resolution)
            self._decoder.unet = network
            with _on_device(self._decoder.movq, device=self._device), self._computing_in(self._learning_dtype):
                return _finish(self._decoder, self._beginnings, self._resolution)

    def _computing_in(self, dtype: torch.dtype) -> torch.autocast:
        return torch.autocast(self._device.type, dtype, enabled=dtype != torch.float32)


def save_pictures(run_dir: Path, step: int, pictures: "Sequence[Image.Image]", prompts: Sequence[str]) -> Path:
    """Write pictures with their captions as one PNG into the run directory, e.g. pictures/step-000500.png; returns it.

    `prompts` has one for each picture. Raises CacheWriteError when it cannot be written.
    """
    path = run_dir / PICTURES_FOLDER / f"step-{step:06d}.png"
    path.parent.mkdir(exist_ok=True)
    write_bytes(path, png_bytes(captioned_grid(pictures, prompts)))
    return path


class _RememberingPrior(KandinskyV22PriorPipeline):
    """The stock pipeline, with what its two encoders answered before in place of the encoders."""

    prompt_states: dict[str, tuple[Tensor, ...]]
    """By prompt: text_embeds (2, D), last_hidden_state (2, 77, D) and mask (2, 77), the empty caption's first."""
    zero_embed: Tensor
    """(1, D): the embedding of an all-zero picture."""

    def _encode_prompt(self, prompt: list[str], device: torch.device, *settings: Any) -> tuple[Tensor, ...]:
        return tuple(state.to(device) for state in self.prompt_states[prompt[0]])

    def get_zero_embed(self, batch_size: int = 1, device: torch.device | None = None) -> Tensor:
        return self.zero_embed.repeat(batch_size, 1).to(device)


@torch.no_grad()
def _remember_prompts(
    repository: Repository, prompts: Sequence[str], dtype: torch.dtype, device: torch.device
) -> _RememberingPrior:
    encoders = _load(KandinskyV22PriorPipeline, repository, dtype, prior=None).to(device)
    remembering = _RememberingPrior(**{**encoders.components, "image_encoder": None, "text_encoder": None})
    remembering.set_progress_bar_config(disable=True)
    remembering.prompt_states = {
        # In float32, as the weights that learn; a mask stays one.
        prompt: tuple(
            state.float().cpu() if state.is_floating_point() else state.cpu()
            for state in encoders._encode_prompt([prompt], device, 1, True)
        )
        for prompt in prompts
    }
    remembering.zero_embed = encoders.get_zero_embed().float().cpu()
    return remembering


def _begin(prior: KandinskyV22PriorPipeline, prompts: Sequence[str], seed: int) -> list[_Beginning]:
    beginnings = []
    for i, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(seed + i)
        embeds = prior(
            prompt, num_inference_steps=PRIOR_STEPS, guidance_scale=GUIDANCE_SCALE, generator=generator
        ).to_tuple()
        image_embeds, negative_image_embeds = (embed.cpu() for embed in embeds)
        beginnings.append(
            _Beginning(
                image_embeds=image_embeds,
                negative_image_embeds=negative_image_embeds,
                generator_state=generator.get_state(),
            )
        )
    return beginnings


def _finish(decoder: KandinskyV22Pipeline, beginnings: Sequence[_Beginning], resolution: int) -> "list[Image.Image]":
    factor = decoder.movq_scale_factor
    side = math.ceil(resolution / factor**2) * factor  # as the pipeline rounds
    pictures = []
    for beginning in beginnings:
        generator = torch.Generator()
        generator.set_state(beginning.generator_state)
        # The pipeline's own would have the network's dtype, and in half precision the steps' rounding would add up.
        latents = torch.randn(1, decoder.unet.config.in_channels, side, side, generator=generator)
        drawn = decoder(
            beginning.image_embeds,
            beginning.negative_image_embeds,
            latents=latents,
            height=resolution,
            width=resolution,
            num_inference_steps=DECODER_STEPS,
            guidance_scale=GUIDANCE_SCALE,
            generator=generator,
        )
        pictures.append(drawn.images[0])
    return pictures


@contextmanager
def _on_device(*networks: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Move networks to the device, and back to the CPU afterwards: between pictures, training has it to itself."""
    try:
        for network in networks:
            network.to(device)
        yield
    finally:
        for network in networks:
            network.to("cpu")


def _load(pipeline: type[Any], repository: Repository, dtype: torch.dtype, **given: Any) -> Any:
    """A pipeline on the CPU, with `given` in place of its own components."""
    try:
        with without_bars():
            loaded = pipeline.from_pretrained(repository.path, use_safetensors=True, local_files_only=True, **given)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{repository.name} cannot be loaded as {pipeline.__name__} to draw the validation prompts: {error}; "
            "name a repository that works, or leave --validation-prompts out"
        ) from error
    loaded.set_progress_bar_config(disable=True)
    cast_pipeline(loaded, dtype)
    return loaded


def _check_widths(prior: Repository, decoder: Repository) -> None:
    """Check that the decoder reads image embeddings as wide as the prior makes them."""
    makes = component_config(prior, "prior")
    width, expected = makes.get("clip_embed_dim") or makes.get("embedding_dim"), component_config(decoder, "unet")
    if width != expected.get("encoder_hid_dim"):
        raise ModelError(
            f"{prior.name} makes image_embeds of {width} numbers; {decoder.name} expects "
            f"{expected.get('encoder_hid_dim')}; the validation prompts need a prior and a decoder that belong together"
        )
