"""Which bucket each pass of a training is of, and which of the bucket's own samples it takes.

Samples of one bucket can share a batch. Those of each come in an endless order of their own, one permutation after
another, and a pass of all processes takes the next few of one bucket. In epoch e every bucket has as many passes as its
samples fill that have not been taken, up to the end of its permutation e; what fills none waits for the next epoch. Of
the passes that are left of an epoch each is as likely to be the next: all orders of them are equally likely.

What comes next follows from where a run stands and from nothing else: it needs no memory of how it came there, nor of
how many samples a pass had. With one bucket nothing is drawn, and its samples simply follow one another.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from kcache.errors import ConfigError
from kcache.loader.chance import PASSES_DRAWN, draw_passes


class Standing(NamedTuple):
    """Where a run stands: behind so many samples of each bucket."""

    turn: int
    """Samples given, those of earlier orders included: the number of the next one."""
    epoch: int
    """That of the last pass, or the next one where no bucket has anything left of it."""
    taken: tuple[int, ...]
    """Per bucket: the place in its own order of its next sample; the permutation of epoch e begins at e × samples."""
    passes: int = 0
    """Passes given since there were several buckets."""
    first_turn: int = 0
    first_epoch: int = 0
    """Where the order of these samples begins: later than at 0 in a run that went on with other samples."""


class Pass(NamedTuple):
    """One forward pass of all processes."""

    bucket: int
    turn: int
    """The first of its turns, which follow one another."""
    place: int
    """The place in the bucket's own order of its first sample; the others follow."""
    samples: int
    """Samples of all processes together."""
    after: Standing


class Schedule:
    """The passes of buckets that have `counts` samples, `sizes` of them to a full pass."""

    def __init__(self, counts: Sequence[int], sizes: Sequence[int], seed: int) -> None:
        """Raises ConfigError where there is no sample, or a pass would have none."""
        if len(counts) != len(sizes) or not sum(counts) or min(counts) < 0 or min(sizes) < 1:
            raise ConfigError(
                f"buckets have {list(counts)} samples and {list(sizes)} in a pass; expected samples in one of them at "
                "least, and 1 or more in a pass of each"
            )
        self.counts = tuple(counts)
        self.sizes = tuple(sizes)
        self._drawn = lru_cache(maxsize=4)(lambda block: draw_passes(seed, block).tolist())
        """Several threads look ahead, some further than others."""

    def begin(self, turn: int = 0, epoch: int = 0) -> Standing:
        """The start of an order that begins with `epoch` at `turn`."""
        return Standing(turn, epoch, tuple(epoch * count for count in self.counts), 0, turn, epoch)

    def forever(self, standing: Standing) -> Iterator[Pass]:
        """Full passes from `standing` on, without end."""
        while True:
            epoch = max(standing.epoch, self._next_epoch(standing))
            for given in self._full(standing._replace(epoch=epoch)):
                yield given
                standing = given.after

    def rest(self, standing: Standing, least: int) -> Iterator[Pass]:
        """The passes that are left of the epoch of `standing`, then those of samples that fill none.

        Of these a bucket has one if it has `least` of them or more.
        """
        epoch = standing.epoch
        for given in self._full(standing):
            yield given
            standing = given.after
        for bucket, count in enumerate(self.counts):
            short = (epoch + 1) * count - standing.taken[bucket]
            if short >= max(least, 1):
                given = self._given(standing, bucket, short)
                yield given
                standing = given.after

    def behind(self, epoch: int, standing: Standing) -> Standing:
        """Where a run stands that stood at `standing` after the `rest` of `epoch`.

        What was too little for a pass waits where there are several buckets; a single one goes on without it.
        """
        if standing.epoch > epoch:
            return standing
        if len(self.counts) > 1:
            return standing._replace(epoch=epoch + 1)
        end = (epoch + 1) * self.counts[0]
        return standing._replace(turn=standing.turn + end - standing.taken[0], epoch=epoch + 1, taken=(end,))

    def passes_until(self, epoch: int, standing: Standing) -> int:
        """Full passes from `standing` until `epoch` begins; a single bucket fills its last one from that epoch."""
        if len(self.counts) > 1:
            return sum(self._left(standing, epoch - 1))
        return -(-max(0, epoch * self.counts[0] - standing.taken[0]) // self.sizes[0])

    def _left(self, standing: Standing, epoch: int) -> list[int]:
        """The full passes that each bucket has until the end of `epoch`."""
        return [
            max(0, (epoch + 1) * count - taken) // size
            for count, taken, size in zip(self.counts, standing.taken, self.sizes, strict=True)
        ]

    def _next_epoch(self, standing: Standing) -> int:
        """The first epoch that a bucket has a full pass in."""
        return min(
            -(-(taken + size) // count) - 1
            for count, taken, size in zip(self.counts, standing.taken, self.sizes, strict=True)
            if count
        )

    def _full(self, standing: Standing) -> Iterator[Pass]:
        """The full passes that are left of the epoch of `standing`."""
        left = self._left(standing, standing.epoch)
        for more in range(sum(left), 0, -1):
            number = 0
            if len(left) > 1:
                block, place = divmod(standing.passes, PASSES_DRAWN)
                number = int(self._drawn(block)[place] * more)
            bucket = 0
            while number >= left[bucket]:
                number -= left[bucket]
                bucket += 1
            left[bucket] -= 1
            given = self._given(standing, bucket, self.sizes[bucket])
            yield given
            standing = given.after

    def _given(self, standing: Standing, bucket: int, count: int) -> Pass:
        taken = (*standing.taken[:bucket], standing.taken[bucket] + count, *standing.taken[bucket + 1 :])
        epoch = standing.epoch
        if all(have == (epoch + 1) * count for have, count in zip(taken, self.counts, strict=True)):
            epoch += 1
        after = standing._replace(
            turn=standing.turn + count, epoch=epoch, taken=taken, passes=standing.passes + (len(taken) > 1)
        )
        return Pass(bucket, standing.turn, standing.taken[bucket], count, after)
