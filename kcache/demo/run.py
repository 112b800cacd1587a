"""The demo: build a cache, train both networks from it, compare that with training without it, draw, judge, measure."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from kcache.build.build import build_cache
from kcache.config import Say
from kcache.demo.digits import DIGITS, SIDE, write_lesson
from kcache.demo.exam import questions, sit_exam
from kcache.demo.picture import draw_result
from kcache.demo.report import write_report
from kcache.demo.result import DemoResult, DemoSize, StageResult
from kcache.demo.stages import (
    PRIOR_BATCH_SIZE,
    Stage,
    Work,
    begin,
    build_config,
    repeat,
    stage_config,
    train,
)
from kcache.demo.tiny import WEIGHTS, demo_models
from kcache.disk.durable import write_bytes
from kcache.report.grid import grids_of, pictures_of, step_of

SHOWN = 8
"""Prompts that are drawn while the decoder learns, of different digits."""

Format = Literal["zarr", "webdataset"]

WHOLE = DemoSize(
    pictures=5748,
    prior_steps=500,
    decoder_steps=1200,
    decoder_batch_size=32,
    repeated_steps=40,
    looks=4,
    questions=40,
    samples=5,
    sampling_steps=25,
)
QUICK = DemoSize(
    pictures=1437,
    prior_steps=150,
    decoder_steps=420,
    decoder_batch_size=16,
    repeated_steps=10,
    looks=1,
    questions=40,
    samples=2,
    sampling_steps=20,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Demo:
    """What a demo works with."""

    output: Path
    size: DemoSize
    seed: int
    format: Format
    online: bool
    work: Work


def run_demo(
    output: Path,
    size: DemoSize,
    *,
    say: Say,
    seed: int = 0,
    format: Format = "zarr",
    online: bool = False,
    encoders: Path = WEIGHTS,
) -> DemoResult:
    """Do everything in the folder `output`; `say` is told what happens.

    It ends with result.json, demo.png and report.html, beside all that was trained and drawn. What an earlier demo left
    in `output` is removed first; no network is needed. `seed` decides the weights that training begins with, what is
    seen when, and the noise of the pictures drawn. `online` trains with the encoders in the loop and compares with the
    cache, instead of the other way round. `encoders` is a folder of weights as benchmarks/pretrain_demo.py writes it.
    Raises ConfigError when `output` holds anything else.
    """
    begin(output)
    demo = _Demo(output=output, size=size, seed=seed, format=format, online=online, work=Work(say=say))
    result = _do(demo, encoders)
    write_bytes(output / "result.json", result.to_json().encode())
    draw_result(result, output / "demo.png")
    write_report(result, output / "report.html")
    return result


def _do(demo: _Demo, encoders: Path) -> DemoResult:
    pictures = demo.output / "pictures"
    with demo.work.spending("pictures", f"writing pictures of digits and a tiny Kandinsky 2.2 to {demo.output}"):
        write_lesson(pictures, demo.size.pictures)
        prior, decoder = demo_models(demo.output / "models", encoders, seed=demo.seed)
    with demo.work.spending(
        "cache", f"building the cache of {demo.size.pictures:,} pictures, twice: then there is nothing to do"
    ):
        build_seconds, cache_bytes = _build(demo, prior, decoder)
        rebuild_seconds, _ = _build(demo, prior, decoder)
    asked = questions()[: demo.size.questions]
    stages = _train(demo, [prompt for prompt, _ in asked[:SHOWN]])
    drawn = len(asked) * demo.size.samples
    with demo.work.spending(
        "exam", f"drawing {drawn} pictures of digits in inks they were never seen in; judging them"
    ):
        exam = sit_exam(
            asked, demo.output / "samples", demo.output / "runs", size=demo.size, seed=1_000_000 * demo.seed
        )
    captioned = _captioned(pictures)
    return DemoResult(
        size=demo.size,
        seed=demo.seed,
        encoders=encoders,
        format=demo.format,
        images=demo.size.pictures,
        captions=len({caption for _, captions in captioned for caption in captions}),
        build_seconds=build_seconds,
        rebuild_seconds=rebuild_seconds,
        cache_bytes=cache_bytes,
        stages=stages,
        inputs=_one_per_digit(captioned),
        looks=tuple((step_of(grid), tuple(pictures_of(grid))) for grid in grids_of(demo.output / "runs" / "decoder")),
        exam=exam,
        seconds=demo.work.seconds,
    )


def _build(demo: _Demo, prior: Path, decoder: Path) -> tuple[float, int]:
    """Seconds that the build took, and bytes of the cache's tables."""
    config = replace(build_config((prior, decoder), SIDE), format=demo.format)
    result = build_cache(str(demo.output / "pictures"), str(demo.output / "cache"), config)
    return result.seconds, sum(table.bytes for table in result.tables.values())


def _train(demo: _Demo, prompts: Sequence[str]) -> tuple[StageResult, ...]:
    """Both stages; `prompts` are drawn while the decoder learns, through the prior that was trained before."""
    cache, pictures, runs = demo.output / "cache", demo.output / "pictures", demo.output / "runs"
    way, other = "from the cache", "with the encoders in the loop"
    if demo.online:
        way, other = other, way
    stages = []
    size = demo.size
    runs_to_do: tuple[tuple[Stage, int, int], ...] = (
        ("prior", size.prior_steps, PRIOR_BATCH_SIZE),
        ("decoder", size.decoder_steps, size.decoder_batch_size),
    )
    for stage, steps, batch_size in runs_to_do:
        config = stage_config(stage, runs / stage, steps, batch_size, demo.seed)
        config = replace(config, online=str(pictures) if demo.online else None)
        if stage == "decoder":
            config = replace(
                config,
                validation_prompts=tuple(prompts),
                validation_steps=math.ceil(steps / size.looks),
                pretrained_prior_model_name_or_path=str(runs / "prior"),
            )
        with demo.work.spending(stage, f"training the {stage} for {steps} steps {way}"):
            measured = train(cache, config)
        again = min(demo.size.repeated_steps, steps)
        with demo.work.spending("comparison", f"training it for the first {again} of these steps {other}"):
            stages.append(repeat(cache, config, pictures, measured, again))
    return tuple(stages)


def _captioned(pictures: Path) -> list[tuple[Path, list[str]]]:
    lines = (pictures / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [(pictures / row["file_name"], row["text"]) for row in map(json.loads, lines)]


def _one_per_digit(captioned: list[tuple[Path, list[str]]]) -> tuple[tuple[Path, str], ...]:
    shown: dict[str, tuple[Path, str]] = {}
    for path, captions in captioned:
        digit = next(word for word in captions[0].replace(",", "").split() if word in DIGITS)
        shown.setdefault(digit, (path, captions[0]))
    return tuple(shown[digit] for digit in DIGITS if digit in shown)
