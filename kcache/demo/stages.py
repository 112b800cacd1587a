"""The demo's training runs: each stage once from start to end, and its first steps again the other way."""

import statistics
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

from kcache.config import TrainConfig
from kcache.demo.result import Measured, StageResult
from kcache.store.run_directory import read_metrics
from kcache.training import trainer
from kcache.training.log import Progress

Stage = Literal["prior", "decoder"]
"""The network that learns."""


class _Enough(BaseException):
    """Ends a training run whose first steps are all that is asked for: an Exception would cost the report alone."""


def stage_config(stage: Stage, run_dir: Path, steps: int, batch_size: int, seed: int) -> TrainConfig:
    """How the demo trains: what `kcache train-prior` or `kcache train-decoder` would be told."""
    return TrainConfig(
        stage=stage,
        output_dir=str(run_dir),
        seed=seed,
        train_batch_size=batch_size,
        max_train_steps=steps,
        learning_rate=1e-3 if stage == "prior" else 2e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=0,
        use_ema=True,
        ema_decay=0.995,
        # For guidance each network learns to do without its condition, too.
        caption_dropout=0.1 if stage == "prior" else 0.0,
        image_dropout=0.1 if stage == "decoder" else 0.0,
        checkpointing_steps=steps + 1,
        report_to="none",
    )


def train(cache: Path, config: TrainConfig, *, last: int | None = None) -> Measured:
    """A training run, left after step `last` or the first report after it."""
    rates: list[float] = []

    def report(progress: Progress) -> None:
        rates.append(progress.samples_per_second)
        if last is not None and last <= progress.step < progress.max_steps:
            raise _Enough

    with suppress(_Enough):
        trainer.train(str(cache), config, report=report)
    losses = tuple(entry["loss"] for entry in read_metrics(Path(config.output_dir)))
    # The median, without what was reported first, of steps that still warm up: no busy moment decides the result.
    return Measured(losses=losses, samples_per_second=statistics.median(rates[1:] or rates))


def repeat(cache: Path, config: TrainConfig, pictures: Path, first: Measured, steps: int) -> StageResult:
    """The first `steps` steps of a finished run again: with the encoders in the loop, or from the cache if it had them.

    `first` is what that run measured, `pictures` what the cache was built of.
    """
    again = replace(
        config,
        output_dir=f"{config.output_dir}-again",
        online=str(pictures) if config.online is None else None,
        validation_prompts=(),
        validation_steps=None,
    )
    second = train(cache, again, last=steps)
    cached, online = (first, second) if config.online is None else (second, first)
    return StageResult(stage=config.stage, batch_size=config.train_batch_size, cached=cached, online=online)
