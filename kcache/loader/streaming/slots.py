"""The memory of a stage: slots for rows, and which samples of a run have theirs filled."""

import numpy as np


class Arena:
    """Slots for rows or tokens of one field, any of which is as good as another."""

    def __init__(self, units: int, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> None:
        self.slots = np.empty((units, *shape), dtype)
        self.bytes = self.slots.reshape(units, -1).view(np.uint8)
        """The same memory, (units, bytes of one) uint8."""
        self._unused = np.arange(units, dtype=np.int32)[::-1].copy()
        self.left = units

    def take(self, count: int) -> np.ndarray:
        """Any `count` of the unused slots, of which there must be as many: (count,) int32."""
        self.left -= count
        return self._unused[self.left : self.left + count].copy()

    def give_back(self, slots: np.ndarray) -> None:
        """Slots that nobody uses any more."""
        self._unused[self.left : self.left + len(slots)] = slots
        self.left += len(slots)


class Run:
    """A run of samples, in the order of their use: where each one's rows are, and what is still missing."""

    def __init__(self, first: int, lengths: list[np.ndarray]) -> None:
        """`first` is the number of the first use; `lengths` are per field the units of each sample's row."""
        self.first = first
        self.count = len(lengths[0])
        self.bounds = [np.concatenate([[0], np.cumsum(each)]).astype(np.int64) for each in lengths]
        self.slots = [np.empty(int(bounds[-1]), np.int32) for bounds in self.bounds]
        self.missing = np.full(self.count, len(lengths), np.int16)
        self.came = np.zeros(self.count)
        self.taken = 0

    def part(self, first: int, last: int) -> slice:
        """Of the uses `first` to `last`, those that are of this run, by their numbers in it."""
        start, stop = (min(max(use - self.first, 0), self.count) for use in (first, last))
        return slice(start, stop)
