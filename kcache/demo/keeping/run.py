"""The demo of prior preservation: a prior taught a new style from a few pictures, with class rows and without."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from PIL import Image

from kcache.build.build import build_cache
from kcache.config import Say, TrainConfig
from kcache.demo.digits import SIDE, write_lesson
from kcache.demo.keeping.exam import ALL, ONE, ask, judge, questions, write_style
from kcache.demo.keeping.picture import picture_of
from kcache.demo.result import Score
from kcache.demo.stages import PRIOR_BATCH_SIZE, Stage, Work, begin, build_config, stage_config, train
from kcache.demo.tiny import demo_models
from kcache.disk.durable import write_bytes

BEFORE, WITHOUT, WITH_ONE, WITH_ALL = "before", "after, alone", "after, one class prompt", "after, ten class prompts"
STYLE_PICTURES = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class KeepingSize:
    """How much of everything it does."""

    pictures: int
    prior_steps: int
    decoder_steps: int
    decoder_batch_size: int
    further_steps: int
    """In which the prior learns the new style, twenty pictures each."""
    class_rows: int
    """Of one class prompt, or of ten together."""
    samples: int
    """Pictures of each prompt that is asked."""
    sampling_steps: int


WHOLE = KeepingSize(
    pictures=2874,
    prior_steps=400,
    decoder_steps=800,
    decoder_batch_size=32,
    further_steps=200,
    class_rows=200,
    samples=2,
    sampling_steps=20,
)
QUICK = KeepingSize(
    pictures=1437,
    prior_steps=200,
    decoder_steps=420,
    decoder_batch_size=16,
    further_steps=100,
    class_rows=100,
    samples=1,
    sampling_steps=20,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class KeepingResult:
    """What it measured."""

    size: KeepingSize
    seed: int
    scores: dict[str, dict[str, Score]]
    """By which prior has drawn, then by what was asked."""
    seconds: dict[str, float]
    """Where the time went, in the order in which it did."""

    def to_json(self) -> str:
        """All of it as JSON."""
        return json.dumps(asdict(self) | {"total_seconds": sum(self.seconds.values())}, indent=1) + "\n"


def run_keeping(output: Path, size: KeepingSize, *, say: Say, seed: int = 0) -> KeepingResult:
    """Do everything in the folder `output`; `say` is told what happens.

    It ends with preserve.json and preserve.png, beside all that was trained and drawn. What an earlier demo left in
    `output` is removed first; no network is needed. `seed` decides first weights, order and noise. Raises ConfigError
    when `output` holds anything else.
    """
    begin(output)
    work, runs = Work(say=say), output / "runs"
    said = f"writing {size.pictures:,} pictures of digits and a tiny Kandinsky 2.2 to {output}; building"
    with work.spending("cache", said):
        prior, decoder = demo_models(output / "models", seed=seed)
        write_lesson(output / "pictures", size.pictures)
        _build(output / "pictures", output / "cache", prior, decoder)
    stages: dict[Stage, tuple[int, int]] = {
        "prior": (size.prior_steps, PRIOR_BATCH_SIZE),
        "decoder": (size.decoder_steps, size.decoder_batch_size),
    }
    said = f"training the prior for {size.prior_steps} steps and a decoder for {size.decoder_steps}"
    with work.spending("prior and decoder", said):
        for stage, (steps, batch_size) in stages.items():
            train(output / "cache", stage_config(stage, runs / stage, steps, batch_size, seed))
    write_style(output / "style", STYLE_PICTURES)
    _build(output / "style", output / "style-cache", runs / "prior", decoder)
    priors = {BEFORE: runs / "prior"}
    for way, prompts in {WITHOUT: (), WITH_ONE: ONE, WITH_ALL: ALL}.items():
        priors[way] = runs / f"style-{len(prompts)}"
        said = f"teaching it a new style from {STYLE_PICTURES} pictures for {size.further_steps} steps: {way}"
        with work.spending(way, said):
            train(output / "style-cache", _style_config(priors[way], runs / "prior", prompts, size, seed))
    asked = questions(size.samples)
    count = len(priors) * sum(map(len, asked.values()))
    with work.spending("drawing", f"drawing {count} pictures of old and new; judging them"):
        drawn = {
            way: ask(asked, run, runs / "decoder", steps=size.sampling_steps, seed=1_000_000 * seed)
            for way, run in priors.items()
        }
        scores = {way: judge(pictures, asked) for way, pictures in drawn.items()}
        _save(output / "samples", drawn)
    result = KeepingResult(size=size, seed=seed, scores=scores, seconds=work.seconds)
    write_bytes(output / "preserve.json", result.to_json().encode())
    write_bytes(output / "preserve.png", picture_of(scores, asked, drawn))
    return result


def _build(pictures: Path, cache: Path, prior: Path, decoder: Path) -> None:
    build_cache(str(pictures), str(cache), build_config((prior, decoder), SIDE))


def _style_config(run_dir: Path, prior: Path, prompts: tuple[str, ...], size: KeepingSize, seed: int) -> TrainConfig:
    """How the new style is taught, beside class rows of `prompts` where there are some; all else is the same."""
    config = stage_config("prior", run_dir, size.further_steps, STYLE_PICTURES, seed + 1)
    config = replace(
        config,
        learning_rate=3e-4,
        lr_scheduler="constant",
        use_ema=False,
        ema_decay=TrainConfig.ema_decay,
        pretrained_prior_model_name_or_path=str(prior),
    )
    if not prompts:
        return config
    return replace(config, class_prompt=prompts, num_class_rows=size.class_rows // len(prompts))


def _save(folder: Path, drawn: dict[str, dict[str, list[Image.Image]]]) -> None:
    for way, groups in drawn.items():
        for name, pictures in groups.items():
            (folder / way / name).mkdir(parents=True)
            for number, picture in enumerate(pictures):
                picture.save(folder / way / name / f"{number:03}.png")
