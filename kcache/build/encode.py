"""Encoding planned shards: decode, encode and write at the same time, results in plan order.

A pool of threads decodes inputs ahead, this thread runs the encoder on full batches, and one more thread writes the
shard before. Batches never cross a shard's border, so a shard's bytes do not depend on which shards were encoded
before it. Inputs are taken in plan order, and their rows stored in it, whatever batches they were encoded in.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
from PIL import Image

from kcache.build.pictures.contents import Fetch, MirrorImage
from kcache.build.plan import PlannedShard
from kcache.build.work.meter import Input, Meter
from kcache.build.work.refusals import refusal_reasons
from kcache.encoders.frozen import Encoder, PictureEncoder, full_batches
from kcache.encoders.pretrained import provenance
from kcache.errors import InputRejected
from kcache.places import Place
from kcache.store.digests import mirrored_key, pack_keys
from kcache.store.formats.side_files import size_rows
from kcache.store.recipe import Recipe, kind_of
from kcache.store.shards import OFFSETS, Commit, Rejection, RowBlock, commit_shard

_Kept = Callable[[PlannedShard], bool]
"""Whether a shard is still this builder's to commit."""
Takes = Callable[[int, int], bool]
"""Whether a picture of this width and height has a row in the table."""


@dataclass
class _OpenShard:
    """The rows of the shard that is being filled, as they were encoded."""

    planned: PlannedShard
    numbers: list[int] = field(default_factory=list)
    """Where in the plan of the shard each row stands."""
    parts: dict[str, list[np.ndarray]] = field(default_factory=dict)
    lengths: list[np.ndarray] = field(default_factory=list)
    sizes: dict[bytes, tuple[int, int]] = field(default_factory=dict)
    """Of each picture, by its key: width and height as decoded."""
    rejected: list[Rejection] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    def block(self, recipe: Recipe) -> RowBlock:
        """The rows, in plan order."""
        order = np.argsort(self.numbers)
        keys = [self.planned.keys[i] for i in sorted(self.numbers)]
        if not keys:
            return RowBlock(keys=pack_keys(keys), arrays={})
        arrays = {f.name: np.concatenate(self.parts[f.name]) for f in recipe.fields}
        lengths = np.concatenate(self.lengths) if self.lengths else np.ones(len(order), np.int64)
        if (np.diff(order) < 0).any():
            tokens = _runs(lengths, order)
            arrays = {f.name: arrays[f.name][tokens if f.ragged else order] for f in recipe.fields}
        offsets = np.concatenate([[0], np.cumsum(lengths[order])]).astype(np.int64)
        return RowBlock(
            keys=pack_keys(keys),
            arrays=arrays,
            offsets=offsets if self.lengths else None,
            sizes=size_rows(keys, self.sizes) if self.sizes else None,
        )


def _runs(lengths: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Where the tokens of rows with these lengths stand, the rows taken in `order`."""
    starts, taken = np.cumsum(lengths) - lengths, lengths[order]
    return np.repeat(starts[order] - (np.cumsum(taken) - taken), taken) + np.arange(taken.sum())


def encode_shards(
    encoder: Encoder,
    folder: Place,
    shards: Iterator[PlannedShard],
    fetching: Callable[[Sequence[bytes]], Fetch],
    *,
    workers: int,
    meter: Meter,
    done: Callable[[int], None],
    kept: _Kept = lambda _: True,
    committed: Callable[[Commit], None] = lambda _: None,
    takes: Takes = lambda _, __: True,
) -> None:
    """Encode and commit `shards` of the table in `folder`; each is asked for when its inputs are to be decoded.

    `fetching` is called with each shard's keys, in this thread, and gives what fetches the content of one. `done` is
    told of inputs dealt with since, `committed` of each shard. What `kept` denies is not committed; a picture of which
    `takes` says, once it is decoded, that it belongs into another table is as one that is gone.
    """
    recipe = encoder.recipe
    write = partial(commit_shard, folder, recipe=recipe, provenance=provenance(encoder.device))
    with ThreadPoolExecutor(workers, "kcache-decode") as pool, ThreadPoolExecutor(1, "kcache-write") as writer:
        ahead: deque[_Planned] = deque()
        prepare = partial(_prepare, encoder, takes, meter.clock)
        inputs = _started(pool, prepare, shards, fetching, ahead, limit=workers + 2 * encoder.batch_size)
        committing: Future[Any] | None = None
        try:
            for shard, group in groupby(inputs, key=itemgetter(0)):
                rows = _OpenShard(shard)
                prepared = _decoded(rows, (future for _, future in group), ahead, encoder.batch_size, meter, done)
                _encode_shard(encoder, prepared, rows, meter, done, committing)
                if committing is not None:
                    meter.timed("write", committing.result)
                committing = writer.submit(_commit, rows, recipe, write, kept, committed)
            if committing is not None:
                meter.timed("write", committing.result)
        finally:
            pool.shutdown(cancel_futures=True)


def _commit(
    rows: _OpenShard, recipe: Recipe, write: Callable[..., Commit], kept: _Kept, committed: Callable[[Commit], None]
) -> None:
    block = rows.block(recipe)
    if kept(rows.planned):  # asked last: this process may have been suspended for long
        committed(write(rows.planned.name, block=block, rejected=rows.rejected, absent=rows.absent))


_Planned = tuple[PlannedShard, Future[Input]]


def _started(
    pool: ThreadPoolExecutor,
    prepare: Callable[[Fetch, bytes], Input],
    shards: Iterator[PlannedShard],
    fetching: Callable[[Sequence[bytes]], Fetch],
    ahead: deque[_Planned],
    limit: int,
) -> Iterator[_Planned]:
    """Each planned input once its decoding has begun, in plan order; the next ones, up to `limit`, are in `ahead`."""
    for shard in shards:
        fetch = fetching(shard.keys)
        for key in shard.keys:
            ahead.append((shard, pool.submit(prepare, fetch, key)))
            if len(ahead) > limit:
                yield ahead.popleft()
    while ahead:
        yield ahead.popleft()


def _prepare(encoder: Encoder, takes: Takes, clock: Callable[[], float], fetch: Fetch, key: bytes) -> Input:
    prepared, size, rejection, absent = None, None, None, False
    try:
        reserved = kind_of(encoder.recipe.table).reserved
        if reserved is not None and key in (reserved, mirrored_key(reserved)):
            prepared = encoder.reserved()
        elif (content := fetch(key)) is None:
            absent = True
        elif isinstance(encoder, PictureEncoder) and isinstance(content, bytes):
            picture = encoder.picture(content)
            if isinstance(content, MirrorImage):
                picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            if not takes(*picture.size):
                return Input(key, absent=True, ready=clock())
            prepared, size = encoder.pixels(picture), picture.size
        else:
            prepared = encoder.prepare(content)
    except InputRejected as error:
        rejection = Rejection(key=key.hex(), stage=error.stage, reason=error.reason)
    return Input(key, prepared, size, rejection, absent, ready=clock())


def _decoded(
    rows: _OpenShard,
    inputs: Iterator[Future[Input]],
    ahead: Iterable[_Planned],
    batch_size: int,
    meter: Meter,
    done: Callable[[int], None],
) -> Iterator[tuple[int, Any]]:
    """Each input of a shard that can be encoded, with its number; why others cannot be is noted in `rows`."""
    given = 0
    for number, future in enumerate(inputs):
        behind = (other for shard, other in ahead if shard is rows.planned)
        item = meter.decoded(future, behind, lacking=batch_size - given % batch_size)
        if item.rejection is None and not item.absent:
            given += 1
            if item.size is not None:
                rows.sizes[item.key] = item.size
            yield number, item.prepared
            continue
        if item.rejection is not None:
            rows.rejected.append(item.rejection)
        else:
            rows.absent.append(item.key.hex())
        done(1)


def _encode_shard(
    encoder: Encoder,
    prepared: Iterator[tuple[int, Any]],
    rows: _OpenShard,
    meter: Meter,
    done: Callable[[int], None],
    committing: Future[Any] | None,
) -> None:
    """Fill `rows`; stops as soon as it turns out that the shard before, `committing`, cannot be written."""
    for batch in full_batches(encoder, prepared):
        meter.timed("encode", partial(_encode_batch, encoder, batch, rows))
        if committing is not None and committing.done():
            committing.result()
        done(len(batch))


def _encode_batch(encoder: Encoder, batch: Sequence[tuple[int, Any]], rows: _OpenShard) -> None:
    encoded = encoder.encode([prepared for _, prepared in batch])
    offsets = encoded[OFFSETS].cpu().numpy() if OFFSETS in encoded else None
    values = {f.name: encoded[f.name].float().cpu().numpy() for f in encoder.recipe.fields}
    with np.errstate(over="ignore"):  # what overflows is found as an infinity below, and named
        stored = {name: array.astype(encoder.recipe.stored_dtype) for name, array in values.items()}
    reasons = refusal_reasons(encoder.recipe, values, stored, offsets)
    kept = np.array([reason is None for reason in reasons])
    for (number, _), reason in zip(batch, reasons, strict=True):
        if reason is None:
            rows.numbers.append(number)
        else:
            rows.rejected.append(Rejection(key=rows.planned.keys[number].hex(), stage="encode", reason=reason))
    lengths = None if offsets is None else np.diff(offsets)
    for f in encoder.recipe.fields:
        chosen = np.repeat(kept, lengths) if f.ragged and lengths is not None else kept
        rows.parts.setdefault(f.name, []).append(stored[f.name][chosen])
    if lengths is not None:
        rows.lengths.append(lengths[kept])
