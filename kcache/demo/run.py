"""The demo: build a cache, train both networks from it and without it, draw pictures, and measure all of that."""

import json
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from kcache.config import BuildConfig, TrainConfig
from kcache.demo.digits import DIGITS, SIDE, caption_of, write_digits
from kcache.demo.picture import draw_result
from kcache.demo.result import DemoResult, Measured, StageResult
from kcache.demo.tiny import demo_models
from kcache.errors import ConfigError

__all__ = ["run_demo"]

IMAGES = 480
BATCH_SIZE = 32
MARKER = ".kcache-demo"
"""File that says that a folder is a demo's own, to be emptied by the next."""
PROMPTS = tuple(
    caption_of(digit, ink, paper)
    for digit, (ink, paper) in enumerate(
        [
            ("black", "white"),
            ("red", "cream"),
            ("orange", "mint"),
            ("green", "pink"),
            ("blue", "white"),
            ("purple", "cream"),
            ("black", "mint"),
            ("red", "pink"),
            ("orange", "white"),
            ("green", "cream"),
        ]
    )
)

Say = Callable[[str], None]


def run_demo(output: Path, steps: int, *, say: Say) -> DemoResult:
    """Do everything in the folder `output`, each training run with `steps` optimizer steps; `say` is told what happens.

    Needs no network. What an earlier demo left in `output` is removed first. Raises ConfigError when `output` holds
    anything else, or where scikit-learn or matplotlib is not installed.
    """
    start = time.perf_counter()
    _check_installed()
    _take(output)
    _silence_libraries()

    say(f"writing {IMAGES} pictures of digits and a tiny Kandinsky 2.2 with random weights to {output}")
    pictures = output / "pictures"
    write_digits(pictures, IMAGES)
    prior, decoder = demo_models(output / "models")

    say("building the cache, twice: the second time there is nothing to do")
    build_seconds, cache_bytes = _build(output, prior, decoder)
    rebuild_seconds, _ = _build(output, prior, decoder)

    stages = (_train_twice("prior", output, steps, say), _train_twice("decoder", output, steps, say))

    say(f"drawing {len(PROMPTS)} pictures with the stock diffusers pipelines")
    outputs = _draw(output)
    captioned = _captions(pictures)
    result = DemoResult(
        images=IMAGES,
        captions=len({caption for _, caption in captioned}),
        build_seconds=build_seconds,
        rebuild_seconds=rebuild_seconds,
        cache_bytes=cache_bytes,
        batch_size=BATCH_SIZE,
        steps=steps,
        stages=stages,
        inputs=_one_per_digit(captioned),
        outputs=outputs,
        picture=output / "demo.png",
        seconds=time.perf_counter() - start,
    )
    draw_result(result, result.picture)
    return result


def _check_installed() -> None:
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed; the demo needs it: pip install 'kcache[demo]'") from error


def _take(output: Path) -> None:
    """Make `output` an empty folder of ours, or refuse."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file; expected a folder for the demo, or a path where nothing is")
    if output.is_dir() and any(output.iterdir()):
        if not (output / MARKER).exists():
            raise ConfigError(f"{output} is not empty and not an earlier demo's; give another folder: --output DIR")
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER).touch()


def _silence_libraries() -> None:
    """The demo loads tiny networks many times: bars and advice about that would be all one sees."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()


def _build(output: Path, prior: Path, decoder: Path) -> tuple[float, int]:
    """Seconds that the build took, and bytes of the cache's tables."""
    from kcache.build import build_cache

    config = BuildConfig(
        resolution=(SIDE,),
        # Rows as the encoders made them: only then can losses be equal bit for bit with the encoders in the loop.
        dtype="float32",
        batch_size=BATCH_SIZE,
        pretrained_prior_model_name_or_path=str(prior),
        pretrained_decoder_model_name_or_path=str(decoder),
    )
    result = build_cache(str(output / "pictures"), str(output / "cache"), config)
    return result.seconds, sum(table.bytes for table in result.tables.values())


def _train_twice(stage: Literal["prior", "decoder"], output: Path, steps: int, say: Say) -> StageResult:
    say(f"training the {stage} for {steps} steps from the cache")
    cached = _train(stage, output, output / "runs" / stage, steps, online=None)
    say(f"training the {stage} for the same {steps} steps with the encoders in the loop")
    online = _train(stage, output, output / "runs" / f"{stage}-online", steps, online=str(output / "pictures"))
    return StageResult(stage=stage, cached=cached, online=online)


def _train(stage: Literal["prior", "decoder"], output: Path, run_dir: Path, steps: int, online: str | None) -> Measured:
    from kcache.run_directory import read_metrics
    from kcache.trainer import train

    config = TrainConfig(
        stage=stage,
        output_dir=str(run_dir),
        online=online,
        train_batch_size=BATCH_SIZE,
        max_train_steps=steps,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=0,
        checkpointing_steps=steps + 1,
    )
    rates: list[float] = []
    train(str(output / "cache"), config, report=lambda progress: rates.append(progress.samples_per_second))
    losses = tuple(entry["loss"] for entry in read_metrics(run_dir))
    # The median: a machine that is busy with something else for a moment does not decide the result.
    return Measured(losses=losses, samples_per_second=statistics.median(rates))


def _draw(output: Path) -> tuple[tuple[Path, str], ...]:
    from kcache.sampling import sample

    images = sample(
        PROMPTS,
        prior=str(output / "runs" / "prior"),
        decoder=str(output / "runs" / "decoder"),
        num_inference_steps=25,
        height=SIDE,
        width=SIDE,
        device="cpu",
    )
    folder = output / "samples"
    folder.mkdir()
    drawn = []
    for digit, (prompt, image) in enumerate(zip(PROMPTS, images, strict=True)):
        path = folder / f"{DIGITS[digit]}.png"
        image.save(path)
        drawn.append((path, prompt))
    return tuple(drawn)


def _captions(pictures: Path) -> list[tuple[Path, str]]:
    lines = (pictures / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [(pictures / row["file_name"], row["text"]) for row in map(json.loads, lines)]


def _one_per_digit(captioned: list[tuple[Path, str]]) -> tuple[tuple[Path, str], ...]:
    shown: dict[str, tuple[Path, str]] = {}
    for path, caption in captioned:
        digit = next(word for word in caption.split() if word in DIGITS)
        shown.setdefault(digit, (path, caption))
    return tuple(shown[digit] for digit in DIGITS if digit in shown)
