"""The course of one bucket's samples: which sample has which place, which places a process takes, in which windows.

Places count on through all epochs: those of epoch e begin at e × samples.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from kcache.errors import ConfigError
from kcache.loader.chance import epoch_order
from kcache.loader.streamed import StreamOrder, StreamShape, share_of_lanes, stream_shape


class Share(NamedTuple):
    """What one process takes of a pass, or of several."""

    turns: np.ndarray
    """(n,) int64: by these all else is drawn."""
    places: np.ndarray
    """(n,) int64, ascending: in the order of the bucket's samples."""

    def __getitem__(self, part: object) -> "Share":  # type: ignore[override]
        return Share(self.turns[part], self.places[part])
