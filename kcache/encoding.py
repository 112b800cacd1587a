"""Encoding planned shards: decode, encode and write at the same time, results in plan order.

A pool of threads decodes inputs ahead, this thread runs the encoder on full batches, and one more thread writes the
shard before. Batches never cross a shard's border, so a shard's bytes do not depend on which shards were encoded
before it.
"""

import platform
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kcache.digests import ZERO_IMAGE_KEY
from kcache.encoders import Encoder
from kcache.errors import ConfigError, InputRejected
from kcache.plan import PlannedShard
from kcache.recipe import Recipe
from kcache.shards import OFFSETS, Rejection, RowBlock, commit_shard

__all__ = ["Meter", "encode_shards", "provenance", "refusal_reasons"]

Fetch = Callable[[bytes], bytes | str | None]
"""The content behind a key, None when the source no longer has it; may raise InputRejected."""

STAGES = ("decode", "encode", "write")


@dataclass
class Meter:
    """Where the encoding thread's time goes: waiting for decoded inputs, encoding, or waiting for the writer."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    def shares(self) -> dict[str, float]:
        """Share of the time, 0 to 1, by stage; the largest is the one that binds."""
        total = sum(self.seconds.values())
        return {stage: seconds / total if total else 0.0 for stage, seconds in self.seconds.items()}

    def timed(self, stage: str, work: Callable[[], Any]) -> Any:
        """The result of `work`, its time counted under `stage`."""
        start = time.perf_counter()
        try:
            return work()
        finally:
            self.seconds[stage] += time.perf_counter() - start


@dataclass(frozen=True, slots=True)
class _Input:
    """One planned input after decoding: prepared, or rejected, or gone from the source."""

    key: bytes
    prepared: Any = None
    rejection: Rejection | None = None
    absent: bool = False


@dataclass
class _OpenShard:
    """The rows of the shard that is being filled."""

    keys: list[bytes] = field(default_factory=list)
    parts: dict[str, list[np.ndarray]] = field(default_factory=dict)
    lengths: list[np.ndarray] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    def block(self, recipe: Recipe) -> RowBlock:
        keys = np.frombuffer(b"".join(self.keys), np.uint8).reshape(-1, 16)
        if not self.keys:
            return RowBlock(keys=keys, arrays={})
        arrays = {f.name: np.concatenate(self.parts[f.name]) for f in recipe.fields}
        if not self.lengths:
            return RowBlock(keys=keys, arrays=arrays)
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(self.lengths))]).astype(np.int64)
        return RowBlock(keys=keys, arrays=arrays, offsets=offsets)


def encode_shards(
    encoder: Encoder,
    folder: Path,
    shards: Iterator[PlannedShard],
    fetch: Fetch,
    *,
    workers: int,
    meter: Meter,
    done: Callable[[int], None],
) -> None:
    """Encode and commit `shards` of the table in `folder`; each is asked for when its inputs are to be decoded.

    `done` is called with the number of inputs dealt with since the last call.
    """
    recipe = encoder.recipe
    made_by = provenance(encoder)
    with ThreadPoolExecutor(workers, "kcache-decode") as pool, ThreadPoolExecutor(1, "kcache-write") as writer:
        inputs = _prepared(pool, encoder, shards, fetch, ahead=workers + 2 * encoder.batch_size)
        committing: Future[Any] | None = None
        try:
            for shard, group in groupby(inputs, key=itemgetter(0)):
                decoded = (future for _, future in group)
                rows = _encode_shard(encoder, shard, decoded, meter, done, committing)
                if committing is not None:
                    meter.timed("write", committing.result)
                committing = writer.submit(
                    commit_shard, folder, shard.name, recipe, rows.block(recipe),
                    rejected=rows.rejected, absent=rows.absent, provenance=made_by,
                )  # fmt: skip
            if committing is not None:
                meter.timed("write", committing.result)
        finally:
            pool.shutdown(cancel_futures=True)


def _prepared(
    pool: ThreadPoolExecutor, encoder: Encoder, shards: Iterator[PlannedShard], fetch: Fetch, ahead: int
) -> Iterator[tuple[PlannedShard, Future[_Input]]]:
    """A future per planned input with the shard it is of, in plan order, at most `ahead` of them under way."""
    under_way: deque[tuple[PlannedShard, Future[_Input]]] = deque()
    for shard in shards:
        for key in shard.keys:
            under_way.append((shard, pool.submit(_prepare, encoder, key, fetch)))
            if len(under_way) > ahead:
                yield under_way.popleft()
    yield from under_way


def _prepare(encoder: Encoder, key: bytes, fetch: Fetch) -> _Input:
    try:
        if key == ZERO_IMAGE_KEY:
            return _Input(key, prepared=encoder.reserved())
        content = fetch(key)
        return _Input(key, absent=True) if content is None else _Input(key, prepared=encoder.prepare(content))
    except InputRejected as error:
        return _Input(key, rejection=Rejection(key=key.hex(), stage=error.stage, reason=error.reason))


def _encode_shard(
    encoder: Encoder,
    shard: PlannedShard,
    inputs: Iterator[Future[_Input]],
    meter: Meter,
    done: Callable[[int], None],
    committing: Future[Any] | None,
) -> _OpenShard:
    """The rows of `shard`; stops as soon as it turns out that the shard before, `committing`, cannot be written."""
    rows = _OpenShard()
    batch: list[_Input] = []
    for position in range(len(shard.keys)):
        item: _Input = meter.timed("decode", next(inputs).result)
        if item.rejection is not None:
            rows.rejected.append(item.rejection)
        elif item.absent:
            rows.absent.append(item.key.hex())
        else:
            batch.append(item)
        if batch and (len(batch) == encoder.batch_size or position == len(shard.keys) - 1):
            meter.timed("encode", partial(_encode_batch, encoder, batch, rows))
            batch = []
            if committing is not None and committing.done():
                committing.result()
        done(1)
    return rows


def _encode_batch(encoder: Encoder, batch: Sequence[_Input], rows: _OpenShard) -> None:
    try:
        encoded = encoder.encode([item.prepared for item in batch])
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"{encoder.recipe.encoder} ran out of device memory on batches of {encoder.batch_size} ({error}); "
            "build with a smaller --batch-size (it is part of the recipe, so the table is encoded anew)"
        ) from error
    offsets = encoded[OFFSETS].cpu().numpy() if OFFSETS in encoded else None
    values = {f.name: encoded[f.name].float().cpu().numpy() for f in encoder.recipe.fields}
    stored = {name: _cast(array, encoder.recipe.stored_dtype) for name, array in values.items()}
    reasons = refusal_reasons(encoder.recipe, values, stored, offsets)
    kept = np.array([reason is None for reason in reasons])
    for item, reason in zip(batch, reasons, strict=True):
        if reason is None:
            rows.keys.append(item.key)
        else:
            rows.rejected.append(Rejection(key=item.key.hex(), stage="encode", reason=reason))
    lengths = None if offsets is None else np.diff(offsets)
    for f in encoder.recipe.fields:
        chosen = np.repeat(kept, lengths) if f.ragged and lengths is not None else kept
        rows.parts.setdefault(f.name, []).append(stored[f.name][chosen])
    if lengths is not None:
        rows.lengths.append(lengths[kept])


def _cast(array: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # what overflows is found as an infinity below, and named
        return array.astype(dtype)


def refusal_reasons(
    recipe: Recipe, values: Mapping[str, np.ndarray], stored: Mapping[str, np.ndarray], offsets: np.ndarray | None
) -> list[str | None]:
    """Why each row cannot be stored, None where it can: NaN or infinity from the encoder, or beyond the stored dtype.

    `values` are the encoder's results in float32, `stored` the same in the stored dtype; `offsets` bound ragged rows.
    """
    rows = len(next(iter(values.values()))) if offsets is None else len(offsets) - 1
    reasons: list[str | None] = [None] * rows
    for f in recipe.fields:
        bounds = offsets if f.ragged and offsets is not None else np.arange(rows + 1)
        bad = ~np.isfinite(stored[f.name]).reshape(len(stored[f.name]), -1).all(axis=1)
        for unit in np.flatnonzero(bad).tolist():
            row = int(np.searchsorted(bounds, unit, side="right")) - 1
            if np.isfinite(values[f.name][unit]).all():
                largest = float(np.abs(values[f.name][unit]).max())
                reasons[row] = (
                    f"{f.name} holds {largest:g}, more than {recipe.stored_dtype} can; build with --dtype float32"
                )
            else:
                reasons[row] = f"{f.name} came out of {recipe.encoder} as NaN or infinity, in float32 too"
    return reasons


def provenance(encoder: Encoder) -> dict[str, str]:
    """What the rows were made with: recorded in each commit, shown, never compared."""
    packages = {name: version(name) for name in ("kcache", "torch", "diffusers", "transformers", "pillow", "numpy")}
    device = torch.device(getattr(encoder, "device", "cpu"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"
    return {**packages, "python": platform.python_version(), "device": name}
