"""Orders that are streamed side by side, one of each shape: a stage for each, in memory that all of them share."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from kcache.loader.streaming.fetches import Layout
from kcache.loader.streaming.ration import needs, rations
from kcache.loader.streaming.stage import Stage
from kcache.loader.streaming.streamed import StreamShape
from kcache.store.cache import Cache


class Streamed(NamedTuple):
    """The rows of one order that are streamed."""

    cache: Cache
    fields: Sequence[str]
    shape: StreamShape
    batch_size: int
    places: int
    """Of an epoch: one for each turn of a sample."""


def make_stages(orders: Sequence[Streamed], world_size: int, asked: int | None) -> "list[Callable[..., Stage]]":
    """What makes a stage for a pass over wishes of each order, in the memory that `rations` gives.

    Raises its ConfigError. Processes share out the windows of a single order.
    """
    sharers = world_size if len(orders) == 1 else 1
    layouts = [Layout(each.cache, each.fields, each.shape) for each in orders]
    needed = [
        needs(layout, each.shape, each.places, each.batch_size, sharers)
        for layout, each in zip(layouts, orders, strict=True)
    ]
    return [
        partial(Stage, each.cache, layout, given, each.batch_size)
        for each, layout, given in zip(orders, layouts, rations(needed, world_size, asked), strict=True)
    ]
