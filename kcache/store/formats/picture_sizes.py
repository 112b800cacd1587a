"""Width and height of pictures, by key: found in lists of samples and in side files, and put into lists of samples."""

from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from kcache.disk.scratch import kept, release, spans
from kcache.store.digests import Keys, Positions
from kcache.store.formats.columns import Samples, packed
from kcache.store.formats.side_files import SIZES

if TYPE_CHECKING:
    import pyarrow

_TOGETHER = 1 << 20
"""Sizes that are moved together."""


class Sizes:
    """Width and height of pictures, by key of the picture."""

    def __init__(self, samples: Samples) -> None:
        """Those of some samples of a cache."""
        self._rows = np.empty(0, SIZES)
        self.find = Positions(Keys.of(())).find
        self.add(map(_sizes, samples.each()))

    def add(self, runs: Iterable[np.ndarray]) -> None:
        """Note what is new of some rows, of `SIZES` each; of those that are new twice, the last."""
        new = (run[self.find(Keys(run["key"])) < 0] for run in runs)
        self._rows = kept(chain([self._rows], new), self._rows[:0])
        self.find = Positions(Keys.joined(self._rows["key"][span] for span in spans(len(self._rows), _TOGETHER))).find

    def at(self, numbers: np.ndarray) -> np.ndarray:
        """(k,) of `SIZES`: what `find` has found."""
        found = self._rows[numbers]
        release(self._rows)
        return found


def _sizes(table: "pyarrow.Table") -> np.ndarray:
    sizes = np.empty(len(table), SIZES)
    sizes["key"] = packed(table["image_key"])
    for name in ("width", "height"):
        sizes[name] = table[name].to_numpy()
    return sizes


def with_sizes(table: "pyarrow.Table", sizes: np.ndarray) -> "pyarrow.Table":
    """Some samples with the `sizes` of their pictures, of `SIZES`."""
    import pyarrow as pa

    for name in ("width", "height"):
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(at), pa.array(sizes[name], pa.int32()))
    return table
