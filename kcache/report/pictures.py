"""Pictures that show how training goes: the same prompts from the same noise, drawn by the network as it is now.

The stock pipelines draw them. What the frozen networks make of the prompts never changes, so they are asked once,
before training: the large encoders never share the device with the network that learns.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kcache.config import COMPUTE_DTYPES, DECODER_REPO, TrainConfig
from kcache.config.shapes import Shape
from kcache.encoders.pretrained import cast_pipeline, without_advice
from kcache.encoders.repositories import PIPELINES, Repository, pipeline_class
from kcache.errors import ModelError
from kcache.objectives.blocks import evaluating
from kcache.report.drawn.halves import load_pipeline
from kcache.report.drawn.scores import prompt_scores
from kcache.report.grid import PROMPTED
from kcache.report.sampling import Embeds, draw_embeds, draw_pictures
from kcache.stopping import signal_asked

with without_advice():
    from diffusers import KandinskyV22Pipeline, KandinskyV22PriorPipeline

PRIOR_STEPS = 25
DECODER_STEPS = 20
"""Half of what a finished picture takes: enough to see what was learned."""
GUIDANCE_SCALE = 4.0
"""Of both halves, as in the pipelines' own examples."""
PICTURES_PER_PROMPT = 1
_DRAWING = ", which is to draw the --validation-prompts"


class PromptPictures:
    """Draws `config.num_validation_images` pictures of each of `config.validation_prompts`, whenever it is asked.

    Where no number is given it is one. Each is drawn in every one of `shapes`, heights and widths in pixels, rounded up
    to multiples of 64. `base` is the repository of the half that learns, `counterpart` that of the other one. Picture i
    of a shape starts from noise of `config.seed` + i drawn on the CPU, the same at each call: it is what `kcache
    sample` draws with equal settings. One process of a run is enough for it.
    """

    files = PROMPTED
    """What the files of its pictures are called."""

    def __init__(
        self,
        config: TrainConfig,
        base: Repository,
        counterpart: Repository,
        shapes: Sequence[Shape],
        device: str | torch.device,
    ) -> None:
        each = PICTURES_PER_PROMPT if config.num_validation_images is None else config.num_validation_images
        self._asked = [text for text in config.validation_prompts for _ in range(each)]
        self._shapes = tuple(shapes)
        self._config = config
        self._base = base
        self._counterpart = counterpart
        self._device = torch.device(device)
        self._learning_dtype: torch.dtype = getattr(torch, COMPUTE_DTYPES[config.mixed_precision])
        # As in `kcache sample`.
        self._frozen_dtype = torch.float16 if self._device.type == "cuda" else torch.float32

    @property
    def prompts(self) -> list[str]:
        """The prompt of each picture that `draw` returns: its shapes stand behind each other."""
        return [text for text in self._asked for _ in self._shapes]

    def prepare(self) -> None:
        """Ask the frozen networks all that they will be asked; to be called once, before anything else.

        Afterwards the device is free of them. In the host's memory stay some vectors per prompt and what turns image
        embeddings into pictures: MoVQ and, where the prior learns, the UNet. Raises ModelError when the two halves do
        not belong together or one of them cannot be loaded.
        """
        if self._config.stage == "prior":
            _check_draws(self._counterpart)
            _check_widths(self._base, self._counterpart)
            self._prior = remember_prompts(self._base, self._asked, self._frozen_dtype, self._device)
            self._decoder = _load(KandinskyV22Pipeline, self._counterpart, self._frozen_dtype)
        else:
            _check_widths(self._counterpart, self._base)
            prior = _load(KandinskyV22PriorPipeline, self._counterpart, self._frozen_dtype)
            self._begun = self._begin(prior.to(self._device))
            self._decoder = _load(KandinskyV22Pipeline, self._base, torch.float32, unet=None)

    def draw(self, network: torch.nn.Module) -> list[Image.Image]:
        """The pictures, in the order of `prompts`, drawn by `network`, the PriorTransformer or UNet2DConditionModel.

        It must be on the device. It runs in evaluation mode, in the precision of training, and is left as it was; no
        global generator of random numbers is touched.
        """
        with evaluating(network):
            if self._config.stage == "prior":
                self._prior.prior = network
                with self._computing_in(self._learning_dtype):
                    begun = self._begin(self._prior)
                with (
                    on_device(self._decoder.unet, self._decoder.movq, device=self._device),
                    self._computing_in(self._frozen_dtype),
                ):
                    return self._finish(*begun)
            self._decoder.unet = network
            with on_device(self._decoder.movq, device=self._device), self._computing_in(self._learning_dtype):
                return self._finish(*self._begun)

    def scores(self, drawn: Sequence[Image.Image]) -> dict[str, float]:
        """How well the pictures that `draw` returned fit their prompts: each one, and as val_clip_score their mean.

        See `prompt_scores`; raises ModelError.
        """
        prior = self._base if self._config.stage == "prior" else self._counterpart
        scores = prompt_scores(prior, drawn, self.prompts, self._frozen_dtype, self._device)
        each = {f"clip_score_{number}": score for number, score in enumerate(scores, 1)}
        return {"val_clip_score": sum(scores) / len(scores), **each}

    def _begin(self, prior: KandinskyV22PriorPipeline) -> tuple[list[Embeds], list[torch.Generator]]:
        """What the decoder draws each picture from, and the picture's generator, as the prior left it."""
        generators = [torch.Generator().manual_seed(self._config.seed + i) for i in range(len(self._asked))]
        embeds = draw_embeds(
            prior,
            self._asked,
            generators,
            num_inference_steps=PRIOR_STEPS,
            guidance_scale=GUIDANCE_SCALE,
            callback_on_step_end=unless_stopped,
        )
        return embeds, generators

    def _finish(self, embeds: Sequence[Embeds], generators: Sequence[torch.Generator]) -> list[Image.Image]:
        """The pictures; the generators are left as they were, for the next call."""
        by_shape = [self._drawn_in(shape, embeds, generators) for shape in self._shapes]
        return [picture for of_prompt in zip(*by_shape, strict=True) for picture in of_prompt]

    def _drawn_in(
        self, shape: Shape, embeds: Sequence[Embeds], generators: Sequence[torch.Generator]
    ) -> list[Image.Image]:
        generators = [generator.clone_state() for generator in generators]
        factor, (height, width) = self._decoder.movq_scale_factor, shape
        sides = [math.ceil(side / factor**2) * factor for side in shape]  # as the pipeline rounds
        latents = (1, self._decoder.movq.config.latent_channels, *sides)
        return draw_pictures(
            self._decoder,
            embeds,
            generators,
            # The pipeline's own would have the network's dtype, and in half precision the steps' rounding would add up.
            latents=[torch.randn(latents, generator=generator) for generator in generators],
            height=height,
            width=width,
            num_inference_steps=DECODER_STEPS,
            guidance_scale=GUIDANCE_SCALE,
            callback_on_step_end=unless_stopped,
        )

    def _computing_in(self, dtype: torch.dtype) -> torch.autocast:
        return torch.autocast(self._device.type, dtype, enabled=dtype != torch.float32)


def unless_stopped(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Break off where a signal asks the run to stop: what ends it may not wait for pictures."""
    if signal_asked():
        raise InterruptedError("a signal asks to stop")
    return tensors


class RememberingPrior(KandinskyV22PriorPipeline):
    """The stock pipeline, with what its two encoders answered before in place of the encoders."""

    prompt_states: dict[str, tuple[Tensor, ...]]
    """By prompt: text_embeds (2, D), last_hidden_state (2, 77, D) and mask (2, 77), the empty caption's first."""
    zero_embed: Tensor
    """(1, D): the embedding of an all-zero picture."""

    def _encode_prompt(
        self, prompt: list[str], device: torch.device, per_prompt: int, guided: bool, *_: Any
    ) -> tuple[Tensor, ...]:
        # To be guided by, the empty caption for each prompt stands before all of them.
        columns = zip(*(self.prompt_states[text] for text in prompt), strict=True)
        states = [torch.stack(column, 1)[0 if guided else 1 :] for column in columns]
        return tuple(each.flatten(0, 1).to(device) for each in states)

    def get_zero_embed(self, batch_size: int = 1, device: torch.device | None = None) -> Tensor:
        return self.zero_embed.repeat(batch_size, 1).to(device)


@torch.no_grad()
def remember_prompts(
    repository: Repository, prompts: Sequence[str], dtype: torch.dtype, device: torch.device, *, purpose: str = _DRAWING
) -> RememberingPrior:
    """The prior's pipeline of `repository` without a prior, its encoders asked of `prompts` in `dtype`, and let go.

    Raises ModelError, which says what for, see `load_pipeline`.
    """
    encoders = _load(KandinskyV22PriorPipeline, repository, dtype, purpose, prior=None).to(device)
    remembering = RememberingPrior(**{**encoders.components, "image_encoder": None, "text_encoder": None})
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


@contextmanager
def on_device(*networks: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Move networks to the device, and back to the CPU afterwards: between pictures, training has it to itself."""
    try:
        for network in networks:
            network.to(device)
        yield
    finally:
        for network in networks:
            network.to("cpu")


def _load(kind: type[Any], repository: Repository, dtype: torch.dtype, purpose: str = _DRAWING, **given: Any) -> Any:
    """A pipeline on the CPU, with `given` in place of its own components."""
    loaded = load_pipeline(kind, repository.path, purpose=purpose, **given)
    cast_pipeline(loaded, dtype)
    return loaded


def _check_draws(decoder: Repository) -> None:
    """Check that a decoder draws whole pictures, from prompts alone."""
    kind = pipeline_class("decoder", decoder.read("unet").values)
    if kind != PIPELINES["decoder"].class_name:
        raise ModelError(
            f"the decoder of {decoder.name} is one for {kind}; expected one that draws the --validation-prompts alone; "
            f"give --pretrained-decoder-model-name-or-path {DECODER_REPO}, or leave them out"
        )


def _check_widths(prior: Repository, decoder: Repository) -> None:
    """Check that the decoder reads image embeddings as wide as the prior makes them."""
    makes, expected = prior.read("prior").values, decoder.read("unet").values
    width = makes.get("clip_embed_dim") or makes.get("embedding_dim")
    if width != expected.get("encoder_hid_dim"):
        raise ModelError(
            f"{prior.name} makes image_embeds of {width} numbers; {decoder.name} expects "
            f"{expected.get('encoder_hid_dim')}; the validation prompts need a prior and a decoder that belong together"
        )
