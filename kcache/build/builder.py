"""One builder of a cache: it works off the open plan, alone or beside other builders.

Every builder claims a shard before it writes it, begins with the shards that are its own by number, goes on with those
that nobody has claimed, and then waits for the rest. No builder needs another one: what one that died had claimed is
taken over, at once if it ran on this machine, else when its lease has run out.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

from kcache.build.claims import Patience, holder, is_mine, let_go, take, unless_lost
from kcache.build.committed import Committed
from kcache.build.finish import whole_samples
from kcache.build.joined_tars import TarWriter, tar_keys
from kcache.build.pictures.contents import shard_fetcher, still_given
from kcache.build.pictures.sizes import PictureSizes
from kcache.build.plan import Plan, PlannedShard, TablePlan, claims_folder, is_open, uncommitted, unfinished
from kcache.build.survey import Survey
from kcache.build.work.meter import Meter
from kcache.build.work.progress import BuildReport, ShardProgress
from kcache.encoders.fit import enough_memory, workers_for
from kcache.errors import CacheWriteError
from kcache.machine import default_device, kept_to_groups
from kcache.places import Place
from kcache.places.effects import make_folder
from kcache.places.holds import writing
from kcache.store.digests import Positions
from kcache.store.samples import Sample, with_ids
from kcache.store.shards import read_commits

if TYPE_CHECKING:
    from kcache.encoders.frozen import Encoder

_LIST_SECONDS = 10.0
"""How often it is looked, at most, what others claimed."""


Work = Callable[[TablePlan, Sequence[PlannedShard], "Claims"], None]
"""Called with shards of a table, to make those that it can claim."""


def work_off(cache: Place, plan: Plan, place: tuple[int, int], patience: Patience, work: Work) -> None:
    """Have `work` do, as builder I of N, what nobody else does of `plan`, until all is committed or it is closed."""
    claims = Claims(cache, plan, patience)
    try:
        while left := unfinished(cache, plan):
            for table, shards in left:
                with unless_lost(claims.lost):
                    work(table, _in_order(shards, place), claims)
            if not claims.open():
                break
            _wait(cache, plan, claims, patience)
    finally:
        claims.release()


def _in_order(shards: Sequence[PlannedShard], place: tuple[int, int]) -> list[PlannedShard]:
    """First those of this builder, then its neighbour's, and so on."""
    index, count = place
    return sorted(shards, key=lambda shard: ((int(shard.name) - index) % count, int(shard.name)))


def _wait(cache: Place, plan: Plan, claims: "Claims", patience: Patience) -> None:
    """Wait a moment for the builders that hold the shards left; a dead one's are claimed next."""
    left = [claims.path(table, shard) for table, shards in unfinished(cache, plan) for shard in shards]
    held = {claim: other for claim in left if (other := holder(claim)) is not None}
    if held:
        patience.wait(held)


@dataclass
class Builder:
    """Works off plans, one table at a time so that one encoder is in memory at a time."""

    job: Survey
    place: tuple[int, int]
    """This is builder I of N."""
    patience: Patience
    report: BuildReport | None
    sizes: PictureSizes
    seen: dict[str, set[bytes]] = field(default_factory=dict)
    """Keys, by table, of the plans that were worked off that are rejected, or gone from the source."""
    _doubted: dict[str, set[bytes]] = field(default_factory=dict)
    """Keys, by table, that a record says are gone from the source, and the source still gave."""
    meters: dict[str, Meter] = field(default_factory=dict)
    """Where the time went, by table that this builder encoded rows of."""
    _encoder: "Encoder | None" = None
    """What was loaded last, whose network may be that of the next table."""

    def work_off(self, plan: Plan, found: Committed) -> None:
        """Encode, or write into tars, what nobody else does of `plan`; returns when all of it is committed.

        `found` is what was committed when the plan was there: a plan of tars is made when no row is missing.
        """
        try:
            work_off(self.job.folder, plan, self.place, self.patience, partial(self._work, found=found))
        finally:
            self._encoder = None
        if not unfinished(self.job.folder, plan):
            for table in plan.tables:
                self._see(table)

    def _see(self, table: TablePlan) -> None:
        """Note what is not to be tried again: what the records say of a plan's shards, as another's may be among them.

        A shard can be that of a builder with another plan, who was suspended for long and committed first.
        """
        name, names = table.recipe.table, {shard.name for shard in table.shards}
        seen = self.seen.setdefault(name, set()) if names else set()
        commits = read_commits(self.job.folder / table.recipe.directory, table.recipe) if names else ()
        for commit in (commit for commit in commits if commit.name in names):
            absent = {bytes.fromhex(key) for key in commit.absent}
            if not table.recipe.of_tars:
                # One with another source may have recorded it while this one was suspended: that is tried once more.
                doubted = self._doubted.setdefault(name, set())
                absent -= (given := still_given(self.job, name, absent - doubted))
                doubted |= given
            seen |= absent | {bytes.fromhex(rejection.key) for rejection in commit.rejected}

    def seconds(self, table: str) -> dict[str, float]:
        """What the time of the thread that encoded `table` went into, as `TableResult.seconds` has it."""
        meter = self.meters.get(table)
        return {**meter.seconds, "held_up": meter.held_up} if meter else {}

    def _work(self, table: TablePlan, shards: Sequence[PlannedShard], claims: "Claims", found: Committed) -> None:
        progress = ShardProgress(table.recipe.table, sum(len(shard.keys) for shard in shards), self.report)
        mine = claims.claimed(table, shards, progress)
        # What is needed for the work is read only once there is some: with a claim held, nobody ends the plan.
        if (first := next(mine, None)) is None:
            return
        folder = self.job.folder / table.recipe.directory
        with writing(folder):
            make_folder(folder)
        if table.recipe.of_tars:
            self._write_tars(table, chain([first], mine), progress, found, claims)
        else:
            self._encode(table, chain([first], mine), progress, claims)

    def _write_tars(
        self,
        table: TablePlan,
        shards: Iterator[PlannedShard],
        progress: ShardProgress,
        found: Committed,
        claims: "Claims",
    ) -> None:
        job = self.job
        named = with_ids(whole_samples(job.samples, found.tables, job.wants)[0])
        standing = Positions(tar_keys(named, job.wants))

        def planned(keys: Sequence[bytes]) -> dict[bytes, Sample]:
            """Those that are samples still and whose image can be read."""
            readable, _ = self.sizes.measured([named[i] for i in standing.find(keys).tolist() if i >= 0])
            return dict(zip(tar_keys(readable, job.wants), readable, strict=True))

        writer = TarWriter(job.folder, found.tables, found.provenance, wants=job.wants)
        writer.write(table.recipe.table, progress.counted(shards), planned, partial(claims.kept, table))

    def _encode(
        self, table: TablePlan, shards: Iterator[PlannedShard], progress: ShardProgress, claims: "Claims"
    ) -> None:
        import torch

        from kcache.build.encode import encode_shards
        from kcache.encoders.frozen import load_encoder, shares_network

        job, recipe = self.job, table.recipe
        if not shares_network(self._encoder, recipe):
            self._encoder = None  # so that there is room for the next one
            self.patience.say(f"loading {recipe.encoder} for {recipe.table}: {progress.total} to encode")
        device = torch.device(job.config.device or default_device())
        workers = workers_for(recipe, job.config.num_workers, progress.total)
        with enough_memory(recipe):
            encoder = load_encoder(
                recipe, job.repository(recipe.table), device, job.config.max_pixels, held=self._encoder
            )
            self._encoder = encoder
            fetching, meter = shard_fetcher(job, recipe.table), self.meters.setdefault(recipe.table, Meter())
            with kept_to_groups(device.type):
                encode_shards(
                    encoder, job.folder / recipe.directory, shards, fetching,
                    workers=workers, meter=meter, done=lambda inputs: progress.add(inputs, meter.shares()),
                    kept=partial(claims.kept, table), takes=partial(job.wants.takes, recipe.table),
                )  # fmt: skip


class Claims:
    """This builder's claims on the shards of one plan."""

    def __init__(self, cache: Place, plan: Plan, patience: Patience) -> None:
        self._cache = cache
        self._plan = plan
        self._folder = claims_folder(cache, plan)
        self._patience = patience
        self._held: dict[Place, bool] = {}
        """What is claimed, in order; whether it is being committed, and done when the next one is."""
        self._others = frozenset[str]()
        self._looked = ("", -math.inf)

    def path(self, table: TablePlan, shard: PlannedShard) -> Place:
        return self._folder / f"{table.recipe.table}-{shard.name}"

    def open(self) -> bool:
        """Whether the plan is still open: another builder closes it once all of it is committed."""
        return is_open(self._cache, self._plan)

    def claimed(
        self, table: TablePlan, shards: Sequence[PlannedShard], progress: ShardProgress
    ) -> Iterator[PlannedShard]:
        """Those of `shards` that this builder gets, each one claimed when it is asked for.

        Of those that others claimed or committed, as listings now and then show, only what is not committed when the
        rest is done is looked at one by one.
        """
        later = []
        for shard in shards:
            if shard.name in self._dealt_with(table):
                later.append(shard)
            elif self._take(table, shard):
                yield shard
            else:
                progress.total -= len(shard.keys)
        left = {shard.name for shard in uncommitted(self._cache, table, later)} if later else ()
        for shard in later:
            if shard.name in left and self._take(table, shard):
                yield shard
            else:
                progress.total -= len(shard.keys)

    def _dealt_with(self, table: TablePlan) -> frozenset[str]:
        """Names of the shards that are claimed or committed, looked at now and then."""
        name, looked = self._looked
        if name != table.recipe.table or time.monotonic() - looked > _LIST_SECONDS:
            claimed = {path.name.rpartition("-")[2] for path in self._folder.glob(f"{table.recipe.table}-*")}
            committed = {path.stem for path in (self._cache / table.recipe.directory).glob("*.json")}
            self._others, self._looked = frozenset(claimed | committed), (table.recipe.table, time.monotonic())
        return self._others

    def _take(self, table: TablePlan, shard: PlannedShard) -> bool:
        """Claim a shard; whether that was possible, and it still is to be made."""
        claim = self.path(table, shard)
        try:
            if take(claim, self._patience.gives_up) is not None:
                return False
        except CacheWriteError:
            if not self.open():
                return False
            if self._folder.is_dir():
                raise
            make_folder(self._folder)  # a copy that was made by another tool lacks what was empty
            return self._take(table, shard)
        self._held[claim] = False
        if is_committed := (self._cache / table.recipe.directory / f"{shard.name}.json").is_file():
            self.settled(table, shard)
        return not is_committed

    def kept(self, table: TablePlan, shard: PlannedShard) -> bool:
        """Whether a shard that was claimed is still this builder's to commit; says so where it is not.

        Shards are committed one after the other: what was asked about before is done.
        """
        self._let_go([claim for claim, asked in self._held.items() if asked])
        claim = self.path(table, shard)
        self._held[claim] = True
        if kept := is_mine(claim):
            return kept
        let_go(claim)
        self._patience.say(f"{claim.name} was taken over by another builder: what this one made of it is not needed")
        return False

    def lost(self) -> bool:
        """Whether another builder has taken over any that were held; those are let go of."""
        lost = [claim for claim in self._held if not is_mine(claim)]
        self._let_go(lost)
        return lost != []

    def settled(self, table: TablePlan, shard: PlannedShard) -> None:
        """Let go of a shard that is committed."""
        self._let_go([self.path(table, shard)])

    def release(self) -> None:
        """Let go of everything: what is committed needs no claim, and what is not is free for others."""
        self._let_go(list(self._held))

    def _let_go(self, claims: Iterable[Place]) -> None:
        for claim in claims:
            self._held.pop(claim, None)
            let_go(claim)
