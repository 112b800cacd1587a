"""The parts of a cache whose samples can share a batch: the order of each, and where its rows wait until then."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch

from kcache.errors import ConfigError
from kcache.loader.chance import draw_choice, draw_dropout, draw_flip
from kcache.loader.course import Course, Share, repeats_of
from kcache.loader.residency import DeviceTables
from kcache.loader.schedule import batches_of
from kcache.loader.streaming.beside import Streamed, make_stages
from kcache.loader.streaming.stage import Arrival, Stage, Wishes
from kcache.loader.streaming.streamed import StreamShape, stream_shapes
from kcache.machine import free_memory
from kcache.store.cache import Cache
from kcache.store.formats.sample_extras import Counts
from kcache.store.rows import Empty

_MUCH = 256 << 20
"""Bytes of an index that are read in less than half a second of most disks."""


class RowReader(Protocol):
    """What the loader reads from: a cache, or the encoders themselves."""

    @property
    def samples_digest(self) -> str: ...

    @property
    def caption_bounds(self) -> np.ndarray: ...

    @property
    def counts(self) -> Counts: ...

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


@runtime_checkable
class ShapedReader(RowReader, Protocol):
    """One whose samples may have several shapes, and mirrored pictures, which `read` gives those `mirrored` (B,) of."""

    @property
    def shape(self) -> tuple[int, int] | None: ...

    @property
    def resolution(self) -> int | None: ...

    @property
    def flip(self) -> bool: ...

    def by_shape(self, *fields: str) -> "Sequence[ShapedReader]": ...


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
        weights: np.ndarray | None = None,
    ) -> None:
        """`batch` is how many samples one process takes at a time; `shape` may be None where there is a single part.

        With `weights` (N,) each batch has the `weight` (B,) of its samples.
        """
        self.rows = rows
        self.shape = shape
        """Height and width of the pictures, in pixels."""
        self.batch = batch
        self.course = course
        self.fields = fields
        self._seed = seed
        self._dropouts = dropouts
        self._weights = weights
        self._tables: DeviceTables | None = None
        self._packed: Sequence[str] = ()
        self.new_stage: Callable[..., Stage] | None = None
        """What makes a stage, where rows are streamed."""

    @property
    def is_weighted(self) -> bool:
        """Whether batches have the weights of their samples."""
        return self._weights is not None

    def settle(self, residency: str, device: torch.device, *, stays: bool) -> None:
        """Have rows of a cache where `residency` says; those of encoders are nowhere."""
        if not isinstance(self.rows, Cache):
            return
        if residency == "gpu":
            # What is packed is unpacked here, and then sent.
            self._packed = [name for name in self.fields if self.rows.is_packed(name)]
            self.rows.make_resident(self._packed)
            self._tables = DeviceTables(self.rows, [name for name in self.fields if name not in self._packed], device)
        elif residency == "ram":
            self.rows.make_resident(self.fields)
        elif residency == "mmap":
            self.rows.make_mapped(self.fields, stays=stays)

    def stage(self, shares: Iterator[Share]) -> Stage | None:
        """The stage that rows of `shares` come over, where they are streamed."""
        if self.new_stage is None:
            return None
        windows, in_parts = self.course.windows(shares), 0
        if isinstance(self.rows, Cache) and self.rows.unread_bytes(self.fields) > _MUCH:
            windows, in_parts = self.course.growing(windows, self.batch), self.course.shape.window_rows
        return self.new_stage(map(self._chosen, windows), in_parts)

    def arrays(
        self, share: Share, stage: Stage | None, used: int, empty: Empty
    ) -> tuple[dict[str, Any], Arrival | None]:
        """What a batch of `share` has of each field; out of a stage, what comes after the first `used` samples."""
        arrays, arrival = self._rows(share, stage, used, empty)
        if self._weights is not None:
            arrays["weight"] = self._weights[self.course.samples(share.places)]
        return arrays, arrival

    def _rows(
        self, share: Share, stage: Stage | None, used: int, empty: Empty
    ) -> tuple[dict[str, Any], Arrival | None]:
        if stage is not None:
            return stage.take(used, len(share), empty)
        samples, captions, dropped = self._chosen(share)
        if self._tables is not None:
            numbers = dict(self._tables.numbers(samples, captions, **dropped))
            return numbers | dict(self.rows.read(samples, self._packed, captions, **dropped, empty=empty)), None
        return dict(self.rows.read(samples, self.fields, captions, **dropped, empty=empty)), None

    def on_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch with its rows, where what came to the device were only their numbers."""
        return batch if self._tables is None else self._tables.take(batch)

    def _chosen(self, share: Share) -> Wishes:
        """The samples of `share`, the number of the caption that each takes, and which of them go without what."""
        samples, bounds = self.course.samples(share.places), self.rows.caption_bounds
        captions = draw_choice(self._seed, share.turns, bounds[samples + 1] - bounds[samples])
        dropped = {f"drop_{name}": draw_dropout(self._seed, share.turns, name, p) for name, p in self._dropouts.items()}
        if isinstance(self.rows, ShapedReader) and self.rows.flip:
            dropped["mirrored"] = draw_flip(self._seed, share.turns)
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
    parts: Sequence[RowReader] = rows.by_shape(*fields) if isinstance(rows, ShapedReader) else (rows,)
    if not parts:
        raise ConfigError("no sample of the cache has rows at these resolutions; expected one at least; see cache-info")
    told = [(part.shape, part.resolution) if isinstance(part, ShapedReader) else (None, None) for part in parts]
    shapes, batches, weights = [shape for shape, _ in told], batches_of(batch_size, told), _weights_of(parts)
    repeats = [repeats_of(part.counts.repeats) for part in parts]
    places = [len(part) if more is None else len(more) for part, more in zip(parts, repeats, strict=True)]
    streams = stream_shapes(places) if stream is None else [stream] * len(parts)
    # By its shape, not its place in a list, which what else there is would change.
    numbers = [shape[0] << 16 | shape[1] if shape and len(parts) > 1 else 0 for shape in shapes]
    courses = [
        Course(len(part), seed, shuffle, window, number, more)
        for part, window, number, more in zip(parts, streams, numbers, repeats, strict=True)
    ]
    return [
        Part(part, fields, batch, course, seed, dropouts, shape, weight)
        for part, batch, course, shape, weight in zip(parts, batches, courses, shapes, weights, strict=True)
    ]


def _weights_of(parts: Sequence[RowReader]) -> Sequence[np.ndarray | None]:
    """The weights of the samples of each part; None of all where all are 1, and batches need none."""
    weights = [part.counts.weights for part in parts]
    return weights if any(found is not None and (found[:] != 1).any() for found in weights) else [None] * len(parts)


def prepare(
    parts: Sequence[Part], residency: str, device: torch.device, world_size: int, stage_bytes: int | None
) -> None:
    """Have the rows of all `parts` where `residency` says, in memory that all of them share."""
    size = sum(part.rows.resident_bytes(part.fields) for part in parts if isinstance(part.rows, Cache))
    for part in parts:
        part.settle(residency, device, stays=size <= free_memory())
    if residency == "stream":
        orders = [
            Streamed(cast("Cache", part.rows), part.fields, part.course.shape, part.batch, len(part.course))
            for part in parts
        ]
        for part, new_stage in zip(parts, make_stages(orders, world_size, stage_bytes), strict=True):
            part.new_stage = new_stage
