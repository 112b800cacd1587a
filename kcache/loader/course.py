"""The course of training: which sample has which turn, which turns a process takes, and how a state tells of it.

Turns count on through all epochs. A state is plain JSON values, and says nothing of processes: any number goes on.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from kcache.errors import CacheMismatchError, ConfigError
from kcache.loader.chance import epoch_order
from kcache.loader.streamed import StreamOrder, StreamShape, share_of_lanes, stream_shape

if TYPE_CHECKING:
    from kcache.loader.batches import RowReader

STATE_VERSION = 2
"""Of a state whose order began anew; 1 is that of all others."""

Span = tuple[int, int]
"""The first turn of a batch of all processes together, and the turn that all of it is done at."""


def changed_samples(state: Mapping[str, Any], rows: "RowReader") -> str | None:
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


class Course:
    """The turns of the samples of `rows`, in an order that seed, shuffle and, of "stream", the shape decide."""

    def __init__(self, rows: "RowReader", seed: int, shuffle: str, shape: StreamShape | None = None) -> None:
        """Raises ConfigError for a shuffle that is none."""
        if shuffle not in ("full", "block", "stream"):
            raise ConfigError(f"shuffle is {shuffle!r}; expected 'full', 'block' or 'stream'")
        self._rows = rows
        self._seed = seed
        self.shuffle = shuffle
        self.shape = shape or stream_shape(len(rows))
        self._first_turn = self._first_epoch = 0
        """Where the order of these samples begins: later than at 0 in a run that went on with other samples."""
        self._order = lru_cache(maxsize=2)(self._make_order)

    def _make_order(self, epoch: int) -> np.ndarray | StreamOrder:
        if self.shuffle == "stream":
            return StreamOrder(self._seed, epoch, len(self._rows), self.shape)
        return epoch_order(self._seed, epoch, len(self._rows), self.shuffle)

    def place(self, turn: int) -> tuple[int, int]:
        """The epoch of a turn, and its place in it."""
        epochs, place = divmod(turn - self._first_turn, len(self._rows))
        return self._first_epoch + epochs, place

    def turn(self, epoch: int) -> int:
        """The first turn of an epoch."""
        return self._first_turn + (epoch - self._first_epoch) * len(self._rows)

    def samples(self, turns: np.ndarray) -> np.ndarray:
        """The samples whose turns are `turns` (n,) int64, ascending, of one epoch or of several."""
        epoch = self.place(int(turns[0]))[0]
        if turns[-1] < self.turn(epoch + 1):  # nearly always, and worth its time
            return self._order(epoch)[turns - self.turn(epoch)].astype(np.int64)
        epochs, places = np.divmod(turns - self._first_turn, len(self._rows))
        samples = np.empty(len(turns), np.int64)
        for epoch in np.unique(epochs).tolist():
            mine = epochs == epoch
            samples[mine] = self._order(self._first_epoch + epoch)[places[mine]]
        return samples

    def share(self, span: Span, rank: int, world_size: int) -> np.ndarray:
        """The turns (n,) int64 of a span that are those of process `rank`.

        Processes take lanes of a streamed order where these divide evenly, else turns that follow one another.
        """
        (start, end), more = span, (span[1] - span[0]) % world_size
        if self.shuffle == "stream":
            epoch, place = self.place(start)
            places = np.arange(place, place + end - start)
            if end <= self.turn(epoch + 1):
                mine = share_of_lanes(places, self.shape.lanes, rank, world_size)
                if mine is not None:
                    return np.arange(start, end)[mine]
        size = (end - start) // world_size
        first = start + rank * size + min(rank, more)
        return np.arange(first, first + size + (rank < more))

    def windows(self, shares: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The turns of `shares`, those of one window of a streamed order together."""
        waiting: list[np.ndarray] = []
        now = None
        for turns in shares:
            epochs, places = np.divmod(turns - self._first_turn, len(self._rows))
            windows = self.shape.windows(places, len(self._rows))
            borders = np.flatnonzero(np.diff(epochs) | np.diff(windows)) + 1
            for part in np.split(np.arange(len(turns)), borders):
                here = (int(epochs[part[0]]), int(windows[part[0]]))
                if here != now and waiting:
                    yield np.concatenate(waiting)
                    waiting = []
                now = here
                waiting.append(turns[part])
        if waiting:
            yield np.concatenate(waiting)

    def growing(self, windows: Iterable[np.ndarray], first: int) -> Iterator[np.ndarray]:
        """The turns of `windows`, the first one's in parts: `first` of them, then four times as many each time.

        What is to be looked up for a whole window may lie all over a large index: the first samples wait for less.
        """
        left = iter(windows)
        for turns in islice(left, 1):
            ends = [first * (4**n - 1) // 3 for n in range(1, 32)]
            yield from (part for part in np.split(turns, [end for end in ends if end < len(turns)]) if len(part))
        yield from left

    def state(self, consumed: int) -> dict[str, Any]:
        """What a run's state says after `consumed` turns."""
        epoch, place = self.place(consumed)
        state = {
            "version": 1,
            "samples_digest": self._rows.samples_digest,
            "shuffle": self.shuffle,
            "seed": self._seed,
            "epoch": epoch,
            "samples_consumed": place,
            "samples": len(self._rows),
            "captions": int(self._rows.caption_bounds[-1]),
        }
        if self.shuffle == "stream":
            state["stream"] = asdict(self.shape)
        if self._first_turn:  # what a kcache that knows of no new order would pass over
            state |= {"version": STATE_VERSION, "first_turn": self._first_turn, "first_epoch": self._first_epoch}
        return state

    def go_on(self, state: Mapping[str, Any]) -> int:
        """Take the place that `state` tells of, and give the turns until then; raises CacheMismatchError."""
        if state["version"] not in (1, STATE_VERSION):
            raise CacheMismatchError(
                f"the loader's state has version {state['version']!r}; this kcache reads 1 and {STATE_VERSION}; go on "
                "with the kcache that wrote it"
            )
        own = {"seed": self._seed, "shuffle": self.shuffle}
        if self.shuffle == "stream":
            own["stream"] = asdict(self.shape)
        for name, value in own.items():
            if state[name] != value:
                raise CacheMismatchError(
                    f"the loader's state has {name} {state[name]!r}, this loader has {value!r}: the order would "
                    f"differ; give it the {name} that it was begun with, or start anew"
                )
        if (changed := changed_samples(state, self._rows)) is not None:
            raise CacheMismatchError(
                f"the samples are not those that the order was begun with ({changed}); give those, or go on with these "
                "by begin_new_order"
            )
        self._first_turn, self._first_epoch = int(state.get("first_turn", 0)), int(state.get("first_epoch", 0))
        return self.turn(int(state["epoch"])) + int(state["samples_consumed"])

    def begin_anew(self, state: Mapping[str, Any], consumed: int) -> None:
        """Begin the order of these samples with the epoch after that of `state`, at turn `consumed`."""
        self._first_turn = consumed
        self._first_epoch = int(state["epoch"]) + (int(state["samples_consumed"]) > 0)
