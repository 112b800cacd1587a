"""Copying by actors on the machines of a Ray cluster: what a conversion has planned, handed out shard by shard.

This process claims and hands out; it may be killed at any moment and started again, as what is committed says all.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path

from kcache.build.builder import Claims, Work
from kcache.build.claims import Patience
from kcache.build.plan import Plan, PlannedShard, TablePlan, claims_folder
from kcache.build.work.progress import BuildReport, ShardProgress
from kcache.engines.cluster import joined, machines_of, slot_of
from kcache.engines.copier import CopyingActor, CopySetup, CopyTask, Portion
from kcache.engines.crew import Crew
from kcache.engines.ledger import Ledger
from kcache.engines.turn import Turn
from kcache.places import Place
from kcache.store.recipe import Recipe


@contextmanager
def copying(
    target: Place,
    plan: Plan,
    patience: Patience,
    report: BuildReport | None,
    portion: Callable[[Recipe, PlannedShard], Portion],
    *,
    address: str | None,
) -> Iterator[Work]:
    """What has shards of `plan` copied into the cache at `target`; when the block is left, no actor is.

    `portion` says what a shard is copied from, and is asked when the shard is handed out. The cluster at `address` is
    joined only where there is something to copy.
    """
    crew: Crew | None = None
    with ExitStack() as left:

        def work(table: TablePlan, shards: Sequence[PlannedShard], claims: Claims) -> None:
            nonlocal crew
            progress = ShardProgress(table.recipe.table, sum(len(shard.keys) for shard in shards), None)
            mine = claims.claimed(table, shards, progress)
            if (first := next(mine, None)) is None:
                return
            crew = crew or _gathered(target, plan, patience, left, address)
            patience.say(f"{table.recipe.table}: {progress.total:,} to copy, by actors with {crew.slot} each")
            folder = target / table.recipe.directory
            ledger = Ledger(
                chain([first], mine), lambda shard: (folder / f"{shard.name}.json").is_file(),
                partial(claims.settled, table),
            )  # fmt: skip

            def make(shard: PlannedShard) -> CopyTask:
                return CopyTask(table=table.recipe.table, shard=shard, portion=portion(table.recipe, shard))

            Turn(crew, table, ledger, make, lambda: progress.total, patience.say, report).run()

        yield work


def _gathered(target: Place, plan: Plan, patience: Patience, left: ExitStack, address: str | None) -> Crew:
    """A crew of nobody yet, on the cluster at `address`: an actor for each CPU, as copying computes checksums."""
    ray = left.enter_context(joined(address, patience.say))
    setup = CopySetup(
        plan=str(claims_folder(target, plan).parent.absolute()), directory=str(Path.cwd()), version=version("kcache")
    )
    crew = Crew(ray, CopyingActor, setup, slot_of(machines_of(ray), "cpu", 1, None), patience.say)
    left.callback(crew.release)
    return crew
