"""How far a build is in a table, told now and then."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from kcache.build.plan import PlannedShard
from kcache.stopping import stop_here

REPORT_SECONDS = 0.2
"""How often progress is reported, at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildProgress:
    """Where a build stands in the table it is working on."""

    table: str
    done: int
    total: int
    """Inputs done, and to be done, by this builder alone."""
    seconds: float
    """Time spent on this table so far."""
    busy: Mapping[str, float]
    """Share of the time (0 to 1) spent waiting for decoded inputs, encoding, and waiting for the disk."""
    who: str = ""
    """Of an engine: how many encode, on how many machines, and how often that had to be tried again."""


BuildReport = Callable[[BuildProgress], None]


class ShardProgress:
    """Counts inputs of one table and reports now and then."""

    def __init__(self, table: str, total: int, report: BuildReport | None) -> None:
        self.total = total
        self._table = table
        self._report = report
        self._start = time.perf_counter()
        self._done = 0
        self._reported = 0.0

    def add(self, inputs: int, busy: Mapping[str, float]) -> None:
        stop_here()
        self._done += inputs
        now = time.perf_counter()
        if self._report and (now - self._reported >= REPORT_SECONDS or self._done == self.total):
            self._reported = now
            table, seconds = self._table, now - self._start
            self._report(BuildProgress(table=table, done=self._done, total=self.total, seconds=seconds, busy=busy))

    def counted(self, shards: Iterator[PlannedShard]) -> Iterator[PlannedShard]:
        """The `shards`, each counted as written when the next one is asked for."""
        for shard in shards:
            yield shard
            self.add(len(shard.keys), {"write": 1.0})
