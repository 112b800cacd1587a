"""Batches for training: the samples in their order, read from the cache ahead of use, as tensors on the device."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from kcache.errors import ConfigError
from kcache.loader.chance import draw_choice, draw_dropout
from kcache.loader.course import Course, Span
from kcache.loader.residency import settle
from kcache.loader.stage import Arrival, Stage, Wishes, make_stages
from kcache.loader.streamed import StreamShape
from kcache.loader.upload import Upload
from kcache.stopping import Crew
from kcache.store.cache import Cache
from kcache.store.rows import Empty

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


class RowReader(Protocol):
    """What the loader reads from: a cache, or the encoders themselves."""

    @property
    def samples_digest(self) -> str: ...

    @property
    def caption_bounds(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def read(
        self,
        samples: np.ndarray,
        fields: Sequence[str],
        caption: np.ndarray,
        *,
        drop_caption: np.ndarray,
        drop_image: np.ndarray,
        empty: Empty,
    ) -> Mapping[str, Any]: ...


class CacheLoader:
    """Batches of `fields` from a cache; iterating gives the rest of one epoch, `forever` epoch after epoch.

    Order, captions and batches are functions of the seed, the epoch and the position alone. Of each run of
    batch_size × world_size samples, process `rank` takes its batch_size. Tensors are the caller's; their dtype is the
    stored one. `draws` is called in the filling threads, two at a time, with the samples' turns (B,) int64 and returns
    arrays that join the batch, e.g. noise. With the probabilities `caption_dropout` and `image_dropout` a sample comes
    with the empty caption, or with the image_embeds of the all-zero image, in place of its own. `residency` says where
    the rows wait: "gpu" uploads whole tables to the device, "ram" reads them into memory, "mmap" maps the files, and
    "auto" takes the first of these that has room, see `choose_residency`; the attribute tells what was taken. Each
    row's checksum is verified: by "gpu" and "ram" when they read the tables, by "mmap" each time. With "stream" only
    some windows of the order that shuffle="stream" makes, of the given `shape`, are in memory: `stage_bytes` at most.
    Given a folder of this machine as `stage_dir`, "auto" copies shards there before it maps or streams, see `settle`.
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
        draws: Callable[[np.ndarray], Mapping[str, np.ndarray]] | None = None,
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
        self._dropouts = {"caption": caption_dropout, "image": image_dropout}
        for name, dropout in self._dropouts.items():
            if not 0 <= dropout <= 1:
                raise ConfigError(f"{name}_dropout is {dropout}; expected a probability, 0 to 1")
        self._fields = list(fields)
        self._batch_size = batch_size
        self._seed = seed
        self._course = Course(cache, seed, shuffle, shape)
        self._rank = rank
        self._world_size = world_size
        self._device = torch.device(device)
        self._draws = draws
        self._upload = Upload(self._device, keep=PREFETCH_BATCHES + 2)
        self.consumed = 0
        """Samples that the caller was given, of all processes and epochs together."""
        self.waited = 0.0
        """Seconds that whoever takes the batches has waited for one to be filled."""
        self.waits: dict[str, float] = {}
        """What they were waited for, where rows are streamed: seconds for the store, verification and copying."""
        self.while_waiting: Callable[[float], None] | None = None
        """Called with the seconds that a batch has been waited for, every `POLL_SECONDS`; what it raises ends that."""
        folder = None if stage_dir is None else Path(stage_dir)
        self.residency, self._cache, self._tables = settle(
            residency, cache, self._fields, world_size, self._device, shuffle, folder, stage_bytes
        )
        self._new_stage: Callable[..., Stage] | None = None
        if self.residency == "stream":
            memory = stage_bytes if folder is None else None
            self._new_stage = make_stages(self._cache, self._fields, self._course.shape, batch_size, world_size, memory)

    def __len__(self) -> int:
        """Batches per epoch and process, the last and shorter one included."""
        return sum(1 for _ in self._epoch_spans(self._course.turn(0)))

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the current epoch.

        The last batch is shorter where the samples do not divide; several processes share it out evenly, and leave it
        out when it has fewer samples than there are processes, so that all of them see equally many batches.
        """
        epoch, _ = self._course.place(self.consumed)
        yield from self._ahead(self._epoch_spans)
        self.consumed = self._course.turn(epoch + 1)

    def forever(self) -> Generator[Batch, None, None]:
        """Full batches without end: an epoch's last samples share a batch with the next one's first."""
        yield from self._ahead(self._endless_spans)

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, as plain JSON values: after the last batch that the caller was given."""
        return self._course.state(self.consumed)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, with any number of processes.

        Raises CacheMismatchError for another order; `begin_new_order` goes on all the same.
        """
        self.consumed = self._course.go_on(state)

    def begin_new_order(self, state: Mapping[str, Any], consumed: int) -> None:
        """Go on after `consumed` samples of others, those of `state`, with the start of the next epoch.

        The order is a function of the seed and the epoch's number as ever, and turns count on: no noise is met again.
        `state_dict` tells of it from then on.
        """
        self.consumed = consumed
        self._course.begin_anew(state, consumed)

    def turns_until(self, epoch: int) -> int:
        """Samples that the caller is given until epoch `epoch` begins, those that it was given before included."""
        return max(self._course.turn(epoch), self.consumed)

    def _epoch_spans(self, consumed: int) -> Iterator[Span]:
        """The batches until the end of the epoch that turn `consumed` is in."""
        together = self._batch_size * self._world_size
        end = self._course.turn(self._course.place(consumed)[0] + 1)
        for start in range(consumed, end, together):
            if end - start >= self._world_size:
                yield start, min(start + together, end)

    def _endless_spans(self, consumed: int) -> Iterator[Span]:
        together = self._batch_size * self._world_size
        yield from ((start, start + together) for start in count(consumed, together))

    def _shares(self, spans: Iterator[Span]) -> Iterator[np.ndarray]:
        return (self._course.share(span, self._rank, self._world_size) for span in spans)

    def _ahead(self, spans: Callable[[int], Iterator[Span]]) -> Iterator[Batch]:
        """The batches of `spans`, filled ahead in threads; a batch counts as consumed when the caller gets it."""
        stage, used = None, 0
        with closing(Crew(FILL_THREADS[self.residency], "kcache-loader")) as crew:
            if self._new_stage is not None:
                stage = self._begin_stage(self._new_stage, spans(self.consumed))
            waiting: deque[tuple[Future[tuple[Batch, Arrival | None]], int]] = deque()
            try:
                for (_, done), turns in zip(spans(self.consumed), self._shares(spans(self.consumed)), strict=True):
                    waiting.append((crew.submit(self._fill, turns, stage, used), done))
                    used += len(turns)
                    if len(waiting) > PREFETCH_BATCHES:
                        yield self._hand_over(*waiting.popleft())
                while waiting:
                    yield self._hand_over(*waiting.popleft())
            finally:
                if stage is not None:
                    stage.close()

    def _hand_over(self, filling: Future[tuple[Batch, Arrival | None]], done: int) -> Batch:
        start = time.perf_counter()
        while not wait([filling], POLL_SECONDS).done:
            if self.while_waiting is not None:
                self.while_waiting(time.perf_counter() - start)
        batch, arrival = filling.result()
        end = time.perf_counter()
        self.waited += end - start
        if arrival is not None:
            self.waits = {name: self.waits.get(name, 0) + part for name, part in arrival.parts(start, end).items()}
        self.consumed = done
        self._upload.receive(batch)
        return batch if self._tables is None else self._tables.take(batch)

    def _begin_stage(self, new_stage: Callable[..., Stage], spans: Iterator[Span]) -> Stage:
        windows, in_parts = self._course.windows(self._shares(spans)), 0
        if isinstance(self._cache, Cache) and self._cache.unread_bytes(self._fields) > _MUCH:
            windows, in_parts = self._course.growing(windows, self._batch_size), self._course.shape.window_rows
        return new_stage(map(self._chosen, windows), in_parts)

    def _chosen(self, turns: np.ndarray) -> Wishes:
        """The samples of `turns`, the number of the caption that each takes, and which of them go without what."""
        samples, bounds = self._course.samples(turns), self._cache.caption_bounds
        captions = draw_choice(self._seed, turns, bounds[samples + 1] - bounds[samples])
        dropped = {f"drop_{name}": draw_dropout(self._seed, turns, name, p) for name, p in self._dropouts.items()}
        return samples, captions, dropped

    def _fill(self, turns: np.ndarray, stage: Stage | None, used: int) -> tuple[Batch, Arrival | None]:
        """The batch of `turns`; out of a stage it takes what comes after the first `used` samples."""
        arrays: dict[str, Any]
        empty, arrival = self._upload.memory.empty, None
        if stage is not None:
            arrays, arrival = stage.take(used, len(turns), empty)
        else:
            samples, captions, dropped = self._chosen(turns)
            if self._tables is not None:
                arrays = self._tables.numbers(samples, captions, **dropped)
            else:
                arrays = dict(self._cache.read(samples, self._fields, captions, **dropped, empty=empty))
        if self._draws is not None:
            arrays.update(self._draws(turns))
        return self._upload.send(arrays), arrival
