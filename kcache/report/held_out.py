"""Held-out pictures that a decoder which fills holes, or draws by hints, draws anew on the way.

Each is shown as it is, then its hole and that filled, or its hint and what is drawn by it. The stock pipelines draw
them. Where one would encode pixels it gets the latents of the cache: nothing is encoded again, and pictures may have
any size that the network takes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, VQModel
from PIL import Image
from torch import Tensor

from kcache.config import COMPUTE_DTYPES, TrainConfig
from kcache.encoders.pretrained import load_pretrained, without_advice
from kcache.encoders.repositories import Repository
from kcache.loader.chance import draw_noise, draw_own_mask
from kcache.loader.masks import draw_masks, grow
from kcache.objectives.blocks import evaluating
from kcache.objectives.hinting import as_fed
from kcache.objectives.inpainting import OWN_MASKS
from kcache.report.grid import HELD_OUT
from kcache.report.pictures import DECODER_STEPS, GUIDANCE_SCALE, on_device, unless_stopped
from kcache.report.sampling import Embeds, draw_pictures
from kcache.store.cache import Cache

with without_advice():
    from diffusers import KandinskyV22ControlnetPipeline, KandinskyV22InpaintPipeline

GREY = 128
"""Level of the hole's pixels, 0 to 255, where it is shown."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A held-out sample, and what is drawn with its rows: on the CPU, in float32 but for the hint."""

    name: str
    embeds: Embeds
    """Its own image_embeds, and those of the all-zero image."""
    latents: Tensor
    """(1, 4, h, w)."""
    noise: Tensor
    """(1, 4, h, w): what drawing begins with."""
    mask: np.ndarray
    """(h, w): 1 is kept, 0 is the hole, which has not grown yet."""
    hint: Tensor | None
    """(1, 1 or 3, H, W) uint8 of the latents' own picture; None where a hole is filled."""


def read_held_out(
    part: Cache, sample: int, turn: int, seed: int, hint: str | None = None, own_share: float = 0.0
) -> HeldOut:
    """A sample of a part of a cache in which all latents have one shape, with what the seed and its turn draw.

    `hint` is the field of the hint that it is drawn by; None has a hole filled: for a share `own_share` of the turns
    that of the sample's own mask, where it has one.
    """
    # Its own embedding, and the one that guidance leads away from.
    embeds = part.read([sample, sample], ["image_embeds"], drop_image=np.array([False, True]))["image_embeds"]
    fields = ["latents", *([] if hint is None else [hint]), *([OWN_MASKS] if own_share else [])]
    read = part.read([sample], fields)
    rows = {name: torch.from_numpy(array) for name, array in read.items()}
    turns, shape = np.array([turn]), read["latents"].shape[1:]
    mask = draw_masks(seed, turns, *shape[1:], growth=False)[0, 0]  # which the pipeline grows
    if own_share and draw_own_mask(seed, turns, own_share)[0] and not read[OWN_MASKS].all():
        mask = read[OWN_MASKS][0, 0].astype(mask.dtype)
    return HeldOut(
        name=part.told(sample, "name"),
        embeds=(torch.from_numpy(embeds[:1]).float(), torch.from_numpy(embeds[1:]).float()),
        latents=rows["latents"].float(),
        noise=torch.from_numpy(draw_noise(seed, turns, shape)),
        mask=mask,
        hint=None if hint is None else rows[hint],
    )


class HeldOutPictures:
    """Draws three pictures of each sample: as MoVQ has it, with its hole in grey, and with the hole filled.

    With a hint it is that, and what is drawn by it, in place of the last two. The same at each call, but for what the
    network has learned. One process of a run is enough for it.
    """

    files = HELD_OUT
    """What the files of its pictures are called."""

    def __init__(
        self,
        samples: Sequence[HeldOut],
        config: TrainConfig,
        base: Repository,
        scheduler: DDPMScheduler,
        device: str | torch.device,
    ) -> None:
        """`base` is the repository of the decoder that learns, and `scheduler` its own; raises ModelError for MoVQ."""
        self._samples, self._seed, self._device = samples, config.seed, torch.device(device)
        self._dtype: torch.dtype = getattr(torch, COMPUTE_DTYPES[config.mixed_precision])
        movq = load_pretrained(VQModel, base.path / "movq", torch.float32)
        self._movq: Any = movq.eval().requires_grad_(False)
        # One of its own: a pipeline sets the steps of its scheduler.
        own = DDPMScheduler.from_config(scheduler.config)
        kind = KandinskyV22InpaintPipeline if config.hint is None else KandinskyV22ControlnetPipeline
        self._decoder: Any = kind(unet=None, scheduler=own, movq=movq)
        self._decoder.set_progress_bar_config(disable=True)
        # It is told the sides of latents, and the pictures that it gets are latents.
        self._decoder.movq_scale_factor = 1

    @property
    def prompts(self) -> list[str]:
        """What stands below each picture that `draw` returns, once for the three of a sample."""
        return [
            f"{number}. {each.name}: as it is, its {'hole, filled' if each.hint is None else 'hint, drawn by it'}"
            for number, each in enumerate(self._samples, 1)
            for _ in range(3)
        ]

    @torch.no_grad()
    def draw(self, network: torch.nn.Module) -> list[Image.Image]:
        """The pictures, in the order of `prompts`, drawn by `network`, a UNet2DConditionModel on the device.

        It runs in evaluation mode, in the precision of training, and is left as it was; no global generator of random
        numbers is touched.
        """
        self._decoder.unet = network
        computing = torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32)
        with evaluating(network), on_device(self._movq, device=self._device), computing:
            return [picture for number in range(len(self._samples)) for picture in self._drawn(number)]

    def _drawn(self, number: int) -> tuple[Image.Image, Image.Image, Image.Image]:
        sample = self._samples[number]
        latents = sample.latents.to(self._device)
        whole = _pixels(self._movq.decode(latents, force_not_quantize=True).sample[0] * 0.5 + 0.5)
        if sample.hint is None:
            return Image.fromarray(whole), _greyed(whole, grow(sample.mask)), self._filled(sample, latents, number)
        hint = as_fed(sample.hint)[0]
        drawn = self._draw(sample, number, {"hint": hint}, callback=partial(unless_stopped, self._decoder))
        return Image.fromarray(whole), Image.fromarray(_pixels(hint)), drawn

    def _filled(self, sample: HeldOut, latents: Tensor, number: int) -> Image.Image:
        self._movq.encode = lambda pixels: {"latents": latents}
        hole = Image.fromarray(np.uint8(255) * (sample.mask == 0))
        onto = {"image": Image.new("RGB", hole.size), "mask_image": hole}
        return self._draw(sample, number, onto, callback_on_step_end=unless_stopped)

    def _draw(
        self, sample: HeldOut, number: int, onto: Mapping[str, Image.Image | Tensor], **settings: Any
    ) -> Image.Image:
        height, width = sample.mask.shape
        [drawn] = draw_pictures(
            self._decoder,
            [sample.embeds],
            [torch.Generator().manual_seed(self._seed + number)],
            latents=[sample.noise],
            onto=onto,
            height=height,
            width=width,
            num_inference_steps=DECODER_STEPS,
            guidance_scale=GUIDANCE_SCALE,
            **settings,
        )
        return drawn


def _pixels(values: Tensor) -> np.ndarray:
    """A picture (3, H, W) of values in [0, 1], or a little beyond, as (H, W, 3) uint8."""
    return np.asarray((values.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu())


def _greyed(pixels: np.ndarray, mask: np.ndarray) -> Image.Image:
    """A picture (H, W, 3) uint8 with the hole of its mask (h, w) in grey."""
    rows, columns = (side // cells for side, cells in zip(pixels.shape, mask.shape, strict=False))
    kept = mask.repeat(rows, 0).repeat(columns, 1)[..., None] > 0
    return Image.fromarray(np.where(kept, pixels, np.uint8(GREY)))
