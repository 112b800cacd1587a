"""Batches for training: the samples in their order, read from the cache ahead of use, as tensors on the device."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch

from kcache.errors import CacheMismatchError, ConfigError
from kcache.loader.chance import draw_choice, draw_dropout, epoch_order
from kcache.loader.residency import DeviceTables, choose_residency
from kcache.loader.upload import Upload
from kcache.machine import free_memory
from kcache.store.cache import Cache
from kcache.store.rows import Empty

Batch = dict[str, torch.Tensor]

STATE_VERSION = 2
"""Of a state whose order began anew; 1 is that of all others."""
FILL_THREADS = {"gpu": 2, "ram": 2, "mmap": 2, "online": 1}
"""Threads that fill batches, by residency. Copies and checksums of many rows at a time hold no lock of Python's: two
threads use two cores. Encoders take all there are."""
PREFETCH_BATCHES = 2
"""Batches that wait ready: enough to hide one slow read, few enough that their memory stays in the processor's cache:
a copy into four blocks in turn took 1.26 times as long as into one, into eight 1.37 times."""


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


def changed_samples(state: Mapping[str, Any], rows: RowReader) -> str | None:
    """How `rows` differ from what a loader's `state` was taken with, as far as it says; None where they are the same.

    Raises KeyError, TypeError or ValueError for what is no such state.
    """
    if state["samples_digest"] == rows.samples_digest:
        return None
    if "samples" not in state:
        return f"{len(rows):,} samples now; how many there were is not recorded"
    counts = [("samples", int(state["samples"]), len(rows))]
    counts.append(("captions", int(state["captions"]), int(rows.caption_bounds[-1])))
    told = [f"{then:,} {name} before, {now:,} now" for name, then, now in counts if then != now]
    return ", ".join(told) or f"{len(rows):,} samples as before, but other pictures or captions"


class CacheLoader:
    """Batches of `fields` from a cache; iterating gives the rest of one epoch, `forever` epoch after epoch.

    Order, captions and batches are functions of the seed, the epoch and the position alone. Of each run of
    batch_size × world_size samples, process `rank` takes its batch_size. Tensors are the caller's; their dtype is the
    stored one. `draws` is called in the filling threads, two at a time, with the samples' turns (B,) int64 and returns
    arrays that join the batch, e.g. noise. With the probabilities `caption_dropout` and `image_dropout` a sample comes
    with the empty caption, or with the image_embeds of the all-zero image, in place of its own. `residency` says where
    the rows wait: "gpu" uploads whole tables to the device, "ram" reads them into memory, "mmap" maps the files, and
    "auto" takes the first of these that has room, see `choose_residency`; the attribute tells what was taken. Each
    row's checksum is verified: by "gpu" and "ram" when they read the tables, by "mmap" each time.
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
    ) -> None:
        if len(cache) == 0:
            raise ConfigError(
                "the cache has no samples; expected at least one: see its rejected.jsonl for what was refused"
            )
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank is {rank}; expected 0 to {world_size - 1}, one less than world_size")
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; expected 1 or more")
        if shuffle not in ("full", "block"):
            raise ConfigError(f"shuffle is {shuffle!r}; expected 'full' or 'block'")
        self._dropouts = {"caption": caption_dropout, "image": image_dropout}
        for name, dropout in self._dropouts.items():
            if not 0 <= dropout <= 1:
                raise ConfigError(f"{name}_dropout is {dropout}; expected a probability, 0 to 1")
        self._cache = cache
        self._fields = list(fields)
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._rank = rank
        self._world_size = world_size
        self._device = torch.device(device)
        self._draws = draws
        self._upload = Upload(self._device, keep=PREFETCH_BATCHES + 2)
        self.consumed = 0
        """Samples that the caller was given, of all processes and epochs together."""
        self.waited = 0.0
        """Seconds that whoever takes the batches has waited for one to be filled."""
        self._first_turn = self._first_epoch = 0
        """Where the order of these samples begins: later than at 0 in a run that went on with other samples."""
        self._order = lru_cache(maxsize=2)(lambda epoch: epoch_order(seed, epoch, len(cache), shuffle))
        self.residency = choose_residency(residency, cache, self._fields, world_size, self._device)
        self._tables: DeviceTables | None = None
        if isinstance(cache, Cache):
            if self.residency == "gpu":
                self._tables = DeviceTables(cache, self._fields, self._device)
            elif self.residency == "ram":
                cache.make_resident(self._fields)
            else:
                cache.make_mapped(self._fields, stays=cache.resident_bytes(self._fields) <= free_memory())

    def __len__(self) -> int:
        """Batches per epoch and process, the last and shorter one included."""
        return sum(1 for _ in self._epoch_spans(0))

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the current epoch.

        The last batch is shorter where the samples do not divide; several processes share it out evenly, and leave it
        out when it has fewer samples than there are processes, so that all of them see equally many batches.
        """
        epoch, consumed = self._place(self.consumed)
        yield from self._ahead(self._epoch_spans(epoch, consumed))
        self.consumed = self._turn(epoch + 1)

    def forever(self) -> Generator[Batch, None, None]:
        """Full batches without end: an epoch's last samples share a batch with the next one's first."""
        yield from self._ahead(self._endless_spans())

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, as plain JSON values: after the last batch that the caller was given."""
        epoch, consumed = self._place(self.consumed)
        state = {
            "version": 1,
            "samples_digest": self._cache.samples_digest,
            "shuffle": self._shuffle,
            "seed": self._seed,
            "epoch": epoch,
            "samples_consumed": consumed,
            "samples": len(self._cache),
            "captions": int(self._cache.caption_bounds[-1]),
        }
        if self._first_turn:  # what a kcache that knows of no new order would pass over
            state |= {"version": STATE_VERSION, "first_turn": self._first_turn, "first_epoch": self._first_epoch}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, with any number of processes.

        Raises CacheMismatchError for another order; `begin_new_order` goes on all the same.
        """
        if state["version"] not in (1, STATE_VERSION):
            raise CacheMismatchError(
                f"the loader's state has version {state['version']!r}; this kcache reads 1 and {STATE_VERSION}; go on "
                "with the kcache that wrote it"
            )
        for name, own in (("seed", self._seed), ("shuffle", self._shuffle)):
            if state[name] != own:
                raise CacheMismatchError(
                    f"the loader's state has {name} {state[name]!r}, this loader has {own!r}: the order would differ; "
                    f"give it the {name} that it was begun with, or start anew"
                )
        if (changed := changed_samples(state, self._cache)) is not None:
            raise CacheMismatchError(
                f"the samples are not those that the order was begun with ({changed}); give those, or go on with these "
                "by begin_new_order"
            )
        self._first_turn, self._first_epoch = int(state.get("first_turn", 0)), int(state.get("first_epoch", 0))
        self.consumed = self._turn(int(state["epoch"])) + int(state["samples_consumed"])

    def begin_new_order(self, state: Mapping[str, Any], consumed: int) -> None:
        """Go on after `consumed` samples of others, those of `state`, with the start of the next epoch.

        The order is a function of the seed and the epoch's number as ever, and turns count on: no noise is met again.
        `state_dict` tells of it from then on.
        """
        self._first_turn = self.consumed = consumed
        self._first_epoch = int(state["epoch"]) + (int(state["samples_consumed"]) > 0)

    def turns_until(self, epoch: int) -> int:
        """Samples that the caller is given until epoch `epoch` begins, those that it was given before included."""
        return max(self._turn(epoch), self.consumed)

    def _place(self, turn: int) -> tuple[int, int]:
        """The epoch of a turn, and its place in it."""
        epochs, place = divmod(turn - self._first_turn, len(self._cache))
        return self._first_epoch + epochs, place

    def _turn(self, epoch: int) -> int:
        """The first turn of an epoch."""
        return self._first_turn + (epoch - self._first_epoch) * len(self._cache)

    def _epoch_spans(self, epoch: int, consumed: int = 0) -> Iterator[tuple[int, int, int]]:
        """(first, last + 1) turn of this process's batches until the epoch's end, and the turn that all are done at."""
        together = self._batch_size * self._world_size
        end = self._turn(epoch + 1)
        for start in range(self._turn(epoch) + consumed, end, together):
            share, more = divmod(min(together, end - start), self._world_size)
            if share == 0:
                return
            first = start + self._rank * share + min(self._rank, more)
            yield first, first + share + (self._rank < more), start + min(together, end - start)

    def _endless_spans(self) -> Iterator[tuple[int, int, int]]:
        start = self.consumed
        while True:
            first = start + self._rank * self._batch_size
            start += self._batch_size * self._world_size
            yield first, first + self._batch_size, start

    def _ahead(self, spans: Iterator[tuple[int, int, int]]) -> Iterator[Batch]:
        """The batches of `spans`, filled ahead in threads; a batch counts as consumed when the caller gets it."""
        with ThreadPoolExecutor(FILL_THREADS[self.residency], "kcache-loader") as pool:
            waiting: deque[tuple[Future[Batch], int]] = deque()
            try:
                for first, last, done in spans:
                    waiting.append((pool.submit(self._fill, first, last), done))
                    if len(waiting) > PREFETCH_BATCHES:
                        yield self._hand_over(*waiting.popleft())
                while waiting:
                    yield self._hand_over(*waiting.popleft())
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _hand_over(self, filling: Future[Batch], done: int) -> Batch:
        start = time.perf_counter()
        batch = filling.result()
        self.waited += time.perf_counter() - start
        self.consumed = done
        self._upload.receive(batch)
        return batch if self._tables is None else self._tables.take(batch)

    def _fill(self, first: int, last: int) -> Batch:
        turns, samples = np.arange(first, last), self._samples(first, last)
        bounds = self._cache.caption_bounds
        captions = draw_choice(self._seed, turns, bounds[samples + 1] - bounds[samples])
        dropped = {f"drop_{name}": draw_dropout(self._seed, turns, name, p) for name, p in self._dropouts.items()}
        arrays: dict[str, Any]
        if self._tables is not None:
            arrays = self._tables.numbers(samples, captions, **dropped)
        else:
            empty = self._upload.memory.empty
            arrays = dict(self._cache.read(samples, self._fields, captions, **dropped, empty=empty))
        if self._draws is not None:
            arrays.update(self._draws(turns))
        return self._upload.send(arrays)

    def _samples(self, first: int, last: int) -> np.ndarray:
        """The samples whose turns are `first` to `last`, of one epoch or of several."""
        parts = []
        while first < last:
            epoch, number = self._place(first)
            parts.append(self._order(epoch)[number : number + last - first])
            first += len(parts[-1])
        return np.concatenate(parts)
