"""The demo's exam: prompts whose digit and ink never went together in training, drawn and judged.

diffusers' own pipelines draw; the ceiling is what real scans are worth after the MoVQ and back.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import VQModel
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from kcache.config.shapes import Shape
from kcache.demo.digits import FULL, PAPERS, SIDE, Drawing, all_drawings, coloured, is_held_out, read_scans
from kcache.demo.result import DemoSize, DigitScore, ExamResult, Variety
from kcache.demo.scoring import CHANCE, JUDGES, distance_to_known, read, score, spread
from kcache.encoders.pretrained import without_advice
from kcache.report.drawn.halves import load_pipeline
from kcache.report.sampling import Embeds, draw_embeds, draw_pictures

with without_advice():
    from diffusers import KandinskyV22Pipeline, KandinskyV22PriorPipeline

BATCH_SIZE = 50
GUIDANCE = 1.5
"""Of both halves; chosen on prompts that were trained on: more makes the pictures of a prompt more alike."""


def questions() -> list[tuple[str, Drawing]]:
    """All 40 held-out drawings, first one of each digit on changing papers, each after a prompt that says all of it."""
    papers = list(PAPERS)
    held_out = [drawing for drawing in all_drawings() if is_held_out(drawing)]
    held_out.sort(key=lambda drawing: ((papers.index(drawing.paper) - drawing.digit) % len(papers), drawing.digit))
    return [(drawing.caption(FULL[i % len(FULL)]), drawing) for i, drawing in enumerate(held_out)]


def sit_exam(
    asked: Sequence[tuple[str, Drawing]], folder: Path, runs: Path, *, size: DemoSize, seed: int
) -> ExamResult:
    """Draw `size.samples` pictures of each question into `folder` with the pipelines of both `runs`, and judge them.

    Beside them real pictures are judged: of scans kept for tests, put through the decoder's MoVQ and back.
    """
    samples, decoder = size.samples, runs / "decoder"
    wanted = [drawing for _, drawing in asked for _ in range(samples)]
    prompts = [prompt for prompt, _ in asked for _ in range(samples)]
    pictures = draw(prompts, runs / "prior", decoder, steps=size.sampling_steps, seed=seed)
    folder.mkdir()
    paths = [folder / f"{number:03} {prompt}.png" for number, prompt in enumerate(prompts)]
    for path, picture in zip(paths, pictures, strict=True):
        picture.save(path)
    real = real_pictures(wanted)
    ceiling = round_trip(real, decoder)
    return ExamResult(
        drawn=tuple((prompt, tuple(paths[i * samples : (i + 1) * samples])) for i, (prompt, _) in enumerate(asked)),
        score=score(read(pictures), wanted),
        ceiling=score(read(ceiling), wanted),
        chance=CHANCE,
        judges=tuple(
            DigitScore(
                judge=name,
                drawn=score(read(pictures, judge), wanted).digit,
                ceiling=score(read(ceiling, judge), wanted).digit,
            )
            for name, judge in JUDGES.items()
        ),
        drawn_variety=Variety(spread=spread(pictures, wanted), to_known=distance_to_known(pictures)),
        real_variety=Variety(spread=spread(real, wanted), to_known=distance_to_known(real)),
    )


def real_pictures(drawings: Sequence[Drawing]) -> list[Image.Image]:
    """Different test scans of each digit, as far as there are enough."""
    scans = real_scans(drawings)
    return [coloured(scan, drawing.ink, drawing.paper) for scan, drawing in zip(scans, drawings, strict=True)]


def real_scans(drawings: Sequence[Drawing]) -> list[np.ndarray]:
    """Those of `real_pictures`: (8, 8) float64 from 0 to 1 each."""
    scans, digits = read_scans(test=True)
    rng = np.random.default_rng(0)
    waiting = {digit: list[int]() for digit in range(10)}
    chosen = []
    for drawing in drawings:
        if not waiting[drawing.digit]:
            waiting[drawing.digit] = rng.permutation(np.flatnonzero(digits == drawing.digit)).tolist()
        chosen.append(scans[waiting[drawing.digit].pop()])
    return chosen


def draw(prompts: Sequence[str], prior: Path, decoder: Path, *, steps: int, seed: int) -> list[Image.Image]:
    """A picture per prompt from the pipelines in two run directories, with `steps` steps each.

    Picture i starts from noise of `seed` + i. They are drawn in batches, which with networks this small are many times
    faster than one by one.
    """
    embeds, generators = imagine(prompts, prior, steps=steps, seed=seed)
    return paint(embeds, generators, decoder, (SIDE, SIDE), steps=steps)


def imagine(
    prompts: Sequence[str], prior: Path, *, steps: int, seed: int
) -> tuple[list[Embeds], list[torch.Generator]]:
    """What the decoder draws a picture of each prompt from, and its generator as the prior leaves it."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    pipeline = load_pipeline(KandinskyV22PriorPipeline, prior)
    return draw_embeds(pipeline, prompts, generators, **_settings(steps)), generators


def paint(
    embeds: Sequence[Embeds], generators: Sequence[torch.Generator], decoder: Path, shape: Shape, *, steps: int
) -> list[Image.Image]:
    """The pictures of a shape that a decoder draws; the generators are left as they were."""
    pipeline, (height, width) = load_pipeline(KandinskyV22Pipeline, decoder), shape
    cloned = [generator.clone_state() for generator in generators]
    return draw_pictures(pipeline, embeds, cloned, height=height, width=width, **_settings(steps))


def _settings(steps: int) -> dict[str, Any]:
    return {"num_inference_steps": steps, "guidance_scale": GUIDANCE, "batch_size": BATCH_SIZE}


@torch.no_grad()
def round_trip(pictures: Sequence[Image.Image], decoder: Path) -> list[Image.Image]:
    """`pictures` as the MoVQ of a decoder pipeline gives them back: the best that the decoder could draw."""
    movq = VQModel.from_pretrained(decoder, subfolder="movq", local_files_only=True)
    processor = VaeImageProcessor(vae_scale_factor=1)
    latents = movq.encode(processor.preprocess(list(pictures))).latents
    return processor.postprocess(movq.decode(latents, force_not_quantize=True).sample)
