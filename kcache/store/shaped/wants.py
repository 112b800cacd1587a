"""Which rows the tables of a cache have of its samples: by its sets of shapes, and whether of mirrored pictures too."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from kcache.config.shapes import ShapeSet, square_set
from kcache.store.digests import Keys, control_row_keys, mirrored_keys
from kcache.store.formats.columns import Sample, Samples
from kcache.store.recipe import LATENTS, TableKind, control_kind, kind_of, shape_of, sides_of, table_name

MIRRORED = "-mirrored"
"""What stands behind the name of a table in that of the index array of its mirrored rows."""


@dataclass(frozen=True, slots=True)
class Wants:
    """What tables hold of samples that have sizes: all questions after the keys of rows are asked of this."""

    sets: tuple[ShapeSet, ...]
    """Each is of another resolution, or the plain square beside shapes of the same."""
    flip: bool = False
    """Whether there are rows of the mirrored pictures."""
    controls: tuple[str, ...] = ()
    """The kinds of control images that there are rows of, by name and sorted."""

    def samples_of(self, table: str, samples: Sequence[Sample]) -> np.ndarray | None:
        """Which of `samples` have a row in a table of pictures: their numbers (k,), ascending; None for all of them.

        Of a table of no set these are none.
        """
        shape = shape_of(table)
        sets = [each for each in self.sets if shape in each.shapes]
        if shape is None or any(each.is_square for each in sets):
            return None
        chosen, columns = np.zeros(len(samples), np.bool_), Samples.of(samples)
        for each in sets:
            chosen |= columns.in_shapes(each) == each.shapes.index(shape)
        return np.flatnonzero(chosen)

    def takes(self, table: str, width: int, height: int) -> bool:
        """Whether a picture of this size has a row in a table of pictures."""
        shape = shape_of(table)
        sets = [each for each in self.sets if shape in each.shapes]
        sizes = np.array([width]), np.array([height])
        return shape is None or any(
            each.is_square or each.choose(*sizes)[0] == each.shapes.index(shape) for each in sets
        )

    def keys(self, table: str, samples: Sequence[Sample]) -> Keys:
        """The key of each row that `samples` use, in their order, then those of the mirrored pictures in the same.

        A key that several samples use comes several times.
        """
        keys = self._own_keys(table, samples)
        return keys + mirrored_keys(keys) if self._is_mirrored(table) else keys

    def wanted(self, table: str, samples: Sequence[Sample]) -> Keys:
        """The keys that a table holds when it holds all of `samples`, in the order of its rows, the reserved one first.

        Pictures of one shape follow each other in all tables, each with its mirror image behind it: what is read
        together stands together.
        """
        kind = kind_of(table)
        keys = self._own_keys(table, samples, grouped=True)
        if self._is_mirrored(table):
            keys = Keys(np.stack([keys.packed, mirrored_keys(keys).packed], axis=1).reshape(-1, keys.packed.shape[1]))
        if kind.per == "control":
            keys = keys.unique()  # of those that have no mask there is one row
        return keys if kind.reserved is None else Keys.of([kind.reserved]) + keys

    def possible(self, table: str, samples: Sequence[Sample]) -> Keys:
        """All keys that a table can hold of `samples`, whatever the sizes of the pictures turn out to be."""
        kind, columns = kind_of(table), Samples.of(samples)
        keys = self._keys_of(kind, columns)
        keys = keys + mirrored_keys(keys) if self._is_mirrored(table) else keys
        return keys if kind.reserved is None else keys + Keys.of([kind.reserved])

    def indexed(self, table: str, samples: Sequence[Sample]) -> dict[str, Keys]:
        """The key of each entry of a table's index arrays, by their names.

        Those of `samples` in their order, and the reserved one; beside them those of the mirrored pictures.
        """
        kind, keys = kind_of(table), self._own_keys(table, samples)
        arrays = {table: keys if kind.reserved is None else keys + Keys.of([kind.reserved])}
        return arrays | ({table + MIRRORED: mirrored_keys(keys)} if self._is_mirrored(table) else {})

    def arrays(self, table: str) -> tuple[str, ...]:
        """The names of a table's index arrays, that of the mirrored pictures behind the other."""
        return (table, table + MIRRORED) if self._is_mirrored(table) else (table,)

    def by_sample(self, table: str, samples: Sequence[Sample]) -> list[list[bytes]]:
        """The keys of the rows that each sample uses: of a picture its own, then its mirror image's, or none."""
        columns = Samples.of(samples)
        keys: list[list[bytes]] = [[] for _ in range(len(columns))]
        if kind_of(table).per == "caption":
            numbers = np.repeat(np.arange(len(columns)), np.diff(columns.caption_bounds))
        else:
            chosen = self.samples_of(table, columns)
            numbers = np.arange(len(columns)) if chosen is None else chosen
        numbers = np.tile(numbers, 1 + self._is_mirrored(table))
        for number, key in zip(numbers.tolist(), self.keys(table, columns), strict=True):
            keys[number].append(key)
        return keys

    def are_there(self, table: str, samples: Samples, stored: Keys) -> np.ndarray:
        """(N,) bool: of which samples all rows that a table of pictures should have are among those `stored`."""
        keys, chosen = self._own_keys(table, samples), self.samples_of(table, samples)
        there = keys.among(stored)
        if self._is_mirrored(table):
            there &= mirrored_keys(keys).among(stored)
        if chosen is None:
            return there
        whole = np.ones(len(samples), np.bool_)
        whole[chosen] = there
        return whole

    def use(self, table: str, samples: Samples, keys: Keys) -> np.ndarray:
        """(N,) bool: which samples use a row of a table of pictures that has one of `keys`, or its mirror image."""
        own, chosen = self._own_keys(table, samples), self.samples_of(table, samples)
        used = own.among(keys) | mirrored_keys(own).among(keys)
        if chosen is None:
            return used
        whole = np.zeros(len(samples), np.bool_)
        whole[chosen] = used
        return whole

    def _is_mirrored(self, table: str) -> bool:
        return self.flip and kind_of(table).per != "caption"

    def _keys_of(self, kind: TableKind, samples: Samples) -> Keys:
        """The key of the row that each of `samples`, or each of their captions, has in a table of a kind."""
        if kind.per == "caption":
            return samples.caption_keys
        if kind.per == "image":
            return samples.image_keys
        return control_row_keys(samples.image_keys, samples.control_keys(self.controls.index(kind.name)), kind.reserved)

    def _own_keys(self, table: str, samples: Sequence[Sample], *, grouped: bool = False) -> Keys:
        """The keys without the mirrored ones, in the order of the samples, or where asked for, shape by shape."""
        columns = Samples.of(samples)
        keys = self._keys_of(kind_of(table), columns)
        if kind_of(table).per == "caption":
            return keys
        chosen = self.samples_of(table, columns)
        first = next((each for each in self.sets if not each.is_square), None)
        if grouped and first is not None:
            numbers = np.arange(len(columns)) if chosen is None else chosen
            return keys.taken(numbers[np.argsort(columns.in_shapes(first)[numbers], kind="stable")])
        return keys if chosen is None else keys.taken(chosen)


def squares_of(tables: Collection[str]) -> tuple[ShapeSet, ...]:
    """The sets of a cache of squares that has these tables."""
    return tuple(map(square_set, sides_of(tables)))


def in_order(sets: Collection[ShapeSet]) -> tuple[ShapeSet, ...]:
    """The sets of one cache by resolution, squares first."""
    return tuple(sorted(set(sets), key=lambda each: (each.resolution, not each.is_square, each.shapes)))


def tables_of(sets: Collection[ShapeSet], controls: Sequence[str] = ()) -> list[str]:
    """The tables of latents, and of control images, that some sets have, each once."""
    kinds = [LATENTS, *map(control_kind, controls)]
    return list(dict.fromkeys(table_name(kind, shape) for kind in kinds for each in sets for shape in each.shapes))
