"""Which bucket each pass of a training is of, and which of the bucket's own samples it takes.

Samples of one bucket can share a batch. Those of each come in an endless order of their own, one permutation after
another, and a pass takes the next few of one bucket. In epoch e every bucket has as many passes as its samples fill
that have not been taken, up to the end of its permutation e; what fills none waits, and comes first in the next epoch.
Of the passes that are left of an epoch each is as likely to be the next: all orders of them are equally likely.

What comes next follows from where a run stands and from nothing else: it needs no memory of how it came there, nor of
how many samples a pass had. Several buckets have passes of one process, and processes take one each in turn: so the
passes are the same for any number of them. A single bucket has passes of all processes together, shared out among
them: nothing is drawn, and its samples simply follow one another.
"""

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from kcache.errors import ConfigError
from kcache.loader.chance import PASSES_DRAWN, draw_passes


def batches_of(batch_size: int, shapes: Sequence[tuple[tuple[int, int] | None, int | None]]) -> list[int]:
    """Samples of a batch of each of `shapes` (height and width, and the resolution that this is of).

    It is `batch_size` at the smallest resolution, else as many as have about the same number of pixels, at least one.
    """
    area = min((side for _, side in shapes if side is not None), default=0) ** 2
    return [
        batch_size if shape is None or not area else max(1, round(batch_size * area / (shape[0] * shape[1])))
        for shape, _ in shapes
    ]


class Standing(NamedTuple):
    """Where a run stands: behind so many samples of each bucket."""

    turn: int
    """Samples given, those of earlier orders included: the number of the next one."""
    epoch: int
    """That of the last pass, or the next one where no bucket has anything left of it."""
    taken: tuple[int, ...]
    """Per bucket: the place in its own order of its next sample; the permutation of epoch e begins at e × samples."""
    passes: int = 0
    """Passes of several buckets so far: the number of the next one."""
    first_turn: int = 0
    first_epoch: int = 0
    """Where the order of these samples begins: later than at 0 in a run that went on with other samples."""


class Pass(NamedTuple):
    """One forward pass: of one process, or of all where there is a single bucket."""

    bucket: int
    turn: int
    """The first of its turns, which follow one another."""
    place: int
    """The place in the bucket's own order of its first sample; the others follow."""
    samples: int
    after: Standing


class Schedule:
    """The passes of buckets that have `counts` samples, in batches of `batches`, for `world_size` processes.

    A sample counts as often as it comes in an epoch: what is said of samples here is said of their turns. A bucket that
    has fewer samples than its batch has passes of all of its samples.
    """

    def __init__(self, counts: Sequence[int], batches: Sequence[int], seed: int, world_size: int = 1) -> None:
        """Raises ConfigError where there is no sample, or a batch would have none."""
        if len(counts) != len(batches) or not sum(counts) or min(counts) < 0 or min(batches) < 1 or world_size < 1:
            raise ConfigError(
                f"buckets have {list(counts)} samples in batches of {list(batches)} for {world_size} processes; "
                "expected samples in one of them at least, batches of 1 or more, and a process"
            )
        self.counts = tuple(counts)
        self.several = len(counts) > 1
        self.world_size = world_size
        pairs = zip(batches, counts, strict=True)
        self.sizes = tuple(min(pair) or 1 for pair in pairs) if self.several else (batches[0] * world_size,)
        """Samples of a full pass of each bucket."""
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

    def rest(self, standing: Standing) -> Iterator[Pass]:
        """The passes that are left of the epoch of `standing`, then those of samples that fill none.

        A single bucket has none of fewer samples than there are processes.
        """
        epoch = standing.epoch
        for given in self._full(standing):
            yield given
            standing = given.after
        for bucket, count in enumerate(self.counts):
            short = (epoch + 1) * count - standing.taken[bucket]
            if short >= (1 if self.several else self.world_size):
                given = self._given(standing, bucket, short)
                yield given
                standing = given.after

    def steps(self, passes: Iterable[Pass]) -> Iterator[tuple[Pass, ...]]:
        """What all processes do at a time: one pass each, or one together; what is not enough for all is left."""
        if not self.several:
            yield from ((given,) for given in passes)
            return
        step: list[Pass] = []
        for given in passes:
            step.append(given)
            if len(step) == self.world_size:
                yield tuple(step)
                step = []

    def behind(self, epoch: int, standing: Standing) -> Standing:
        """Where a run stands that stood at `standing` after the `rest` of `epoch`.

        What was not enough for all processes waits where there are several buckets; a single one goes on without it.
        """
        if standing.epoch > epoch:
            return standing
        if self.several:
            return standing._replace(epoch=epoch + 1)
        end = (epoch + 1) * self.counts[0]
        return standing._replace(turn=standing.turn + end - standing.taken[0], epoch=epoch + 1, taken=(end,))

    def steps_until(self, epoch: int, standing: Standing) -> int:
        """`steps` from `standing` until nothing is left of the epochs before `epoch` that fills a pass.

        The last one may take samples of that epoch, so that all processes have a pass, and a single bucket a full one.
        """
        if self.several:
            return -(-sum(self._left(standing, epoch - 1)) // self.world_size)
        return -(-max(0, epoch * self.counts[0] - standing.taken[0]) // self.sizes[0])

    @property
    def passes_of_epoch(self) -> Fraction:
        """`steps` of full passes in an epoch, on average of many."""
        passes = sum(Fraction(count, size) for count, size in zip(self.counts, self.sizes, strict=True))
        return Fraction(passes) / (self.world_size if self.several else 1)

    def steps_of_epoch(self) -> int:
        """`steps` of the `rest` of an epoch from its beginning, before which nothing waits."""
        passes = [divmod(count, size) for count, size in zip(self.counts, self.sizes, strict=True)]
        if self.several:
            return sum(full + (short > 0) for full, short in passes) // self.world_size
        return passes[0][0] + (passes[0][1] >= self.world_size)

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
            number = self._draw(standing.passes, more) if self.several else 0
            bucket = 0
            while number >= left[bucket]:
                number -= left[bucket]
                bucket += 1
            left[bucket] -= 1
            given = self._given(standing, bucket, self.sizes[bucket])
            yield given
            standing = given.after

    def _draw(self, number: int, passes: int) -> int:
        """Which of so many `passes` is the `number`-th."""
        block, place = divmod(number, PASSES_DRAWN)
        return int(self._drawn(block)[place] * passes)

    def _given(self, standing: Standing, bucket: int, samples: int) -> Pass:
        before, place, behind = standing.taken[:bucket], standing.taken[bucket], standing.taken[bucket + 1 :]
        taken = (*before, place + samples, *behind)
        done = all(have == (standing.epoch + 1) * count for have, count in zip(taken, self.counts, strict=True))
        after = standing._replace(
            turn=standing.turn + samples,
            epoch=standing.epoch + done,
            taken=taken,
            passes=standing.passes + self.several,
        )
        return Pass(bucket, standing.turn, place, samples, after)
