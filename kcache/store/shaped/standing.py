"""Which samples have which shape, as the index has it: their numbers shape by shape, ascending in each.

Of each set that is no plain square, `order-R.npy` (M,) uint32 has the numbers of the samples that have a shape, and
`bounds-R.npy` (S + 1,) int64 says that those of shape k are order[bounds[k]] to order[bounds[k + 1]].
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kcache.config.shapes import NO_SHAPE, Shape, ShapeSet
from kcache.store.formats.columns import Samples
from kcache.store.recipe import shape_of

ORDER, BOUNDS = "order-", "bounds-"


def order_arrays(sets: Sequence[ShapeSet], samples: Samples) -> dict[str, np.ndarray]:
    """The arrays of these sets, of samples with sizes."""
    arrays = {}
    for each in sets:
        if not each.is_square:
            numbers = samples.in_shapes(each)
            order = np.argsort(numbers, kind="stable").astype(np.uint32)
            bounds = np.searchsorted(numbers[order], np.arange(len(each.shapes) + 1))
            arrays[f"{ORDER}{each.resolution}"] = order[bounds[0] :]
            arrays[f"{BOUNDS}{each.resolution}"] = (bounds - bounds[0]).astype(np.int64)
    return arrays


def order_dtypes(sets: Sequence[ShapeSet]) -> dict[str, np.dtype[Any]]:
    """The names and dtypes of the arrays of these sets."""
    dtypes: dict[str, np.dtype[Any]] = {}
    for each in sets:
        if not each.is_square:
            dtypes[f"{ORDER}{each.resolution}"] = np.dtype("<u4")
            dtypes[f"{BOUNDS}{each.resolution}"] = np.dtype("<i8")
    return dtypes


def check_order(name: str, samples: int, _: int, part: np.ndarray) -> None:
    """Raise ValueError for a part of such an array that cannot be one of so many `samples`."""
    if name.startswith(BOUNDS) and len(part) and (part[0] != 0 or (part[1:] < part[:-1]).any()):
        raise ValueError(f"{name}.npy bounds no shapes")
    if name.startswith(ORDER) and len(part) and int(part.max()) >= samples:
        raise ValueError(f"{name}.npy names sample {part.max()} of {samples}")


class Standing:
    """Which of all samples of a cache have a row in which table of latents."""

    def __init__(self, sets: Sequence[ShapeSet], arrays: Mapping[str, np.ndarray], samples: int) -> None:
        """`arrays` are those of `order_arrays`, of so many `samples`."""
        self._sets = sets
        self._arrays = arrays
        self._samples = samples
        self._shapes: dict[ShapeSet, np.ndarray] = {}

    def counts(self, shapes: ShapeSet) -> dict[Shape, int]:
        """How many samples have each shape of a set."""
        if shapes.is_square:
            return {shapes.shapes[0]: self._samples}
        counts = np.diff(self._arrays[f"{BOUNDS}{shapes.resolution}"]).tolist()
        return dict(zip(shapes.shapes, counts, strict=True))

    def lengths(self) -> dict[str, int]:
        """How long the arrays of order are; raises ValueError for bounds that are not of so many shapes and samples."""
        lengths = {}
        for each in self._sets:
            if not each.is_square:
                name, bounds = f"{BOUNDS}{each.resolution}", self._arrays[f"{BOUNDS}{each.resolution}"]
                if len(bounds) != len(each.shapes) + 1 or int(bounds[-1]) > self._samples:
                    raise ValueError(f"{name}.npy bounds no {len(each.shapes)} shapes of {self._samples} samples")
                lengths[f"{ORDER}{each.resolution}"] = int(bounds[-1])
        return lengths

    def rows(self, table: str) -> int:
        """How many samples have a row in a table."""
        sets = self._sets_of(table)
        if len(sets) == 1:
            return next(count for shape, count in self.counts(sets[0]).items() if shape == shape_of(table))
        holders = self.holders(table)
        return self._samples if holders is None else len(holders)

    def samples_of(self, shapes: ShapeSet, number: int) -> np.ndarray:
        """The numbers (m,), ascending, of the samples that have the shape with this number in a set."""
        first, last = self._arrays[f"{BOUNDS}{shapes.resolution}"][number : number + 2].tolist()
        return self._arrays[f"{ORDER}{shapes.resolution}"][first:last]

    def numbers(self, shapes: ShapeSet) -> np.ndarray:
        """(N,) int16: the number of each sample's shape in a set, `NO_SHAPE` where it has none."""
        if shapes not in self._shapes:
            found = np.full(self._samples, 0 if shapes.is_square else NO_SHAPE, np.int16)
            for number in range(0 if shapes.is_square else len(shapes.shapes)):
                found[self.samples_of(shapes, number)] = number
            self._shapes[shapes] = found
        return self._shapes[shapes]

    def holders(self, table: str) -> np.ndarray | None:
        """The numbers (m,), ascending, of the samples that have a row in a table, in its order; None for all."""
        sets, shape = self._sets_of(table), shape_of(table)
        if shape is None or any(each.is_square for each in sets):
            return None
        found = [self.samples_of(each, each.shapes.index(shape)) for each in sets]
        if len(found) == 1:
            return found[0]
        return np.unique(np.concatenate([np.empty(0, np.uint32), *found]))

    def _sets_of(self, table: str) -> list[ShapeSet]:
        shape = shape_of(table)
        return [each for each in self._sets if shape in each.shapes]

    def places(self, table: str, samples: np.ndarray) -> np.ndarray:
        """Where in a table's entries those of `samples` (n,) stand, which have one there: (n,) int64."""
        holders = self.holders(table)
        return samples.astype(np.int64) if holders is None else np.searchsorted(holders, samples)
