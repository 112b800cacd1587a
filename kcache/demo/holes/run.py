"""The demo of filling holes: an inpainting decoder trained from the cache of a plain one, and that one blended in."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from PIL import Image

from kcache.build.build import build_cache
from kcache.config import Say
from kcache.demo.digits import write_lesson
from kcache.demo.holes.exam import TASKS, Repaint, fill, given_pictures, real_fillings, repaints
from kcache.demo.holes.judging import HoleScore, score_holes
from kcache.demo.holes.kept import Kept, Movq, handed_out, measure_kept
from kcache.demo.holes.papers import PAPER, Lesson
from kcache.demo.holes.picture import picture_of
from kcache.demo.stages import PRIOR_BATCH_SIZE, Work, begin, build_config, stage_config, train
from kcache.demo.tiny import demo_models
from kcache.disk.durable import write_bytes

INPAINTING, BLENDED, REAL = "inpainting decoder", "plain decoder, blended", "unseen real scans through the MoVQ"
SNR_GAMMA = 0.1
"""Of both decoders that go on: min-SNR weighting (Hang et al. 2023, arXiv 2303.09556)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HolesSize:
    """How much of everything it does."""

    pictures: int
    prior_steps: int
    decoder_steps: int
    """Of the plain decoder."""
    further_steps: int
    """Of the decoder that fills holes, which begins with that one, and of that one going on as it is, to compare."""
    decoder_batch_size: int
    sources: int
    """Pictures with a hole for each of the three tasks, each filled five times."""
    sampling_steps: int


WHOLE = HolesSize(
    pictures=4311,
    prior_steps=600,
    decoder_steps=800,
    further_steps=1200,
    decoder_batch_size=32,
    sources=20,
    sampling_steps=25,
)
QUICK = HolesSize(
    pictures=1437,
    prior_steps=150,
    decoder_steps=300,
    further_steps=250,
    decoder_batch_size=16,
    sources=10,
    sampling_steps=20,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class HolesResult:
    """What it measured."""

    size: HolesSize
    seed: int
    same_cache: bool
    """Whether training on the same cache for another purpose left each byte of it as it was."""
    scores: dict[str, dict[str, HoleScore]]
    """By task, then by what filled the holes."""
    kept: Kept
    seconds: dict[str, float]
    """Where the time went, in the order in which it did."""

    def to_json(self) -> str:
        """All of it as JSON."""
        return json.dumps(asdict(self) | {"total_seconds": sum(self.seconds.values())}, indent=1) + "\n"


def run_holes(output: Path, size: HolesSize, *, say: Say, seed: int = 0) -> HolesResult:
    """Do everything in the folder `output`; `say` is told what happens.

    It ends with inpaint.json and inpaint.png, beside all that was trained and drawn. What an earlier demo left in
    `output` is removed first; no network is needed. `seed` decides first weights, order and noise. Raises ConfigError
    when `output` holds anything else.
    """
    begin(output)
    work, cache, runs = Work(say=say), output / "cache", output / "runs"
    with work.spending(
        "cache",
        f"writing {size.pictures:,} digits in the middle of paper and a tiny Kandinsky 2.2 to {output}; building",
    ):
        write_lesson(output / "pictures", size.pictures, write=Lesson().write)
        models = demo_models(output / "models", seed=seed, paper=PAPER)
        build_cache(str(output / "pictures"), str(cache), build_config(models, PAPER))
    with work.spending(
        "prior and decoder", f"training the prior for {size.prior_steps} steps and a decoder for {size.decoder_steps}"
    ):
        train(cache, stage_config("prior", runs / "prior", size.prior_steps, PRIOR_BATCH_SIZE, seed))
        train(cache, stage_config("decoder", runs / "decoder", size.decoder_steps, size.decoder_batch_size, seed))
    before = _contents(cache)
    further = stage_config("decoder", runs / "inpaint", size.further_steps, size.decoder_batch_size, seed + 1)
    # What is around a hole tells most where noise hides the most, and there the loss is smallest unless it is weighted.
    further = replace(further, pretrained_decoder_model_name_or_path=str(runs / "decoder"), snr_gamma=SNR_GAMMA)
    with work.spending(
        "inpainting decoder", f"training it on to fill holes, from the same cache, for {size.further_steps} steps"
    ):
        train(cache, replace(further, inpaint=True))
    same_cache = _contents(cache) == before
    with work.spending("plain decoder", f"training it on as it is, to compare, for {size.further_steps} steps"):
        train(cache, replace(further, output_dir=str(runs / "plain")))
    asked = repaints(size.sources)
    with work.spending("filling", f"filling {len(asked)} holes both ways; judging them"):
        given, real, movq = given_pictures(asked), real_fillings(asked), Movq(runs / "decoder")
        decoders = {INPAINTING: runs / "inpaint", BLENDED: runs / "plain"}
        latents = fill(asked, given, runs / "prior", decoders, steps=size.sampling_steps, seed=1_000_000 * seed)
        filled = {way: handed_out(movq.decode(of_way), given) for way, of_way in latents.items()}
        filled[REAL] = movq.decode(movq.encode(real))
        scores = {
            task: {way: score_holes(*_of_task(task, asked, of_way)) for way, of_way in filled.items()} for task in TASKS
        }
        kept = measure_kept(given, real, latents, movq)
        _save(output / "samples", asked, given, filled)
    result = HolesResult(size=size, seed=seed, same_cache=same_cache, scores=scores, kept=kept, seconds=work.seconds)
    write_bytes(output / "inpaint.json", result.to_json().encode())
    write_bytes(output / "inpaint.png", picture_of(scores, asked, given, filled))
    return result


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _of_task(
    task: str, asked: Sequence[Repaint], filled: Sequence[Image.Image]
) -> tuple[list[Image.Image], list[Repaint]]:
    chosen = [number for number, repaint in enumerate(asked) if repaint.task == task]
    return [filled[i] for i in chosen], [asked[i] for i in chosen]


def _save(
    folder: Path, asked: Sequence[Repaint], pictures: Sequence[Image.Image], filled: dict[str, list[Image.Image]]
) -> None:
    for way, of_way in {"given": list(pictures), **filled}.items():
        (folder / way).mkdir(parents=True)
        for number, (repaint, picture) in enumerate(zip(asked, of_way, strict=True)):
            picture.save(folder / way / f"{number:03} {repaint.prompt}.png")
