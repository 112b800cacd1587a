"""What a demo measured."""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["DemoResult", "Measured", "StageResult"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One training run."""

    losses: tuple[float, ...]
    """Loss of each optimizer step."""
    samples_per_second: float
    """Median over the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageResult:
    """The same training run twice: from the cache, and with the frozen encoders in the loop."""

    stage: str
    """"prior" or "decoder"."""
    cached: Measured
    online: Measured

    @property
    def speedup(self) -> float:
        """How many times more samples per second the cache gives."""
        return self.cached.samples_per_second / self.online.samples_per_second

    @property
    def largest_difference(self) -> float:
        """Largest absolute difference between the losses of the two runs, over all steps; 0.0 is bit for bit."""
        pairs = zip(self.cached.losses, self.online.losses, strict=True)
        return max(abs(cached - online) for cached, online in pairs)


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult:
    """Everything that the demo shows, all of it measured in one run."""

    images: int
    captions: int
    """Distinct captions, each encoded once."""
    build_seconds: float
    rebuild_seconds: float
    """Time to build again with nothing to do."""
    cache_bytes: int
    batch_size: int
    steps: int
    stages: tuple[StageResult, ...]
    inputs: tuple[tuple[Path, str], ...]
    """Some of the pictures that went in, with their captions."""
    outputs: tuple[tuple[Path, str], ...]
    """The pictures that came out, with their prompts."""
    picture: Path
    """One PNG that shows it all."""
    seconds: float
