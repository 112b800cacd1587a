"""The demo of shapes: one decoder trained on buckets, one on squares of the same pictures, drawn and judged at each."""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from kcache.build.build import build_cache
from kcache.config import Say
from kcache.config.shapes import Shape
from kcache.demo.digits import SIDE, Drawing, on_paper, write_lesson
from kcache.demo.exam import imagine, paint, questions, real_pictures, round_trip
from kcache.demo.placing import PaperScore, score_papers
from kcache.demo.stages import PRIOR_BATCH_SIZE, Work, begin, build_config, stage_config, train
from kcache.demo.tiny import demo_models
from kcache.disk.durable import write_bytes
from kcache.places import cache_place
from kcache.report.figures import FAINT, TEXT, png_of
from kcache.store.manifest import read_manifest

if TYPE_CHECKING:  # it is loaded where it is drawn with
    from matplotlib.figure import Figure

SHAPES: tuple[Shape, ...] = ((32, 48), (32, 32), (48, 32))
"""Lying, square and standing paper, heights and widths in pixels: 3:2, 1:1 and 2:3."""
WAYS = ("buckets", "squares")
"""What the two decoders are trained on."""
COLUMNS = 10
"""Prompts whose pictures are shown, of different digits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapesSize:
    """How much of everything it does."""

    pictures: int
    prior_steps: int
    decoder_steps: int
    decoder_batch_size: int
    """Squares of one of its steps; of other shapes as many as have that many pixels."""
    samples: int
    """Pictures of each of the 40 prompts at each shape."""
    sampling_steps: int


WHOLE = ShapesSize(
    pictures=4311, prior_steps=400, decoder_steps=1000, decoder_batch_size=32, samples=2, sampling_steps=25
)
QUICK = ShapesSize(
    pictures=1437, prior_steps=150, decoder_steps=420, decoder_batch_size=16, samples=1, sampling_steps=20
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapesResult:
    """What it measured."""

    size: ShapesSize
    seed: int
    rows: dict[str, int]
    """Rows of each table of the cache."""
    scores: dict[str, tuple[PaperScore, ...]]
    """Of the pictures that the decoder trained each way drew at each of `SHAPES`, and of real ones through the MoVQ."""
    seconds: dict[str, float]
    """Where the time went, in the order in which it did."""

    def to_json(self) -> str:
        """All of it as JSON."""
        return json.dumps(asdict(self) | {"total_seconds": sum(self.seconds.values())}, indent=1) + "\n"


def run_shapes(output: Path, size: ShapesSize, *, say: Say, seed: int = 0) -> ShapesResult:
    """Do everything in the folder `output`; `say` is told what happens.

    It ends with shapes.json and shapes.png, beside all that was trained and drawn. What an earlier demo left in
    `output` is removed first; no network is needed. `seed` decides first weights, order and noise. Raises ConfigError
    when `output` holds anything else.
    """
    begin(output)
    work, cache, runs = Work(say=say), output / "cache", output / "runs"
    with work.spending(
        "pictures", f"writing digits on lying, square and standing paper and a tiny Kandinsky 2.2 to {output}"
    ):
        write_lesson(output / "pictures", size.pictures, SHAPES)
        models = demo_models(output / "models", seed=seed)
    with work.spending("cache", f"building the cache of {size.pictures:,} pictures: squares, then buckets beside them"):
        rows = _build(output, models)
    with work.spending("prior", f"training the prior for {size.prior_steps} steps"):
        train(cache, stage_config("prior", runs / "prior", size.prior_steps, PRIOR_BATCH_SIZE, seed))
    for way in WAYS:
        with work.spending(f"decoder on {way}", f"training a decoder on {way} for {size.decoder_steps} steps"):
            config = stage_config("decoder", runs / way, size.decoder_steps, size.decoder_batch_size, seed)
            train(cache, replace(config, aspect_ratio_buckets=way == "buckets"))
    asked = [question for question in questions() for _ in range(size.samples)]
    pictures = len(WAYS) * len(SHAPES) * len(asked)
    with work.spending("drawing", f"drawing {pictures} pictures of digits in inks they were never seen in; judging"):
        drawn = _draw(asked, output, size.sampling_steps, 1_000_000 * seed)
        wanted = [drawing for _, drawing in asked]
        scores = {way: tuple(score_papers(each, wanted) for each in of_way) for way, of_way in drawn.items()}
        scores["real scans through the MoVQ"] = _ceiling(wanted, runs / WAYS[0])
    result = ShapesResult(size=size, seed=seed, rows=rows, scores=scores, seconds=work.seconds)
    write_bytes(output / "shapes.json", result.to_json().encode())
    write_bytes(output / "shapes.png", _picture(result, asked, drawn))
    return result


def ratio_of(shape: Shape) -> str:
    """A shape as width to height, such as "3:2"."""
    height, width = shape
    return f"{width // gcd(height, width)}:{height // gcd(height, width)}"


def _build(output: Path, models: tuple[Path, Path]) -> dict[str, int]:
    """Rows of each table of a cache that has squares and buckets of the same pictures."""
    squares = build_config(models, SIDE)
    buckets = replace(squares, aspect_ratio_buckets=";".join(f"{height},{width}" for height, width in SHAPES))
    for config in (squares, buckets):
        build_cache(str(output / "pictures"), str(output / "cache"), config)
    return {name: table.rows for name, table in read_manifest(cache_place(str(output / "cache"))).tables.items()}


def _draw(
    asked: Sequence[tuple[str, Drawing]], output: Path, steps: int, seed: int
) -> dict[str, list[list[Image.Image]]]:
    """By way of training the pictures at each of `SHAPES`, from the same embeddings, the same noise at one shape."""
    prompts = [prompt for prompt, _ in asked]
    embeds, generators = imagine(prompts, output / "runs" / "prior", steps=steps, seed=seed)
    drawn = {
        way: [paint(embeds, generators, output / "runs" / way, shape, steps=steps) for shape in SHAPES] for way in WAYS
    }
    for way, of_way in drawn.items():
        for shape, pictures in zip(SHAPES, of_way, strict=True):
            folder = output / "samples" / way / "{}x{}".format(*shape)
            folder.mkdir(parents=True)
            for number, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
                picture.save(folder / f"{number:03} {prompt}.png")
    return drawn


def _ceiling(wanted: Sequence[Drawing], decoder: Path) -> tuple[PaperScore, ...]:
    """What real scans that no network has seen are worth on each paper, after the MoVQ and back."""
    real = [*zip(real_pictures(wanted), wanted, strict=True)]
    on_each = [[on_paper(digit, drawing.paper, shape) for digit, drawing in real] for shape in SHAPES]
    return tuple(score_papers(round_trip(pictures, decoder), wanted) for pictures in on_each)


def _picture(
    result: ShapesResult, asked: Sequence[tuple[str, Drawing]], drawn: dict[str, list[list[Image.Image]]]
) -> bytes:
    """Both decoders' pictures of the same prompts below each other, shape by shape, as a PNG."""
    rows = [(number, way) for number in range(len(SHAPES)) for way in WAYS]
    columns = range(0, len(asked), result.size.samples)[:COLUMNS]

    def draw(figure: "Figure") -> None:
        ratios = [SHAPES[number][0] / SHAPES[number][1] for number, _ in rows]
        axes = figure.subplots(len(rows), len(columns), height_ratios=ratios, squeeze=False)
        figure.subplots_adjust(left=0.17, right=0.985, top=0.93, bottom=0.09, wspace=0.12, hspace=0.12)
        figure.text(0.02, 0.962, "The same prompts, drawn at three shapes", fontsize=15, fontweight="bold")
        for of_row, (number, way) in zip(axes, rows, strict=True):
            score, best = result.scores[way][number], way == WAYS[0]
            text = f"{ratio_of(SHAPES[number])}, trained on {way}\n{score.everything:.1f} % right and in place"
            of_row[0].text(
                -0.12, 0.5, text, transform=of_row[0].transAxes, ha="right", va="center",
                color=TEXT if best else FAINT, fontweight="bold" if best else "normal", fontsize=9,
            )  # fmt: skip
            for ax, column in zip(of_row, columns, strict=True):
                ax.imshow(np.asarray(drawn[way][number][column]), interpolation="nearest")
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set_visible(True)
        for ax, column in zip(axes[-1], columns, strict=True):
            ax.set_xlabel("\n".join(textwrap.wrap(asked[column][0], 17)), fontsize=8)

    return png_of(draw, 14.0, 8.8, dpi=110, layout=None)
