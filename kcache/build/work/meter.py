"""Where the time of a thread that encodes goes, and the inputs that it waits for."""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from kcache.store.shards import Rejection


@dataclass(frozen=True, slots=True)
class Input:
    """One planned input after decoding: prepared, or rejected, or gone from the source."""

    key: bytes
    prepared: Any = None
    size: tuple[int, int] | None = None
    """Of a picture: width and height as decoded."""
    rejection: Rejection | None = None
    absent: bool = False
    ready: float = 0.0
    """When that was, by the meter's clock."""


STAGES = ("decode", "encode", "write")


@dataclass
class Meter:
    """Where the encoding thread's time goes: waiting for decoded inputs, encoding, or waiting for the writer."""

    clock: Callable[[], float] = time.perf_counter
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    held_up: float = 0.0
    """Seconds of the wait for decoded inputs in which enough for a batch were decoded, but stood behind a slow one."""

    def shares(self) -> dict[str, float]:
        """Share of the time, 0 to 1, by stage; the largest is the one that binds."""
        total = sum(self.seconds.values())
        return {stage: seconds / total if total else 0.0 for stage, seconds in self.seconds.items()}

    def timed(self, stage: str, work: Callable[[], Any]) -> Any:
        """The result of `work`, its time counted under `stage`."""
        start = self.clock()
        try:
            return work()
        finally:
            self.seconds[stage] += self.clock() - start

    def decoded(self, first: "Future[Input]", behind: Iterable["Future[Input]"], lacking: int) -> "Input":
        """The `first` of the inputs under way, waited for; `lacking` more of those `behind` it would fill a batch."""
        if first.done():
            return first.result()
        start = self.clock()
        item: Input = self.timed("decode", first.result)
        end = self.clock()
        ready = sorted(done.result().ready for done in behind if done.done() and done.exception() is None)
        if lacking <= len(ready):
            self.held_up += max(0.0, end - max(start, ready[lacking - 1]))
        return item
