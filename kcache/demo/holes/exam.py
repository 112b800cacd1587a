"""Digits repainted: a hole where one stands on its paper, what is asked for in it, and whether that came out."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from diffusers import UNet2DConditionModel
from PIL import Image

from kcache.demo.digits import FULL, INKS, PAPERS, SIDE, Drawing, is_held_out, middle_of, on_paper
from kcache.demo.exam import GUIDANCE, imagine, real_pictures, round_trip
from kcache.demo.scoring import read
from kcache.encoders.pretrained import without_advice
from kcache.objectives.widening import widen_for_masks
from kcache.report.drawn.halves import load_pipeline
from kcache.report.sampling import draw_pictures

with without_advice():
    from diffusers import KandinskyV22InpaintPipeline

PAPER = 48
"""Height and width of the pictures, in pixels: a digit stands in the middle SIDE of them, and the hole is there."""
LATENT = 4
"""Pixels of a latent's side: by so much the pipeline lets the hole grow."""
EACH = 5
"""Repaints of each picture, which are drawn together."""
TASKS = ("another ink", "another digit")
SEAM = min(
    float(np.linalg.norm(np.subtract(*pair, dtype=float))) for pair in combinations(PAPERS.values(), 2)
) / 3  # fmt: skip
"""Levels by which paper may differ at the hole's edge: a third of what the two papers do that are most alike."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Repaint:
    """A picture of a test scan, and what is to take its place."""

    task: str
    source: Drawing
    """A pair of digit and ink that was trained on."""
    wanted: Drawing
    """One that was held out, on the same paper."""
    prompt: str


@dataclass(frozen=True, kw_only=True, slots=True)
class HoleScore:
    """How often holes show what was asked for, in per cent, judged by nothing but them."""

    digit: float
    ink: float
    paper: float
    everything: float
    """All three right in one picture."""
    seamless: float
    """Without an edge in the paper around."""
    seam: float
    """How far the paper differs at the hole's edge, on the side where it is worst: mean distance in levels of 255."""
    kept: float
    """How far what is kept is from the picture that was given: mean of the absolute differences in levels."""

    @property
    def cells(self) -> tuple[str, ...]:
        """All as text with one decimal."""
        shares = (self.digit, self.ink, self.paper, self.everything, self.seamless, self.seam, self.kept)
        return tuple(f"{share:.1f}" for share in shares)


def repaints(sources: int) -> list[Repaint]:
    """EACH repaints of so many pictures for each of TASKS, those of a picture behind each other.

    In another ink it is the digit that was there, in each prompt in other words; or they are five others.
    """
    papers, asked = list(PAPERS), []
    for task in TASKS:
        for number in range(sources):
            digit, turn = number % 10, number // 10
            inks = [ink for ink in INKS if ink != _held_out_ink(digit)]
            source = Drawing(digit=digit, ink=inks[(digit + 3 * turn) % len(inks)], paper=papers[(digit + turn) % 4])
            # Ink that was there before proves nothing.
            others = [new for new in range(digit + 1, digit + 10) if _held_out_ink(new % 10) != source.ink]
            for each in range(EACH):
                new = digit if task == TASKS[0] else others[(2 * each + turn) % len(others)] % 10
                wanted = Drawing(digit=new, ink=_held_out_ink(new), paper=source.paper)
                prompt = wanted.caption(FULL[(each + number) % len(FULL)])
                asked.append(Repaint(task=task, source=source, wanted=wanted, prompt=prompt))
    return asked


def _held_out_ink(digit: int) -> str:
    return next(ink for ink in INKS if is_held_out(Drawing(digit=digit, ink=ink, paper="white")))


def given_pictures(asked: Sequence[Repaint]) -> list[Image.Image]:
    """The picture that is repainted in each: scans that no network has seen, on their papers."""
    sources = [repaint.source for repaint in asked[::EACH]]
    pictures = [
        on_paper(scan, source.paper, (PAPER, PAPER))
        for scan, source in zip(real_pictures(sources), sources, strict=True)
    ]
    return [picture for picture in pictures for _ in range(EACH)]


def hole() -> Image.Image:
    """The mask: white where the digit stands."""
    mask = Image.new("L", (PAPER, PAPER))
    edge = (PAPER - SIDE) // 2
    mask.paste(255, (edge, edge, edge + SIDE, edge + SIDE))
    return mask


def fill(
    asked: Sequence[Repaint],
    pictures: Sequence[Image.Image],
    prior: Path,
    decoders: dict[str, Path],
    *,
    steps: int,
    seed: int,
) -> dict[str, list[Image.Image]]:
    """What the decoder of each run makes of each picture, from the same embeddings and the same noise.

    diffusers' pipeline for holes draws with all of them. After each step it puts the picture's own latents, with as
    much noise, where they are kept: that is all that a decoder without inputs for them goes by.
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
            drawn += draw_pictures(
                pipeline,
                embeds[part],
                [generator.clone_state() for generator in generators[part]],
                batch_size=EACH,
                onto={"image": pictures[start], "mask_image": hole()},
                height=PAPER,
                width=PAPER,
                num_inference_steps=steps,
                guidance_scale=GUIDANCE,
            )
        filled[way] = drawn
    return filled


def real_fillings(asked: Sequence[Repaint], decoder: Path) -> list[Image.Image]:
    """Real scans of what was asked for on their papers, as the MoVQ gives them back."""
    wanted = [repaint.wanted for repaint in asked]
    papers = [
        on_paper(scan, one.paper, (PAPER, PAPER)) for scan, one in zip(real_pictures(wanted), wanted, strict=True)
    ]
    return round_trip(papers, decoder)


def score_holes(filled: Sequence[Image.Image], pictures: Sequence[Image.Image], asked: Sequence[Repaint]) -> HoleScore:
    """Judge what is in the holes of `filled`, and how it fits what is around, which is that of `pictures`."""
    seen = read([middle_of(picture) for picture in filled])
    right = np.array(
        [
            (found.digit == one.wanted.digit, found.ink == one.wanted.ink, found.paper == one.wanted.paper)
            for found, one in zip(seen, asked, strict=True)
        ]
    )
    seams = np.array([_seam(picture) for picture in filled])
    digit, ink, paper = (100 * right.mean(axis=0)).tolist()
    return HoleScore(
        digit=digit, ink=ink, paper=paper,
        everything=float(100 * right.all(axis=1).mean()),
        seamless=float(100 * (seams <= SEAM).mean()),
        seam=float(seams.mean()),
        kept=float(np.mean([_kept(*pair) for pair in zip(filled, pictures, strict=True)])),
    )  # fmt: skip


def _seam(picture: Image.Image) -> float:
    """How far the mean colours on either side of the grown hole's edge are from each other, where it is worst."""
    pixels, edge = np.asarray(picture.convert("RGB"), float), (PAPER - SIDE) // 2
    grown, worst = edge - LATENT, 0.0
    for side in (pixels, pixels[::-1], pixels.transpose(1, 0, 2), pixels[:, ::-1].transpose(1, 0, 2)):
        without, within = side[grown - LATENT : grown, edge:-edge], side[grown : grown + LATENT, edge:-edge]
        worst = max(worst, float(np.linalg.norm(without.mean((0, 1)) - within.mean((0, 1)))))
    return worst


def _kept(filled: Image.Image, picture: Image.Image) -> float:
    """Mean absolute difference outside the grown hole."""
    grown = (PAPER - SIDE) // 2 - LATENT
    outside = np.ones((PAPER, PAPER), bool)
    outside[grown:-grown, grown:-grown] = False
    one, other = (np.asarray(each.convert("RGB"), float)[outside] for each in (filled, picture))
    return float(np.abs(one - other).mean())
