"""A builder that has its plans worked off by actors on the machines of a Ray cluster, one encoder each.

This process plans, claims and hands out; it may be killed at any moment and started again, as what is committed says
all. Actors come and go with the machines. Whole samples are written into tars by this process, as ever.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kcache.build.builder import Builder
from kcache.build.committed import Committed
from kcache.build.plan import Plan, PlannedShard, TablePlan, claims_folder
from kcache.engines.actor import EncodingActor
from kcache.engines.cluster import joined, machines_of, slot_of
from kcache.engines.crew import Crew
from kcache.engines.ledger import Ledger
from kcache.engines.tasks import Setup, task_maker
from kcache.engines.turn import Turn
from kcache.store.recipe import TEXT


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
        make, total = task_maker(self.job, table.recipe), lambda: progress.total
        turn = Turn(self._crew, table, ledger, make, total, self.patience.say, self.report)
        turn.run()
        self._note_times(table, turn.seconds())

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
            wants=job.wants,
            repositories=job.repositories,
            need_captions=TEXT.name in job.recipes,
            directory=str(Path.cwd()),
            threads=torch.get_num_threads() if slot.gpus else min(torch.get_num_threads(), slot.cpus),
            workers=config.num_workers or slot.cpus,
            version=version("kcache"),
        )
        crew = Crew(ray, EncodingActor, setup, slot, self.patience.say)
        self._left.callback(crew.release)
        return crew

    def _note_times(self, table: TablePlan, seconds: Mapping[str, float]) -> None:
        """Add up what the time of the actors' encoding threads went into."""
        from kcache.build.work.meter import Meter

        meter = self.meters.setdefault(table.recipe.table, Meter())
        for stage in meter.seconds:
            meter.seconds[stage] += seconds.get(stage, 0.0)
        meter.held_up += seconds.get("held_up", 0.0)
