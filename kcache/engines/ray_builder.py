"""A builder that has its plans worked off by actors on the machines of a Ray cluster, one encoder each.

This process plans, claims and hands out; it may be killed at any moment and started again, as what is committed says
all. Actors come and go with the machines. Whole samples are written into tars by this process, as ever.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kcache.build.builder import REPORT_SECONDS, Builder, BuildProgress
from kcache.build.committed import Committed
from kcache.build.plan import Plan, PlannedShard, TablePlan, claims_folder
from kcache.engines.cluster import joined, machines_of, slot_of, why_lost
from kcache.engines.crew import Crew, Hand
from kcache.engines.ledger import Ledger
from kcache.engines.tasks import Look, Setup, task_maker
from kcache.errors import KcacheError, StoreError
from kcache.stopping import stop_here
from kcache.store.recipe import TEXT
from kcache.tally import counted


@dataclass
class RayBuilder(Builder):
    """Works off each plan with a crew of its own; joins the cluster only where there is something to encode."""

    source: str = ""
    _left: ExitStack = field(default_factory=ExitStack)
    """What is to be left when a plan is worked off: the cluster, and before that its actors."""
    _crew: Crew | None = None

    def work_off(self, plan: Plan, found: Committed) -> None:
        """As any builder does; when it returns, or raises, no actor is left."""
        self._crew, self._plan_folder = None, claims_folder(self.job.folder, plan).parent
        with self._left:
            super().work_off(plan, found)

    def _encode(self, table: TablePlan, shards: Iterator[PlannedShard], progress: Any, claims: Any) -> None:
        self._crew = self._crew or self._gathered()
        self.patience.say(f"{table.recipe.table}: {progress.total} to encode, by actors with {self._crew.slot} each")
        folder = self.job.folder / table.recipe.directory
        ledger = Ledger(shards, lambda shard: (folder / f"{shard.name}.json").is_file(), partial(claims.settled, table))
        _Turn(self, self._crew, table, ledger, lambda: progress.total).run()

    def _gathered(self) -> Crew:
        """A crew of nobody yet, on the cluster that was asked for."""
        import torch

        job, config = self.job, self.job.config
        ray = self._left.enter_context(joined(config.address, self.patience.say))
        slot = slot_of(machines_of(ray), config.device, torch.get_num_threads(), config.num_workers)
        setup = Setup(
            source=self.source,
            cache=str(job.folder.absolute()),
            plan=str(self._plan_folder.absolute()),
            config=config,
            repositories=job.repositories,
            need_captions=TEXT.name in job.recipes,
            directory=str(Path.cwd()),
            threads=torch.get_num_threads() if slot.gpus else min(torch.get_num_threads(), slot.cpus),
            workers=config.num_workers or slot.cpus,
            version=version("kcache"),
        )
        crew = Crew(ray, setup, slot, self.patience.say)
        self._left.callback(crew.release)
        return crew


@dataclass
class _Turn:
    """One table, handed out to a crew until all of it is committed."""

    builder: RayBuilder
    crew: Crew
    table: TablePlan
    ledger: Ledger
    total: Callable[[], int]
    """Inputs of the table that are this builder's."""
    start: float = field(default_factory=time.perf_counter)
    reported: float = 0.0
    shown: int = -1
    """Inputs that were done by then."""

    def run(self) -> None:
        """Raises what an actor could not do, EngineError, or what ends the build where a signal came."""
        make = task_maker(self.builder.job, self.table.recipe)
        while self.ledger.open:
            stop_here()
            left = self.total() - self.ledger.inputs
            self.crew.grow(max(1, -(-left // self.table.rows_per_shard)))
            while (hand := self.crew.free()) is not None and (shard := self.ledger.take()) is not None:
                self.crew.give(hand, make(shard))
            if self.ledger.open:
                for hand, about, ref in self.crew.answers():
                    self._settle(hand, about, ref)
            self._report()
        self._note_times()

    def _settle(self, hand: Hand, shard: PlannedShard | None, ref: Any) -> None:
        from ray import get
        from ray.exceptions import RayError, RayTaskError

        try:
            look = get(ref)
        except RayTaskError as error:
            self._failed(hand, shard, error.cause if isinstance(error.cause, KcacheError) else error)
        except RayError as error:  # it may have died after the commit, or not have died: its shards' records decide
            why = why_lost(error)
            shards = [*([shard] if shard else []), *self.crew.lost(hand, why)]
            again = self.ledger.lose(shards, why)
            if hand.look and again:
                self.builder.patience.say(
                    f"an actor on {hand.look.host} is lost ({why}): {counted(again, 'shard')} handed out again"
                )
        else:
            self.crew.heard(hand, look)
            if shard is not None:
                self.ledger.settle(shard)

    def _failed(self, hand: Hand, shard: PlannedShard | None, error: BaseException) -> None:
        if not isinstance(error, StoreError) or shard is None:
            raise error
        self.ledger.fail(shard, error)
        self.builder.patience.say(f"shard {shard.name} is tried again: {error}")

    def _looks(self) -> list[tuple[Hand, Look]]:
        return [
            (hand, hand.look) for hand in self.crew.hands if hand.look and hand.look.table == self.table.recipe.table
        ]

    def _seconds(self) -> Counter[str]:
        seconds = Counter[str]()
        for _, look in self._looks():
            seconds.update(look.seconds)
        return seconds

    def _note_times(self) -> None:
        """Add up what the time of the actors' encoding threads went into."""
        from kcache.build.encode import Meter

        meter, seconds = self.builder.meters.setdefault(self.table.recipe.table, Meter()), self._seconds()
        for stage in meter.seconds:
            meter.seconds[stage] += seconds[stage]
        meter.held_up += seconds["held_up"]

    def _report(self) -> None:
        now, looks, seconds = time.perf_counter(), self._looks(), self._seconds()
        done = self.ledger.inputs + sum(look.done.get(name, 0) for hand, look in looks for name in hand.shards)
        due = now - self.reported >= REPORT_SECONDS if self.ledger.open else done != self.shown
        if self.builder.report is None or not due:
            return
        self.reported, self.shown = now, done
        seconds.pop("held_up", None)
        spent = sum(seconds.values()) or 1.0
        there = [hand.look.host for hand in self.crew.hands if hand.look]
        who = f"{counted(len(there), 'actor')} on {counted(len(set(there)), 'machine')}"
        if self.ledger.retries:
            who += f", {counted(self.ledger.retries, 'shard')} handed out again"
        self.builder.report(
            BuildProgress(
                table=self.table.recipe.table, done=done, total=self.total(),
                seconds=now - self.start, busy={stage: value / spent for stage, value in seconds.items()}, who=who,
            )
        )  # fmt: skip
