"""How much memory streaming takes: room for the rows of one window to two, and for what is under way."""

from collections.abc import Sequence
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


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What streaming the samples of one order needs."""

    rows: int
    """Samples that are in memory together."""
    units: tuple[int, ...]
    """Slots for them, per field."""
    arena: int
    """Bytes of these."""
    range_bytes: int
    """Of one range that is under way, at most."""
    most_bytes: int

    @property
    def least(self) -> int:
        """Bytes without which it cannot go on."""
        # Each range is there twice: a slow one is asked for again, and one that came is copied.
        return self.arena + 2 * self.range_bytes * _LEAST_AT_ONCE


def needs(layout: Layout, shape: StreamShape, samples: int, batch_size: int, sharers: int) -> Needs:
    """What one of `sharers` needs, who take equal shares of each window."""
    rows = -(-min(samples, shape.window_rows) // sharers) + 2 * batch_size
    means = [layout.mean_bytes(name) for name in layout.fields]
    longest = [layout.most_bytes(name) for name in layout.fields]
    units = tuple(
        int(np.ceil(rows * mean / unit * (1 if mean == most else _UNEVEN))) + (mean != most) * batch_size * most // unit
        for mean, most, unit in zip(means, longest, layout.units, strict=True)
    )
    arena = sum(count * unit for count, unit in zip(units, layout.units, strict=True))
    # A block with what stands between its rows: headers in a tar, rows of fields that are not read.
    most_bytes = shape.block_rows * int(2 * sum(means) + _HEADERS * len(means))
    return Needs(rows=rows, units=units, arena=arena, range_bytes=most_bytes + max(longest), most_bytes=most_bytes)


def rations(orders: Sequence[Needs], world_size: int, asked: int | None) -> list[Ration]:
    """The memory of one process's stages, one for each order that it streams, shared out by what they need.

    It is of the bytes `asked` for, or of half of what is free, as much as is of use. Raises ConfigError, naming the
    least that is needed, before anything is read.
    """
    least = sum(each.least for each in orders)
    given = asked if asked is not None else free_memory() // (2 * world_size)
    if given < least:
        rows = sum(each.rows for each in orders)
        raise ConfigError(
            f"{'--stage-bytes is' if asked is not None else 'half of the free memory, a share per process, is'} "
            f"{given:,} bytes; expected at least {least:,}: streaming keeps {rows:,} samples of each process, a window "
            f"of {'its order' if len(orders) == 1 else 'the order of each shape'}, in memory; give --stage-bytes as "
            "much, or train with more processes, which share it"
        )
    return [_ration(each, given * each.least // least) for each in orders]


def _ration(each: Needs, given: int) -> Ration:
    flight = min(2 * each.range_bytes * AT_ONCE, given - each.arena)
    factor = min(_WINDOWS, (given - flight) / each.arena)
    units = tuple(int(count * factor) for count in each.units)
    return Ration(units=units, flight_bytes=flight, most_bytes=each.most_bytes)
