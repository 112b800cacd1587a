"""What a demo measured."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSize:
    """How much of everything a demo does."""

    pictures: int
    """Pictures to train on; there are 1,437 scans, and 20 ways to draw each."""
    prior_steps: int
    decoder_steps: int
    decoder_batch_size: int
    """Pictures of one of its steps; the prior takes 64."""
    repeated_steps: int
    """Steps that are made a second time, to compare: with the encoders in the loop, or without."""
    looks: int
    """How often pictures are drawn while the decoder learns, 1 or more."""
    questions: int
    """Held-out drawings that are asked for, 1 to 40."""
    samples: int
    """Pictures per prompt, 2 or more."""
    sampling_steps: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One training run."""

    losses: tuple[float, ...]
    """Loss of each optimizer step."""
    samples_per_second: float
    """Median over the run, its beginning left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageResult:
    """A training run, and the first of its steps again the other way: one from the cache, one with the encoders."""

    stage: str
    """"prior" or "decoder"."""
    batch_size: int
    cached: Measured
    online: Measured

    @property
    def steps(self) -> int:
        """Of the run that was not cut short."""
        return max(len(self.cached.losses), len(self.online.losses))

    @property
    def repeated(self) -> int:
        """Steps that both runs made."""
        return min(len(self.cached.losses), len(self.online.losses))

    @property
    def speedup(self) -> float:
        """How many times more samples per second the cache gives."""
        return self.cached.samples_per_second / self.online.samples_per_second

    @property
    def largest_difference(self) -> float:
        """Largest absolute difference between the losses of the steps that both runs made; 0.0 is bit for bit."""
        pairs = zip(self.cached.losses, self.online.losses, strict=False)
        return max(abs(cached - online) for cached, online in pairs)

    @property
    def equality(self) -> str:
        """How far the losses of both agree, in words."""
        return "equal bit for bit" if self.largest_difference == 0 else f"within {self.largest_difference:.1e}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """How often pictures show what was asked for, in per cent."""

    digit: float
    ink: float
    paper: float
    everything: float
    """All three right in one picture."""

    @property
    def cells(self) -> tuple[str, ...]:
        """All four as text with one decimal."""
        return tuple(f"{share:.1f}" for share in (self.digit, self.ink, self.paper, self.everything))


@dataclass(frozen=True, kw_only=True, slots=True)
class DigitScore:
    """How often one judge of digits found the right one, in per cent."""

    judge: str
    drawn: float
    ceiling: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Variety:
    """Whether pictures are copies: of each other, or of what was there to learn from.

    Root mean squares over the 8 x 8 values of how much ink covers a scan's pixel, each from 0 to 1.
    """

    spread: float
    """Between two pictures of the same prompt."""
    to_known: float
    """To the nearest scan that was there to learn from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExamResult:
    """What came out for prompts whose digit and ink never went together in what the demo trained on."""

    drawn: tuple[tuple[str, tuple[Path, ...]], ...]
    """The prompts, each with its pictures."""
    score: Score
    """Of the pictures drawn."""
    ceiling: Score
    """Of as many real pictures, of scans that no network has seen, put through the MoVQ and back."""
    chance: Score
    judges: tuple[DigitScore, ...]
    """All judges of digits; the first is the one of the scores above."""
    drawn_variety: Variety
    real_variety: Variety
    """Of the real pictures, as they are."""

    @property
    def compared(self) -> dict[str, Score]:
        """The three scores by name, to be shown below each other."""
        return {
            "drawn from their prompts": self.score,
            "unseen real scans through the MoVQ": self.ceiling,
            "guessing": self.chance,
        }

    @property
    def pictures(self) -> int:
        """How many pictures were drawn and judged."""
        return sum(len(paths) for _, paths in self.drawn)


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult:
    """Everything that the demo shows, all of it measured in one run."""

    size: DemoSize
    seed: int
    encoders: Path
    """Folder of the frozen encoders' weights."""
    format: str
    """Of the cache: "zarr" or "webdataset"."""
    images: int
    captions: int
    """Distinct captions, each encoded once."""
    build_seconds: float
    rebuild_seconds: float
    """Time to build again with nothing to do."""
    cache_bytes: int
    stages: tuple[StageResult, ...]
    inputs: tuple[tuple[Path, str], ...]
    """Some of the pictures that went in, with one of their captions."""
    looks: tuple[tuple[int, tuple[Path, ...]], ...]
    """The decoder's optimizer steps, each with pictures of the first prompts as they were drawn then."""
    exam: ExamResult
    seconds: Mapping[str, float]
    """Where the time went, in the order in which it did."""

    @property
    def total_seconds(self) -> float:
        """Of everything but Python's start and the pages."""
        return sum(self.seconds.values())

    def to_json(self) -> str:
        """All of it, with what follows from it, as JSON; paths as text."""
        stages = [{"speedup": stage.speedup, "largest_difference": stage.largest_difference} for stage in self.stages]
        plain = asdict(self) | {"total_seconds": self.total_seconds, "compared": stages}
        return json.dumps(plain, indent=1, default=str) + "\n"
