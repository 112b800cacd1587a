"""The parts of a cache whose samples can share a batch: the order of each, and where its rows wait until then."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from kcache.loader.chance import draw_choice, draw_dropout
from kcache.loader.course import Course, Share
from kcache.loader.residency import DeviceTables
from kcache.loader.streaming.stage import Arrival, Stage, Wishes, make_stages
from kcache.loader.streaming.streamed import StreamShape
from kcache.machine import free_memory
from kcache.store.cache import Cache
from kcache.store.rows import Empty


class RowReader(Protocol):
    """What the loader reads from: a cache, or the encoders themselves."""

    @property
    def samples_digest(self) -> str: ...

    @property
    def caption_bounds(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def read(
        self,
        samples: np.ndarray,
        fields: Sequence[str],
        caption: np.ndarray,
        *,
        drop_caption: np.ndarray,
        drop_image: np.ndarray,
        empty: Empty,
    ) -> Mapping[str, Any]: ...


class Part:
    """Samples of one shape, those of `rows`: all of a cache that has no other."""

    def __init__(
        self,
        rows: RowReader,
        fields: Sequence[str],
        batch: int,
        course: Course,
        seed: int,
        dropouts: Mapping[str, float],
        shape: tuple[int, int] | None = None,
    ) -> None:
        """`batch` is how many samples one process takes at a time; `shape` may be None where there is a single part."""
        self.rows = rows
        self.shape = shape
        """Height and width of the pictures, in pixels."""
        self.batch = batch
        self.course = course
        self._fields = fields
        self._seed = seed
        self._dropouts = dropouts
        self._tables: DeviceTables | None = None
        self._new_stage: Callable[[Iterator[Wishes]], Stage] | None = None

    def settle(self, residency: str, device: torch.device, world_size: int, stage_bytes: int | None) -> None:
        """Have rows of a cache where `residency` says; those of encoders are nowhere."""
        if not isinstance(self.rows, Cache):
            return
        if residency == "gpu":
            self._tables = DeviceTables(self.rows, self._fields, device)
        elif residency == "ram":
            self.rows.make_resident(self._fields)
        elif residency == "stream":
            shape = self.course.shape
            self._new_stage = make_stages(self.rows, self._fields, shape, self.batch, world_size, stage_bytes)
        else:
            self.rows.make_mapped(self._fields, stays=self.rows.resident_bytes(self._fields) <= free_memory())

    def stage(self, shares: Iterator[Share]) -> Stage | None:
        """The stage that rows of `shares` come over, where they are streamed."""
        return None if self._new_stage is None else self._new_stage(map(self._chosen, self.course.windows(shares)))

    def arrays(
        self, share: Share, stage: Stage | None, used: int, empty: Empty
    ) -> tuple[dict[str, Any], Arrival | None]:
        """What a batch of `share` has of each field; out of a stage, what comes after the first `used` samples."""
        if stage is not None:
            return stage.take(used, len(share), empty)
        samples, captions, dropped = self._chosen(share)
        if self._tables is not None:
            return dict(self._tables.numbers(samples, captions, **dropped)), None
        return dict(self.rows.read(samples, self._fields, captions, **dropped, empty=empty)), None

    def on_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch with its rows, where what came to the device were only their numbers."""
        return batch if self._tables is None else self._tables.take(batch)

    def _chosen(self, share: Share) -> Wishes:
        """The samples of `share`, the number of the caption that each takes, and which of them go without what."""
        samples, bounds = self.course.samples(share.places), self.rows.caption_bounds
        captions = draw_choice(self._seed, share.turns, bounds[samples + 1] - bounds[samples])
        dropped = {f"drop_{name}": draw_dropout(self._seed, share.turns, name, p) for name, p in self._dropouts.items()}
        return samples, captions, dropped


def parts_of(
    rows: RowReader,
    fields: Sequence[str],
    batch_size: int,
    *,
    seed: int,
    shuffle: str,
    stream: StreamShape | None,
    dropouts: Mapping[str, float],
) -> list[Part]:
    """The parts of `rows` that batches of `fields` are made of; raises ConfigError for a shuffle that is none."""
    return [Part(rows, fields, batch_size, Course(len(rows), seed, shuffle, stream), seed, dropouts)]
