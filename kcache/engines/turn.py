"""One table of a plan, handed out to a crew until all of it is committed, whatever the crew is there for."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kcache.build.plan import PlannedShard, TablePlan
from kcache.build.work.progress import REPORT_SECONDS, BuildProgress, BuildReport
from kcache.config import Say
from kcache.engines.cluster import why_lost
from kcache.engines.crew import Crew, Hand
from kcache.engines.ledger import Ledger
from kcache.engines.tasks import Handed, Look
from kcache.errors import KcacheError, StoreError
from kcache.stopping import stop_here
from kcache.tally import counted


@dataclass
class Turn:
    """What is handed out, to whom, and who is told how it goes."""

    crew: Crew
    table: TablePlan
    ledger: Ledger
    make: Callable[[PlannedShard], Handed]
    """Makes a shard a task."""
    total: Callable[[], int]
    """Inputs of the table that are this process's to hand out."""
    say: Say
    report: BuildReport | None
    _start: float = field(default_factory=time.perf_counter)
    _reported: float = 0.0
    _shown: int = -1
    """Inputs that were done by then."""

    def run(self) -> None:
        """Raises what an actor could not do, EngineError, or what ends the work where a signal came."""
        while self.ledger.open:
            stop_here()
            left = self.total() - self.ledger.inputs
            self.crew.grow(max(1, -(-left // self.table.rows_per_shard)))
            while (hand := self.crew.free()) is not None and (shard := self.ledger.take()) is not None:
                self.crew.give(hand, self.make(shard))
            if self.ledger.open:
                for hand, about, ref in self.crew.answers():
                    self._settle(hand, about, ref)
            self._report()

    def seconds(self) -> Counter[str]:
        """What the time of the actors that are there went into, as `TableResult.seconds` has it."""
        seconds = Counter[str]()
        for _, look in self._looks():
            seconds.update(look.seconds)
        return seconds

    def _settle(self, hand: Hand, shard: PlannedShard | None, ref: Any) -> None:
        from ray import get
        from ray.exceptions import RayError, RayTaskError

        try:
            look = get(ref)
        except RayTaskError as error:
            self._failed(shard, error.cause if isinstance(error.cause, KcacheError) else error)
        except RayError as error:  # it may have died after the commit, or not have died: its shards' records decide
            why = why_lost(error)
            shards = [*([shard] if shard else []), *self.crew.lost(hand, why)]
            again = self.ledger.lose(shards, why)
            if hand.look and again:
                self.say(f"an actor on {hand.look.host} is lost ({why}): {counted(again, 'shard')} handed out again")
        else:
            self.crew.heard(hand, look)
            if shard is not None:
                self.ledger.settle(shard)

    def _failed(self, shard: PlannedShard | None, error: BaseException) -> None:
        if not isinstance(error, StoreError) or shard is None:
            raise error
        self.ledger.fail(shard, error)
        self.say(f"shard {shard.name} is tried again: {error}")

    def _looks(self) -> list[tuple[Hand, Look]]:
        return [
            (hand, hand.look) for hand in self.crew.hands if hand.look and hand.look.table == self.table.recipe.table
        ]

    def _report(self) -> None:
        now, looks, seconds = time.perf_counter(), self._looks(), self.seconds()
        done = self.ledger.inputs + sum(look.done.get(name, 0) for hand, look in looks for name in hand.shards)
        due = now - self._reported >= REPORT_SECONDS if self.ledger.open else done != self._shown
        if self.report is None or not due:
            return
        self._reported, self._shown = now, done
        seconds.pop("held_up", None)
        spent = sum(seconds.values()) or 1.0
        there = [hand.look.host for hand in self.crew.hands if hand.look]
        who = f"{counted(len(there), 'actor')} on {counted(len(set(there)), 'machine')}"
        if self.ledger.retries:
            who += f", {counted(self.ledger.retries, 'shard')} handed out again"
        self.report(
            BuildProgress(
                table=self.table.recipe.table, done=done, total=self.total(),
                seconds=now - self._start, busy={stage: value / spent for stage, value in seconds.items()}, who=who,
            )
        )  # fmt: skip
