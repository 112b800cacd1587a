"""Digits repainted: a hole where one stands on its paper, and what is asked for in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor

from kcache.demo.digits import INKS, PAPERS, SIDE, Drawing, is_held_out
from kcache.demo.exam import GUIDANCE, imagine, real_scans
from kcache.demo.holes.papers import PAPER, SAY_BARE, SAYS_TINTED, Edge, draw_edge, written
from kcache.encoders.pretrained import without_advice
from kcache.objectives.widening import widen_for_masks
from kcache.report.drawn.halves import load_pipeline

with without_advice():
    from diffusers import KandinskyV22InpaintPipeline

LATENT = 4
"""Pixels of a latent's side: by so much the pipeline lets the hole grow."""
EACH = 5
"""Repaints of each picture, which are drawn together."""
PLAIN = ("another ink", "another digit")
TINTED = "another digit, tinted paper"
TASKS = (*PLAIN, TINTED)


@dataclass(frozen=True, kw_only=True, slots=True)
class Repaint:
    """A picture of a test scan, and what is to take its place."""

    task: str
    source: Drawing
    """A pair of digit and ink that was trained on."""
    wanted: Drawing
    """One that was held out, on the same paper; where that is tinted, in the same ink."""
    edge: Edge | None
    """That of the tint, where there is one: the prompt does not say which half it is."""
    prompt: str


def repaints(sources: int) -> list[Repaint]:
    """EACH repaints of so many pictures for each of TASKS, those of a picture behind each other.

    In another ink it is the digit that was there, in each prompt in other words; or they are other digits. Those on
    tinted paper are asked for in the same words.
    """
    papers, asked, rng = list(PAPERS), [], np.random.default_rng(0)
    for task in TASKS:
        for number in range(sources):
            digit, turn = number % 10, number // 10
            edge = draw_edge(rng) if task == TINTED else None
            inks = [ink for ink in INKS if ink != _held_out_ink(digit)]
            source = Drawing(digit=digit, ink=inks[(digit + 3 * turn) % len(inks)], paper=papers[(digit + turn) % 4])
            for each in range(EACH):
                new = _wanted_digits(task, source)
                wanted = new[(2 * each + turn) % len(new)]
                ink = _held_out_ink(wanted)
                drawing = Drawing(digit=wanted, ink=ink, paper=source.paper)
                prompt = drawing.caption(SAYS_TINTED if edge else SAY_BARE[(each + number) % len(SAY_BARE)])
                asked.append(Repaint(task=task, source=source, wanted=drawing, edge=edge, prompt=prompt))
    return asked


def _wanted_digits(task: str, source: Drawing) -> list[int]:
    if task == PLAIN[0]:
        return [source.digit]
    others = [new % 10 for new in range(source.digit + 1, source.digit + 10)]
    # Ink that was there before proves nothing; where the tint is of it, the paper is what is to be proven.
    return [new for new in others if (_held_out_ink(new) == source.ink) == (task == TINTED)]


def _held_out_ink(digit: int) -> str:
    return next(ink for ink in INKS if is_held_out(Drawing(digit=digit, ink=ink, paper="white")))


def given_pictures(asked: Sequence[Repaint]) -> list[Image.Image]:
    """The picture that is repainted in each: scans that no network has seen, on their papers."""
    first = asked[::EACH]
    scans = real_scans([repaint.source for repaint in first])
    pictures = [written(scan, one.source, one.edge) for scan, one in zip(scans, first, strict=True)]
    return [picture for picture in pictures for _ in range(EACH)]


def real_fillings(asked: Sequence[Repaint]) -> list[Image.Image]:
    """Pictures of what was asked for in each: scans that no network has seen, on the papers of what was given."""
    scans = real_scans([repaint.wanted for repaint in asked])
    return [written(scan, one.wanted, one.edge) for scan, one in zip(scans, asked, strict=True)]


def hole() -> Image.Image:
    """The mask: white where the digit stands."""
    mask = Image.new("L", (PAPER, PAPER))
    edge = (PAPER - SIDE) // 2
    mask.paste(255, (edge, edge, edge + SIDE, edge + SIDE))
    return mask


@torch.no_grad()
def fill(
    asked: Sequence[Repaint],
    pictures: Sequence[Image.Image],
    prior: Path,
    decoders: dict[str, Path],
    *,
    steps: int,
    seed: int,
) -> dict[str, Tensor]:
    """What the decoder of each run makes of each picture, from the same embeddings and the same noise: their latents.

    diffusers' pipeline for holes draws with all of them. After each step it puts the picture's own latents, with as
    much noise, where they are kept: that is all that a decoder without inputs for them goes by. Latents are
    (n, 4, PAPER / LATENT, PAPER / LATENT) float32.
    """
    embeds, generators = imagine([repaint.prompt for repaint in asked], prior, steps=steps, seed=seed)
    filled = {}
    for way, run in decoders.items():
        unet = UNet2DConditionModel.from_pretrained(run, subfolder="unet", local_files_only=True)
        if unet.config.in_channels == 4:
            widen_for_masks(unet)  # by weights of zero: it sees nothing of them
        pipeline, drawn = load_pipeline(KandinskyV22InpaintPipeline, run, unet=unet.eval()), []
        for start in range(0, len(asked), EACH):
            part = slice(start, start + EACH)
            positive, negative = (torch.cat(column) for column in zip(*embeds[part], strict=True))
            latents = pipeline(
                image_embeds=positive,
                negative_image_embeds=negative,
                image=[pictures[start]] * EACH,
                mask_image=[hole()] * EACH,
                generator=[generator.clone_state() for generator in generators[part]],
                height=PAPER,
                width=PAPER,
                num_inference_steps=steps,
                guidance_scale=GUIDANCE,
                output_type="latent",
            ).images
            drawn.append(latents)
        filled[way] = torch.cat(drawn)
    return filled
