"""How much memory streaming takes: room for the rows of one window to two, and for what is under way."""

from dataclasses import dataclass

import numpy as np

from kcache.errors import ConfigError
from kcache.loader.streaming.fetches import Layout
from kcache.loader.streaming.streamed import StreamShape
from kcache.machine import free_memory

AT_ONCE = 32
"""Requests under way: enough to fill a line of 10 Gbit/s with blocks of 1 MB that take 25 ms each."""
_LEAST_AT_ONCE = 4
_WINDOWS = 2
"""Room for more windows than that would be filled in vain: it bridges as long as a window lasts already."""
_HEADERS = 2048
_UNEVEN = 1.05
"""Rows of different length in a window have no more than so many times the bytes that they have on average."""


@dataclass(frozen=True, kw_only=True)
class Ration:
    """What the memory of a stage is divided into."""

    units: tuple[int, ...]
    """Per field: slots, each for a row, or a token of a ragged field."""
    flight_bytes: int
    """For ranges that were asked for and whose rows are in no slot yet."""
    most_bytes: int
    """After which a range ends with the row that reaches it."""


def ration(
    layout: Layout, shape: StreamShape, samples: int, batch_size: int, world_size: int, asked: int | None
) -> Ration:
    """The memory of one process's stage: of the bytes `asked` for, or of half of what is free, as much as is of use.

    Raises ConfigError, naming the least that is needed, before anything is read.
    """
    rows = -(-min(samples, shape.window_rows) // world_size) + 2 * batch_size
    means = [layout.mean_bytes(name) for name in layout.fields]
    longest = [layout.most_bytes(name) for name in layout.fields]
    units = [
        int(np.ceil(rows * mean / unit * (1 if mean == most else _UNEVEN))) + (mean != most) * batch_size * most // unit
        for mean, most, unit in zip(means, longest, layout.units, strict=True)
    ]
    arena = sum(count * unit for count, unit in zip(units, layout.units, strict=True))
    # A block with what stands between its rows: headers in a tar, rows of fields that are not read.
    most_bytes = shape.block_rows * int(2 * sum(means) + _HEADERS * len(means))
    range_bytes = most_bytes + max(longest)
    # Each range is there twice: a slow one is asked for again, and one that came is copied.
    least = arena + 2 * range_bytes * _LEAST_AT_ONCE
    given = asked if asked is not None else free_memory() // (2 * world_size)
    if given < least:
        raise ConfigError(
            f"{'--stage-bytes is' if asked is not None else 'half of the free memory, a share per process, is'} "
            f"{given:,} bytes; expected at least {least:,}: streaming keeps {rows:,} samples of each process, a window "
            "of its order, in memory; give --stage-bytes as much, or train with more processes, which share it"
        )
    flight = min(2 * range_bytes * AT_ONCE, given - arena)
    factor = min(_WINDOWS, (given - flight) / arena)
    return Ration(units=tuple(int(count * factor) for count in units), flight_bytes=flight, most_bytes=most_bytes)
