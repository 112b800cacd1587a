"""What the demos do step by step: begin in an empty folder, build a cache, train from it, and take the time.

A stage is trained once from start to end, and its first steps again the other way.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from kcache.config import BuildConfig, Say, TrainConfig
from kcache.demo.folder import take_folder
from kcache.demo.result import Measured, StageResult
from kcache.store.run_directory import read_metrics
from kcache.training import trainer
from kcache.training.log import Progress

Stage = Literal["prior", "decoder"]
"""The network that learns."""

PRIOR_BATCH_SIZE = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a demo says of its parts, and the time that each takes."""

    say: Say
    seconds: dict[str, float] = field(default_factory=dict)
    """By part, in the order in which they were done."""

    @contextmanager
    def spending(self, name: str, what: str) -> Iterator[None]:
        """Say `what` is done, and add the time that it takes to `seconds`."""
        self.say(what)
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def begin(output: Path) -> None:
    """Make `output` an empty folder of a demo; raises ConfigError where it holds anything else.

    A demo loads tiny networks many times: the libraries' bars and advice about that would be all one sees.
    """
    take_folder(output)
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()


def build_config(models: tuple[Path, Path], side: int) -> BuildConfig:
    """How the demos build: what `kcache cache-build` would be told of these networks and squares of `side` pixels."""
    prior, decoder = map(str, models)
    return BuildConfig(
        resolution=(side,),
        # Rows as the encoders made them: only then can losses be equal bit for bit with the encoders in the loop.
        dtype="float32",
        batch_size=32,
        pretrained_prior_model_name_or_path=prior,
        pretrained_decoder_model_name_or_path=decoder,
    )


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
