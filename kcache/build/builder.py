"""One builder of a cache: it works off the open plan, alone or beside other builders.

Every builder claims a shard before it writes it, begins with the shards that are its own by number, goes on with those
that nobody has claimed, and then waits for the rest. No builder needs another one: what one that died had claimed is
taken over, at once if it ran on this machine, else when its lease has run out.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from kcache.build.claims import Patience, holder, is_mine, let_go, take
from kcache.build.committed import Committed
from kcache.build.finish import PictureSizes, whole_samples
from kcache.build.joined_tars import TarWriter, tar_keys
from kcache.build.plan import Plan, PlannedShard, TablePlan, claims_folder
from kcache.build.survey import Survey, fetcher
from kcache.disk.durable import writing
from kcache.encoders.fit import enough_memory, workers_for
from kcache.errors import CacheWriteError
from kcache.machine import default_device, kept_to_groups
from kcache.stopping import stop_here
from kcache.store.samples import Sample, with_ids

if TYPE_CHECKING:
    from kcache.build.encode import Meter

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


def unfinished(cache: Path, plan: Plan) -> list[tuple[TablePlan, list[PlannedShard]]]:
    """The shards of each table of `plan` that are not committed, tables without any left out."""
    left = [(table, [s for s in table.shards if not _record(cache, table, s).exists()]) for table in plan.tables]
    return [(table, shards) for table, shards in left if shards]


def _record(cache: Path, table: TablePlan, shard: PlannedShard) -> Path:
    return cache / table.recipe.directory / f"{shard.name}.json"


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
    """Keys, by table, of the plans that were worked off: stored, rejected, or gone from the source."""
    meters: dict[str, "Meter"] = field(default_factory=dict)
    """Where the time went, by table that this builder encoded rows of."""

    def work_off(self, plan: Plan, found: Committed) -> None:
        """Encode, or write into tars, what nobody else does of `plan`; returns when all of it is committed.

        `found` is what was committed when the plan was there: a plan of tars is made when no row is missing.
        """
        claims = _Claims(self.job.folder, claims_folder(self.job.folder, plan), self.patience)
        try:
            while left := unfinished(self.job.folder, plan):
                for table, shards in left:
                    self._work(table, self._in_order(shards), claims, found)
                if not claims.open():
                    break
                self._wait(plan, claims)
        finally:
            claims.release()
        if not unfinished(self.job.folder, plan):
            for table in plan.tables:
                self.seen.setdefault(table.recipe.table, set()).update(table.keys)

    def seconds(self, table: str) -> dict[str, float]:
        """What the time of the thread that encoded `table` went into, as `TableResult.seconds` has it."""
        meter = self.meters.get(table)
        return {**meter.seconds, "held_up": meter.held_up} if meter else {}

    def _in_order(self, shards: Sequence[PlannedShard]) -> list[PlannedShard]:
        """First those of this builder, then its neighbour's, and so on."""
        index, count = self.place
        return sorted(shards, key=lambda shard: ((int(shard.name) - index) % count, int(shard.name)))

    def _wait(self, plan: Plan, claims: "_Claims") -> None:
        """Wait a moment for the builders that hold the shards left; a dead one's are claimed next."""
        left = [claims.path(table, shard) for table, shards in unfinished(self.job.folder, plan) for shard in shards]
        held = {claim: other for claim in left if (other := holder(claim)) is not None}
        if held:
            self.patience.wait(held)

    def _work(self, table: TablePlan, shards: Sequence[PlannedShard], claims: "_Claims", found: Committed) -> None:
        progress = _Progress(table.recipe.table, sum(len(shard.keys) for shard in shards), self.report)
        mine = claims.claimed(table, shards, progress)
        # What is needed for the work is read only once there is some: with a claim held, nobody ends the plan.
        if (first := next(mine, None)) is None:
            return
        folder = self.job.folder / table.recipe.directory
        with writing(folder):
            folder.mkdir(exist_ok=True)
        if table.recipe.of_tars:
            self._write_tars(table, chain([first], mine), progress, found, claims)
        else:
            self._encode(table, chain([first], mine), progress, claims)

    def _write_tars(
        self,
        table: TablePlan,
        shards: Iterator[PlannedShard],
        progress: "_Progress",
        found: Committed,
        claims: "_Claims",
    ) -> None:
        job = self.job
        whole, _ = whole_samples(job.samples, found.tables)
        named = with_ids(whole)
        by_key = dict(zip(tar_keys(named), named, strict=True))

        def planned(keys: Sequence[bytes]) -> dict[bytes, Sample]:
            """Those that are samples still and whose image can be read."""
            readable, _ = self.sizes.measured([by_key[key] for key in keys if key in by_key])
            return dict(zip(tar_keys(readable), readable, strict=True))

        writer = TarWriter(job.folder, found.tables, found.provenance)
        writer.write(table.recipe.table, progress.counted(shards), planned, partial(claims.kept, table))

    def _encode(
        self, table: TablePlan, shards: Iterator[PlannedShard], progress: "_Progress", claims: "_Claims"
    ) -> None:
        import torch

        from kcache.build.encode import Meter, encode_shards
        from kcache.encoders.frozen import load_encoder

        job, recipe = self.job, table.recipe
        self.patience.say(f"loading {recipe.encoder} for {recipe.table}: {progress.total} to encode")
        device = torch.device(job.config.device or default_device())
        workers = workers_for(recipe, job.config.num_workers, progress.total)
        with enough_memory(recipe):
            encoder = load_encoder(recipe, job.repository(recipe.table), device, job.config.max_pixels)
            fetch, meter = fetcher(job, recipe.table), self.meters.setdefault(recipe.table, Meter())
            with kept_to_groups(device.type):
                encode_shards(
                    encoder, job.folder / recipe.directory, shards, fetch,
                    workers=workers, meter=meter, done=lambda inputs: progress.add(inputs, meter.shares()),
                    kept=partial(claims.kept, table),
                )  # fmt: skip


class _Claims:
    """This builder's claims on the shards of one plan."""

    def __init__(self, cache: Path, folder: Path, patience: Patience) -> None:
        self._cache = cache
        self._folder = folder
        self._patience = patience
        self._held: list[Path] = []

    def path(self, table: TablePlan, shard: PlannedShard) -> Path:
        return self._folder / f"{table.recipe.table}-{shard.name}"

    def open(self) -> bool:
        """Whether the plan is still open: another builder closes it once all of it is committed."""
        return self._folder.is_dir()

    def claimed(
        self, table: TablePlan, shards: Sequence[PlannedShard], progress: "_Progress"
    ) -> Iterator[PlannedShard]:
        """Those of `shards` that this builder gets, each one claimed when it is asked for."""
        for shard in shards:
            if self._take(self.path(table, shard)) and not _record(self._cache, table, shard).exists():
                yield shard
            else:
                progress.total -= len(shard.keys)

    def _take(self, claim: Path) -> bool:
        try:
            other = take(claim, self._patience.gives_up)
        except CacheWriteError:
            if self.open():
                raise
            return False
        if other is None:
            self._held.append(claim)
        return other is None

    def kept(self, table: TablePlan, shard: PlannedShard) -> bool:
        """Whether a shard that was claimed is still this builder's to commit; says so where it is not."""
        claim = self.path(table, shard)
        if kept := is_mine(claim):
            return kept
        self._patience.say(f"{claim.name} was taken over by another builder: what this one made of it is not needed")
        return False

    def release(self) -> None:
        """Let go of everything: what is committed needs no claim, and what is not is free for others."""
        for claim in self._held:
            let_go(claim)


class _Progress:
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
            seconds = now - self._start
            self._report(
                BuildProgress(table=self._table, done=self._done, total=self.total, seconds=seconds, busy=busy)
            )

    def counted(self, shards: Iterator[PlannedShard]) -> Iterator[PlannedShard]:
        """The `shards`, each counted as written when the next one is asked for."""
        for shard in shards:
            yield shard
            self.add(len(shard.keys), {"write": 1.0})
