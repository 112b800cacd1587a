"""Which samples of a cache are read, and where their rows stand: nothing of it is opened or written."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from kcache.config.shapes import NO_SHAPE, Shape
from kcache.errors import ConfigError
from kcache.store.formats.chosen import CAPTION_BOUNDS, Chosen, chosen_bounds, chosen_index
from kcache.store.formats.sample_extras import COUNTS, Counts
from kcache.store.recipe import TEXT, kind_of, shape_of
from kcache.store.selection import sample_numbers
from kcache.store.shaped.choice import Reads
from kcache.store.shaped.joined import Joined
from kcache.store.shaped.wants import MIRRORED

_TOGETHER = 1 << 20
"""Numbers of samples that are digested together."""


@dataclass(frozen=True, eq=False)
class Held:
    """Samples of a cache, all or some, and the index entries of their rows."""

    reads: Reads
    index: Mapping[str, np.ndarray]
    """The arrays of the index, of these samples: tables that not all of them have a row in are not among them."""
    selected: np.ndarray | None = None
    """(n,) the numbers of these samples among all; None for all."""

    @classmethod
    def all_of(cls, reads: Reads) -> "Held":
        """All samples of a cache."""
        return cls(reads, reads.index)

    def __len__(self) -> int:
        return len(self.caption_bounds) - 1

    @property
    def caption_bounds(self) -> np.ndarray:
        """(N + 1,) int64: sample i has the captions caption_bounds[i] to caption_bounds[i + 1]."""
        return self.index[CAPTION_BOUNDS]

    @property
    def counts(self) -> Counts:
        """What the samples count."""
        found = [self.reads.arrays.get(name) for name in COUNTS]
        if self.selected is not None:
            chosen = [None if array is None else Chosen(array, len(array), self.selected) for array in found]
            found = cast("list[np.ndarray | None]", chosen)
        return Counts(*found)

    def digest(self, digest: str) -> str:
        """sha256 (hex) of these samples and their order, `digest` being that of all samples."""
        if self.selected is None:
            return digest
        found = hashlib.sha256(digest.encode())
        for first in range(0, len(self), _TOGETHER):
            found.update(self.selected[first : first + _TOGETHER].astype("<i8").tobytes())
        return found.hexdigest()

    def select(self, numbers: np.ndarray) -> "Held":
        """Those with these `numbers` (n,), in that order."""
        numbers = numbers.astype(np.int32 if len(self) < 1 << 31 else np.int64)  # of very many samples half the memory
        selected = numbers if self.selected is None else self.selected[numbers]
        return Held(self.reads, chosen_index(self.index, numbers), selected)

    def parts(self, fields: Sequence[str]) -> "list[Held] | None":
        """The samples of each shape that `fields` have, by resolution and list; None where all have one."""
        parts = self.reads.parts(fields)
        return None if parts is None else [part for part in map(self._part, parts) if len(part)]

    def of_table(self, table: str) -> "Held":
        """The samples that have a row in a table, with that one of its kind; of the first set that has its shape."""
        shape, sets = shape_of(table), self.reads.manifest.shape_sets
        if shape is None:
            return self
        shapes = next(each for each in sets if shape in each.shapes)
        return self._part(replace(self.reads, sets=(shapes,), number=shapes.shapes.index(shape)))

    def having(self, fields: Sequence[str]) -> np.ndarray | None:
        """(N,) bool: which samples have rows of all `fields`; None for all."""
        there = None if self.reads.parts(fields) is None else self.reads.have_rows()
        return there if there is None or self.selected is None else there[self.selected]

    def shapes(self) -> dict[Shape, int]:
        """How many of the samples have each shape of the sets that are read; several sets may have one of it."""
        if self.reads.number is not None:
            return {self.reads.sets[0].shapes[self.reads.number]: len(self)}
        counts: dict[Shape, int] = {}
        for each in self.reads.sets:
            if self.selected is None or each.is_square:
                found = {shape: min(count, len(self)) for shape, count in self.reads.standing.counts(each).items()}
            else:
                numbers = self.reads.standing.numbers(each)[self.selected]
                sums = np.bincount(numbers[numbers != NO_SHAPE], minlength=len(each.shapes)).tolist()
                found = dict(zip(each.shapes, sums, strict=True))
            for shape, count in found.items():
                counts[shape] = counts.get(shape, 0) + count
        return counts

    def _part(self, reads: Reads) -> "Held":
        """The samples of one shape."""
        [shapes], standing = reads.sets, reads.standing
        if shapes.is_square:
            return Held(reads, self.index, self.selected)
        if self.selected is None:
            numbers = selected = standing.samples_of(shapes, reads.number or 0)
        else:
            numbers = np.flatnonzero(standing.numbers(shapes)[self.selected] == reads.number)
            selected = self.selected[numbers]
        index = chosen_index(self.index, numbers)
        for table in (each for each in reads.manifest.tables if shape_of(each) == reads.shape):
            holders = standing.holders(table)
            for name in (table, table + MIRRORED) if reads.flip else (table,):
                entries = index[name] = reads.arrays[name]
                if self.selected is not None or holders is None or len(holders) != len(numbers):
                    places = standing.places(table, selected)
                    index[name] = cast("np.ndarray", Chosen(entries, len(entries), places))
        return Held(reads, index, selected)

    def entries(self, table: str) -> np.ndarray:
        """The index entries that `positions` name: a table's own, and the mirrored ones behind them."""
        mirrored = self.index.get(table + MIRRORED)
        return self.index[table] if mirrored is None else cast("np.ndarray", Joined(self.index[table], mirrored))

    def positions(
        self,
        samples: Sequence[int] | np.ndarray,
        tables: Sequence[str],
        caption: int | np.ndarray = 0,
        *,
        drop_caption: np.ndarray | None = None,
        drop_image: np.ndarray | None = None,
        mirrored: np.ndarray | None = None,
    ) -> list[np.ndarray]:
        """Which entries of each table `Cache.read` takes for the same arguments: (B,) int64 per table."""
        numbers, found = self.checked(samples), []
        for table in tables:
            kind = kind_of(table)
            if kind.per == "caption":
                positions = self._caption_positions(numbers, caption)
            else:
                positions = numbers if mirrored is None else self._mirrored(table, numbers, mirrored)
            if (mask := kind.dropped(drop_caption, drop_image)) is not None:
                reserved = int(self.caption_bounds[-1]) if kind.per == "caption" else len(self)
                positions = np.where(mask, reserved, positions)
            found.append(positions)
        return found

    def longest_texts(self, field: str, samples: np.ndarray) -> np.ndarray:
        """Bytes of the longest row of `field` among the captions of each of some samples, (n,) int64."""
        starts, bounds = self.caption_bounds[samples], chosen_bounds(self.caption_bounds, samples)
        captions = np.repeat(starts - bounds[:-1], np.diff(bounds)) + np.arange(bounds[-1])
        lengths = self.index[TEXT.name][captions][field]["length"].astype(np.int64)
        return np.maximum.reduceat(lengths, bounds[:-1]) if len(samples) else lengths

    def checked(self, samples: Sequence[int] | np.ndarray) -> np.ndarray:
        """The numbers of samples, (B,) int64; raises IndexError for one that is not there."""
        return sample_numbers(samples, len(self))

    def _mirrored(self, table: str, numbers: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
        if not self.reads.flip and np.any(mirrored):
            raise ConfigError(
                f"{self.reads.folder} was opened without rows of mirrored pictures, or has none; expected mirrored to "
                "be None, or a cache built with --flip"
            )
        return np.where(mirrored, numbers + len(self.index[table]), numbers)

    def _caption_positions(self, samples: np.ndarray, caption: int | np.ndarray) -> np.ndarray:
        starts, ends = self.caption_bounds[samples], self.caption_bounds[samples + 1]
        positions = starts + caption
        wrong = np.flatnonzero((positions < starts) | (positions >= ends))
        if len(wrong):
            sample, number, held = samples[wrong[0]], (positions - starts)[wrong[0]], (ends - starts)[wrong[0]]
            raise IndexError(f"caption {number} asked of sample {sample}, which has {held}")
        return positions
