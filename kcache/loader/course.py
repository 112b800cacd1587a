"""The course of one bucket's samples: which sample has which place, which places a process takes, and in what windows.

An epoch has a place for each sample, and for one that has repeats as many as these. Places count on through all epochs:
those of epoch e begin at e × the places of one.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import numpy as np

from kcache.errors import ConfigError
from kcache.loader.chance import epoch_order
from kcache.loader.schedule import Pass
from kcache.loader.streaming.streamed import StreamOrder, StreamShape, share_of_lanes, stream_shape


@dataclass(frozen=True)
class Share:
    """What one process takes of a pass, or of several."""

    turns: np.ndarray
    """(n,) int64: their numbers in the whole training, by which all else is drawn."""
    places: np.ndarray
    """(n,) int64, ascending: their places in the order of the bucket."""

    def __len__(self) -> int:
        return len(self.turns)

    def some(self, which: np.ndarray) -> "Share":
        """Those numbered `which` (m,) int64."""
        return Share(self.turns[which], self.places[which])


def _joined(shares: list[Share]) -> Share:
    turns, places = [share.turns for share in shares], [share.places for share in shares]
    return Share(np.concatenate(turns), np.concatenate(places))


class Repeats:
    """What an epoch consists of, before it is shuffled, where some samples come several times in it.

    All samples, each once; behind them, round by round, those that come once more. So the turns of one sample lie far
    apart, also in orders that keep neighbours together, and neighbours in a round are neighbours in the cache: but for
    those that come most often being first, so that those of any round are the first ones of one list.
    """

    def __init__(self, repeats: np.ndarray) -> None:
        """`repeats` (N,) int32, 1 or more."""
        self._samples = len(repeats)
        again = np.flatnonzero(repeats > 1)
        more = repeats[again] - 1
        self._again = again[np.argsort(-more, kind="stable")].astype(np.int32 if len(repeats) < 1 << 31 else np.int64)
        rounds, counts = np.unique(more, return_counts=True)
        self._lengths = np.cumsum(counts[::-1])[::-1]
        ends = np.cumsum(self._lengths * np.diff(rounds.astype(np.int64), prepend=0))
        self._starts = np.concatenate([[0], ends])
        """Where rounds of the same samples begin behind the first one, and where the last of them ends."""

    def __len__(self) -> int:
        """Places of an epoch."""
        return self._samples + int(self._starts[-1])

    def samples(self, numbers: np.ndarray) -> np.ndarray:
        """The samples at these `numbers` (n,) int64 of an epoch that is not shuffled: (n,) int64."""
        samples, later = numbers.copy(), np.flatnonzero(numbers >= self._samples)
        behind = numbers[later] - self._samples
        which = np.searchsorted(self._starts, behind, "right") - 1
        samples[later] = self._again[(behind - self._starts[which]) % self._lengths[which]]
        return samples


def repeats_of(repeats: np.ndarray | None) -> Repeats | None:
    """What samples with these `repeats` (N,), or None, make of an epoch; None where each comes once."""
    if repeats is None:
        return None
    found = repeats[:]  # of arrays that are read when they are asked
    return Repeats(found) if (found > 1).any() else None


class Course:
    """The order of a number of `samples`, which seed, shuffle and, of "stream", the shape decide.

    Several buckets have numbers, by which their orders differ even where they have as many samples.
    """

    def __init__(
        self,
        samples: int,
        seed: int,
        shuffle: str,
        shape: StreamShape | None = None,
        bucket: int = 0,
        repeats: Repeats | None = None,
    ) -> None:
        """Raises ConfigError for a shuffle that is none."""
        if shuffle not in ("full", "block", "stream"):
            raise ConfigError(f"shuffle is {shuffle!r}; expected 'full', 'block' or 'stream'")
        self._count = samples if repeats is None else len(repeats)
        self._repeats = repeats
        self._seed = seed
        self._bucket = bucket
        self.shuffle = shuffle
        self.shape = shape or stream_shape(self._count)
        self._order = lru_cache(maxsize=2)(self._make_order)

    def _make_order(self, epoch: int) -> np.ndarray | StreamOrder:
        if self.shuffle == "stream":
            return StreamOrder(self._seed, epoch, self._count, self.shape, self._bucket)
        return epoch_order(self._seed, epoch, self._count, self.shuffle, self._bucket)

    def __len__(self) -> int:
        """Places of an epoch."""
        return self._count

    def samples(self, places: np.ndarray) -> np.ndarray:
        """The samples at `places` (n,) int64, ascending, of one epoch or of several."""
        numbers = self._numbers_at(places)
        return numbers if self._repeats is None else self._repeats.samples(numbers)

    def _numbers_at(self, places: np.ndarray) -> np.ndarray:
        """The numbers of `places` (n,) in epochs that are not shuffled: of samples, where each comes once."""
        epoch = int(places[0]) // self._count
        if places[-1] < (epoch + 1) * self._count:  # nearly always, and worth its time
            return self._order(epoch)[places - epoch * self._count].astype(np.int64)
        epochs, inside = np.divmod(places, self._count)
        numbers = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs).tolist():
            mine = epochs == epoch
            numbers[mine] = self._order(epoch)[inside[mine]]
        return numbers

    def share(self, given: Pass, rank: int, world_size: int) -> Share:
        """What process `rank` of `world_size` takes of a pass.

        Processes take lanes of a streamed order where these divide evenly, else turns that follow one another.
        """
        numbers = self._numbers(given, rank, world_size)
        return Share(given.turn + numbers, given.place + numbers)

    def _numbers(self, given: Pass, rank: int, world_size: int) -> np.ndarray:
        if self.shuffle == "stream" and world_size > 1:
            place = given.place % self._count
            if place + given.samples <= self._count:
                places = np.arange(place, place + given.samples)
                mine = share_of_lanes(places, self.shape.lanes, rank, world_size)
                if mine is not None:
                    return np.flatnonzero(mine)
        size, more = divmod(given.samples, world_size)
        first = rank * size + min(rank, more)
        return np.arange(first, first + size + (rank < more))

    def windows(self, shares: Iterable[Share]) -> Iterator[Share]:
        """What is in `shares`, that of one window of a streamed order together."""
        waiting: list[Share] = []
        now = None
        for share in shares:
            epochs, inside = np.divmod(share.places, self._count)
            windows = self.shape.windows(inside, self._count)
            borders = np.flatnonzero(np.diff(epochs) | np.diff(windows)) + 1
            for part in np.split(np.arange(len(share)), borders):
                here = (int(epochs[part[0]]), int(windows[part[0]]))
                if here != now and waiting:
                    yield _joined(waiting)
                    waiting = []
                now = here
                waiting.append(share.some(part))
        if waiting:
            yield _joined(waiting)

    def growing(self, windows: Iterable[Share], first: int) -> Iterator[Share]:
        """The shares of `windows`, the first one's in parts: `first` samples, then four times as many each time.

        What is to be looked up for a whole window may lie all over a large index: the first samples wait for less.
        """
        left = iter(windows)
        for share in islice(left, 1):
            ends = [first * (4**n - 1) // 3 for n in range(1, 32)]
            pieces = np.split(np.arange(len(share)), [end for end in ends if end < len(share)])
            yield from (share.some(piece) for piece in pieces if len(piece))
        yield from left
