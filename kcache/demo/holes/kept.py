"""What is kept of a picture around a hole: as latents, as the pixels that the MoVQ makes of them, and put back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import VQModel
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from kcache.demo.holes.exam import EACH, LATENT, hole
from kcache.report.drawn.kept import kept_latents, put_back

ALONE, REAL = "the MoVQ alone", "real latents in the hole"


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """How what is kept came out."""

    same_latents: dict[str, bool]
    """By what filled the holes: whether the latents that are kept are those of the picture given, bit for bit."""
    levels: dict[str, float]
    """By what filled them, ALONE and REAL first: how far pixels that are kept are from the picture that was given.

    The mean of absolute differences, in levels of 255. ALONE is of pictures encoded and decoded. In REAL the hole has
    the latents of a real picture of what was asked for: what it costs to be decoded beside another filling.
    """
    put_back: dict[str, float]
    """The same where the pixels given are put back, as `kcache sample` does; by what filled the holes."""


class Movq:
    """The MoVQ of a decoder's run."""

    def __init__(self, decoder: Path) -> None:
        self.network = VQModel.from_pretrained(decoder, subfolder="movq", local_files_only=True).eval()
        self.processor = VaeImageProcessor(vae_scale_factor=1)

    @torch.no_grad()
    def encode(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Latents (n, 4, PAPER / LATENT, PAPER / LATENT) float32 of pictures, EACH at a time."""
        # As many as the pipeline is given: in batches of other sizes the last bits may be others.
        parts = [pictures[start : start + EACH] for start in range(0, len(pictures), EACH)]
        return torch.cat([self.network.encode(self.processor.preprocess(list(part))).latents for part in parts])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """The pictures of latents."""
        back = [self.network.decode(part, force_not_quantize=True).sample for part in latents.split(50)]
        return self.processor.postprocess(torch.cat(back))


def kept_mask() -> Tensor:
    """Where latents are kept beside the hole as the pipeline lets it grow: (1, 1, h, w) float32, 1 is kept."""
    return torch.from_numpy(kept_latents(hole(), LATENT))[None, None]


def measure_kept(
    pictures: Sequence[Image.Image], fillings: Sequence[Image.Image], filled: Mapping[str, Tensor], movq: Movq
) -> Kept:
    """Compare what is kept of `pictures` with the same places in each of `filled`; `fillings` are real ones."""
    given, keep = movq.encode(pictures), kept_mask()
    ways = {ALONE: given, REAL: torch.where(keep > 0, given, movq.encode(fillings)), **filled}
    decoded = {way: movq.decode(latents) for way, latents in ways.items()}
    outside = keep[0, 0].numpy().repeat(LATENT, axis=0).repeat(LATENT, axis=1) > 0
    return Kept(
        same_latents={way: torch.equal(latents * keep, given * keep) for way, latents in filled.items()},
        levels={way: _difference(decoded[way], pictures, outside) for way in ways},
        put_back={way: _difference(handed_out(decoded[way], pictures), pictures, outside) for way in filled},
    )


def handed_out(filled: Sequence[Image.Image], pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """The pictures `filled`, with the pixels of those given around the hole."""
    return [put_back(one, given, hole(), LATENT) for one, given in zip(filled, pictures, strict=True)]


def _difference(ones: Sequence[Image.Image], others: Sequence[Image.Image], where: np.ndarray) -> float:
    one, other = (np.stack([np.asarray(each.convert("RGB"), float)[where] for each in some]) for some in (ones, others))
    return float(np.abs(one - other).mean())
