"""Batches for training: the samples in their order, read from the cache ahead of use, as tensors on the device."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kcache.errors import ConfigError
from kcache.loader.course import Share
from kcache.loader.parts import Part, RowReader, parts_of, prepare
from kcache.loader.residency import settle
from kcache.loader.schedule import Pass, Schedule, Standing
from kcache.loader.state import States, epoch_after, turns_told
from kcache.loader.streaming.stage import Arrival, Stage
from kcache.loader.streaming.streamed import StreamShape
from kcache.loader.upload import Upload
from kcache.stopping import Crew

Batch = dict[str, torch.Tensor]

FILL_THREADS = {"gpu": 2, "ram": 2, "mmap": 2, "stream": 2, "online": 1}
"""Threads that fill batches, by residency. Copies and checksums of many rows at a time hold no lock of Python's: two
threads use two cores. Encoders take all there are."""
PREFETCH_BATCHES = 2
"""Batches that wait ready: enough to hide one slow read, few enough that their memory stays in the processor's cache:
a copy into four blocks in turn took 1.26 times as long as into one, into eight 1.37 times."""
_MUCH = 256 << 20
"""Bytes of an index that are read in less than half a second of most disks."""
POLL_SECONDS = 0.5
"""Between two looks at whether a batch shall be waited for any longer."""


class CacheLoader:
    """Batches of `fields` from a cache; iterating gives the rest of one epoch, `forever` epoch after epoch.

    Order, captions and batches are functions of the seed, the epoch and the position alone. Of each run of batch_size ×
    world_size samples, process `rank` takes its batch_size. Tensors are the caller's; their dtype is the stored one. Of
    a cache with several shapes each batch is of one, as `Schedule` has it: of the smallest resolution batch_size
    samples, of other shapes as many as have about as many pixels. Of a cache opened with its mirrored pictures half of
    the turns take them. A sample that has repeats has as many turns in an epoch, and a batch the `weight` (B,) float32
    of its samples where any has another than 1. `draws` is called in the filling threads, two at a time, with the
    samples' turns (B,) int64, of several shapes also with their part of the cache, and returns arrays that join the
    batch, e.g. noise. With the probabilities `caption_dropout` and `image_dropout` a sample comes with the empty
    caption, or with the image_embeds of the all-zero image, in place of its own. `residency` says where the rows wait:
    "gpu" uploads whole tables to the device, "ram" reads them into memory, "mmap" maps the files, and "auto" takes the
    first of these that has room, see `choose_residency`; the attribute tells what was taken. Each row's checksum is
    verified: by "gpu" and "ram" when they read the tables, by "mmap" each time. With "stream" only some windows of the
    order that shuffle="stream" makes, of the given `shape`, are in memory: `stage_bytes` at most. Given a folder of
    this machine as `stage_dir`, "auto" copies shards there before it maps or streams, see `settle`.
    """

    def __init__(
        self,
        cache: RowReader,
        fields: Sequence[str],
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: str = "full",
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
        residency: str = "auto",
        caption_dropout: float = 0.0,
        image_dropout: float = 0.0,
        draws: Callable[..., Mapping[str, np.ndarray]] | None = None,
        stage_bytes: int | None = None,
        stage_dir: str | Path | None = None,
        shape: StreamShape | None = None,
    ) -> None:
        if len(cache) == 0:
            raise ConfigError(
                "the cache has no samples; expected at least one: see its rejected.jsonl for what was refused"
            )
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank is {rank}; expected 0 to {world_size - 1}, one less than world_size")
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; expected 1 or more")
        dropouts = {"caption": caption_dropout, "image": image_dropout}
        for name, dropout in dropouts.items():
            if not 0 <= dropout <= 1:
                raise ConfigError(f"{name}_dropout is {dropout}; expected a probability, 0 to 1")
        fields, on = list(fields), torch.device(device)
        folder = None if stage_dir is None else Path(stage_dir)
        self.residency, cache = settle(residency, cache, fields, world_size, on, shuffle, folder, stage_bytes)
        self._parts = parts_of(cache, fields, batch_size, seed=seed, shuffle=shuffle, stream=shape, dropouts=dropouts)
        counts, batches = [len(part.course) for part in self._parts], [part.batch for part in self._parts]
        self._schedule = Schedule(counts, batches, seed, world_size)
        self._states = States(cache, self._parts, seed, shuffle)
        self._rank = rank
        self._draws = draws
        self._upload = Upload(on, keep=PREFETCH_BATCHES + 2)
        self.standing = self._schedule.begin()
        """Where it stands: after the last batch that the caller was given. One may put it back."""
        self.weight = 1.0
        """What part of a full batch of its shape the last one was: less where there are no more samples of it."""
        self.waited = 0.0
        """Seconds that whoever takes the batches has waited for one to be filled."""
        self.waits: dict[str, float] = {}
        """What they were waited for, where rows are streamed: seconds for the store, verification and copying."""
        self.while_waiting: Callable[[float], None] | None = None
        """Called with the seconds that a batch has been waited for, every `POLL_SECONDS`; what it raises ends that."""
        prepare(self._parts, self.residency, on, world_size, stage_bytes if folder is None else None)

    @property
    def consumed(self) -> int:
        """Samples that the caller was given, of all processes and epochs together."""
        return self.standing.turn

    @property
    def shapes(self) -> list[dict[str, Any]]:
        """What there is of each shape, if several: {"shape": [height, width], "samples", "batch"}, and more "turns"."""
        several = self._parts if self._schedule.several else []
        return [
            {"shape": list(part.shape or ()), "samples": len(part.rows), "batch": size, **turns_told(part)}
            for part, size in zip(several, self._schedule.sizes, strict=False)
        ]

    @property
    def turns(self) -> int:
        """Turns of an epoch: one for each sample, and more for those that have repeats."""
        return sum(self._schedule.counts)

    @property
    def is_weighted(self) -> bool:
        """Whether batches have the weights of their samples."""
        return any(part.is_weighted for part in self._parts)

    def __len__(self) -> int:
        """Batches per epoch and process, the last and shorter one included."""
        return self._schedule.steps_of_epoch()

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the current epoch.

        The last batch is shorter where the samples do not divide; several processes share it out evenly, and leave it
        out when it has fewer samples than there are processes, so that all of them see equally many batches. Of samples
        of several shapes the last batch of each is shorter, and batches that are not enough for all processes wait.
        """
        epoch = self.standing.epoch
        yield from self._ahead(self._schedule.rest)
        self.standing = self._schedule.behind(epoch, self.standing)

    def forever(self) -> Generator[Batch, None, None]:
        """Full batches without end: an epoch's last samples share a batch with the next one's first of their shape."""
        yield from self._ahead(self._schedule.forever)

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, as plain JSON values: after the last batch that the caller was given."""
        return self._states.told(self.standing)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, with any number of processes.

        Raises CacheMismatchError for another order; `begin_new_order` goes on all the same.
        """
        self.standing = self._states.read(state)

    def begin_new_order(self, state: Mapping[str, Any], consumed: int) -> None:
        """Go on after `consumed` samples of others, those of `state`, with the start of the next epoch.

        The order is a function of the seed and the epoch's number as ever, and turns count on: no noise is met again.
        `state_dict` tells of it from then on.
        """
        self.standing = self._schedule.begin(consumed, epoch_after(state))

    @property
    def passes_of_epoch(self) -> Fraction:
        """Full batches per epoch and process, on average of many epochs."""
        return self._schedule.passes_of_epoch

    def batches_until(self, epoch: int) -> int:
        """Batches that `forever` still gives each process before epoch `epoch`, the one that reaches into it too."""
        return self._schedule.steps_until(epoch, self.standing)

    def _shares(self, passes: Iterator[Pass]) -> Iterator[tuple[int, Share, Standing]]:
        """What this process takes of `passes`: of which part, and where all stand then."""
        world_size = self._schedule.world_size
        for step in self._schedule.steps(passes):
            mine = step[self._rank] if len(step) > 1 else step[0]
            ranks = (0, 1) if self._schedule.several else (self._rank, world_size)
            yield mine.bucket, self._parts[mine.bucket].course.share(mine, *ranks), step[-1].after

    def _ahead(self, passes: Callable[[Standing], Iterator[Pass]]) -> Iterator[Batch]:
        """The batches of `passes`, filled ahead in threads; a batch counts as consumed when the caller gets it."""
        stages: list[Stage | None] = []
        used = [0] * len(self._parts)
        waiting: deque[tuple[Future[tuple[Batch, Arrival | None]], Part, float, Standing]] = deque()
        with closing(Crew(FILL_THREADS[self.residency], "kcache-loader")) as crew:
            try:
                for bucket, part in enumerate(self._parts):
                    stages.append(part.stage(self._shares_of(bucket, passes(self.standing))))
                for bucket, share, after in self._shares(passes(self.standing)):
                    part = self._parts[bucket]
                    filling = crew.submit(self._fill, part, share, stages[bucket], used[bucket])
                    weight = len(share) / part.batch if self._schedule.several else 1.0
                    waiting.append((filling, part, weight, after))
                    used[bucket] += len(share)
                    if len(waiting) > PREFETCH_BATCHES:
                        yield self._hand_over(*waiting.popleft())
                while waiting:
                    yield self._hand_over(*waiting.popleft())
            finally:
                for stage in stages:
                    if stage is not None:
                        stage.close()

    def _shares_of(self, bucket: int, passes: Iterator[Pass]) -> Iterator[Share]:
        return (share for number, share, _ in self._shares(passes) if number == bucket)

    def _hand_over(
        self, filling: Future[tuple[Batch, Arrival | None]], part: Part, weight: float, after: Standing
    ) -> Batch:
        start = time.perf_counter()
        while not wait([filling], POLL_SECONDS).done:
            if self.while_waiting is not None:
                self.while_waiting(time.perf_counter() - start)
        batch, arrival = filling.result()
        end = time.perf_counter()
        self.waited += end - start
        if arrival is not None:
            self.waits = {name: self.waits.get(name, 0) + part for name, part in arrival.parts(start, end).items()}
        self.standing, self.weight = after, weight
        self._upload.receive(batch)
        return part.on_device(batch)

    def _fill(self, part: Part, share: Share, stage: Stage | None, used: int) -> tuple[Batch, Arrival | None]:
        """The batch of `share`; out of a stage it takes what comes after the first `used` samples."""
        arrays, arrival = part.arrays(share, stage, used, self._upload.memory.empty)
        if self._draws is not None:
            arrays.update(self._draws(share.turns, part.rows) if self._schedule.several else self._draws(share.turns))
        return self._upload.send(arrays), arrival
