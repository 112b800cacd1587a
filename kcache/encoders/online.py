"""The encoders in the training loop, read like a cache: the baseline that a cache is measured against, and its proof.

The same samples in the same order go through the same preprocessing and the same encoders, in the recipe's batch shape.
An image that several encoders need is read and decoded once.
Rows come out unrounded, in the dtype that the encoders compute in: with float32 rows in the cache both ways are equal
bit for bit on the CPU.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from kcache.config.shapes import Shape
from kcache.disk.memo import DigestMemo
from kcache.encoders.decoding import Decoding
from kcache.encoders.frozen import Encoder, PictureEncoder, full_batches, load_encoder, shares_network
from kcache.encoders.pixels import ControlEncoder
from kcache.encoders.repositories import find_repository
from kcache.encoders.weights import weights_digest
from kcache.errors import CacheMismatchError, InputRejected, SourceError
from kcache.machine import threads_for
from kcache.sources import Source
from kcache.store.cache import Cache
from kcache.store.controls.given import ControlImage
from kcache.store.controls.packed import unpacked_rows
from kcache.store.digests import NO_CONTROL, content_key
from kcache.store.formats.sample_extras import Counts
from kcache.store.recipe import kind_of
from kcache.store.rows import Empty
from kcache.store.shards import OFFSETS


class OnlineEncoders:
    """Reads like `Cache`, but encodes what it is asked for; tensors are on the encoders' device."""

    def __init__(
        self,
        cache: Cache,
        source: Source,
        fields: Sequence[str],
        device: torch.device,
        *,
        num_workers: int | None = None,
    ) -> None:
        """Load the encoders behind `fields` and find the cache's samples in `source`.

        Raises SourceError when samples of the cache are not in the source, CacheMismatchError when the encoders
        changed.
        """
        self._cache = cache
        self._source = source
        self._keys: list[bytes] = cache.samples["image_key"].to_pylist()
        self._captions: list[list[str]] = cache.samples["captions"].to_pylist()
        self._control_keys: list[list[bytes]] = cache.samples["control_keys"].to_pylist()
        self._positions = _positions(source, self._keys)
        parts = cache.by_shape(*fields)
        self._encoders = _load_all(cache, {part.table_of(name) for part in parts for name in fields}, device)
        self._reserved: dict[str, dict[str, torch.Tensor]] = {}
        self._decoders = ThreadPoolExecutor(threads_for(num_workers), "kcache-decode")

    def __len__(self) -> int:
        return len(self._cache)

    @property
    def samples_digest(self) -> str:
        """sha256 (hex) of the samples and their order: the cache's."""
        return self._cache.samples_digest

    @property
    def caption_bounds(self) -> np.ndarray:
        """(N + 1,) int64: sample i has the captions caption_bounds[i] to caption_bounds[i + 1]."""
        return self._cache.caption_bounds

    @property
    def counts(self) -> Counts:
        """What the loss of each sample counts, and how often it comes in an epoch: as the cache says it."""
        return self._cache.counts

    @property
    def shape(self) -> Shape | None:
        """Height and width in pixels of the pictures behind all latents; None where they are not of one shape."""
        return self._cache.shape

    @property
    def resolution(self) -> int | None:
        """Pixels of the side of a square of the area of all latents; None where there are none, or several such."""
        return self._cache.resolution

    @property
    def flip(self) -> bool:
        """Whether the cache has rows of the mirrored pictures."""
        return self._cache.flip

    def by_shape(self, *fields: str) -> "tuple[OnlineEncoders, ...]":
        """The samples in parts in which all rows of `fields` have one shape, as `Cache.by_shape` gives them.

        The encoders, the source and what decodes its pictures are the same.
        """
        parts = self._cache.by_shape(*fields)
        return (self,) if parts == (self._cache,) else tuple(map(self._part, parts))

    def _part(self, cache: Cache) -> "OnlineEncoders":
        places = dict(zip(self._keys, self._positions, strict=True))
        part = copy(self)
        part._cache = cache
        part._keys = cache.samples["image_key"].to_pylist()
        part._captions = cache.samples["captions"].to_pylist()
        part._control_keys = cache.samples["control_keys"].to_pylist()
        part._positions = [places[key] for key in part._keys]
        return part

    def read(
        self,
        samples: Sequence[int] | np.ndarray,
        fields: Sequence[str],
        caption: int | np.ndarray = 0,
        *,
        drop_caption: np.ndarray | None = None,
        drop_image: np.ndarray | None = None,
        mirrored: np.ndarray | None = None,
        empty: Empty = np.empty,
    ) -> dict[str, torch.Tensor]:
        """Rows of `fields` for `samples`, named and shaped as `Cache.read` gives them, just encoded.

        The reserved inputs are encoded once. The encoders make their own tensors, so `empty` is not called.
        """
        numbers = np.asarray(samples, np.int64)
        captions = np.broadcast_to(caption, len(numbers))
        turned = [False] * len(numbers) if mirrored is None else mirrored.tolist()
        everything = np.ones(len(numbers), np.bool_)
        tables = dict.fromkeys(self._cache.table_of(name) for name in fields)
        masks = {table: kind_of(table).dropped(drop_caption, drop_image) for table in tables}
        kept = {table: everything if mask is None else ~mask for table, mask in masks.items()}
        prepared = list(self._decoders.map(
            lambda i: self._prepare(
                int(numbers[i]), int(captions[i]), [table for table in tables if kept[table][i]], mirrored=turned[i]
            ),
            range(len(numbers)),
        ))  # fmt: skip
        rows: dict[str, torch.Tensor] = {}
        for table in tables:
            if kind_of(table).per == "control":
                rows |= self._unpacked(table, [inputs[table] for inputs in prepared])
                continue
            encoded = self._encode(table, [inputs.get(table) for inputs in prepared])
            rows |= {name: value for name, value in encoded.items() if name in fields or name == OFFSETS}
        return rows

    def _prepare(self, sample: int, caption: int, tables: Sequence[str], *, mirrored: bool) -> dict[str, Any]:
        """What the encoders of `tables` take of a sample; its image is read, decoded and `mirrored` once."""
        prepared: dict[str, Any] = {}
        pictures: dict[Decoding, Image.Image] = {}
        content: bytes | None = None
        for table in tables:
            encoder = self._encoders[table]
            if isinstance(encoder, ControlEncoder):
                prepared[table] = self._control(encoder, sample, mirrored=mirrored)
                continue
            if not isinstance(encoder, PictureEncoder):
                prepared[table] = encoder.prepare(self._captions[sample][caption])
                continue
            if content is None:
                content = self._image(sample)
            if encoder.decoding not in pictures:
                picture = encoder.picture(content)
                pictures[encoder.decoding] = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else picture
            prepared[table] = encoder.pixels(pictures[encoder.decoding])
        return prepared

    def _control(self, encoder: ControlEncoder, sample: int, *, mirrored: bool) -> np.ndarray:
        """The row of a sample's control image, or of none."""
        name = kind_of(encoder.recipe.table).name
        key = self._control_keys[sample][self._cache.manifest.wants.controls.index(name)]
        if key == NO_CONTROL and (reserved := encoder.reserved()) is not None:
            return reserved
        content = self._source.control(self._positions[sample], name)
        if content_key(content) != key:
            found = self._source.name(self._positions[sample])
            raise SourceError(f"{name} of {found} changed since the cache was built; build the cache again, then train")
        return encoder.prepare(ControlImage(content, self._image(sample), mirrored))

    def _unpacked(self, table: str, rows: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        [name] = kind_of(table).fields
        bounds = np.cumsum([0, *map(len, rows)])
        return {name: torch.from_numpy(unpacked_rows(table, np.concatenate(rows), bounds))}

    def _encode(self, table: str, inputs: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Rows of prepared inputs, in their order; None stands for the reserved one."""
        encoder = self._encoders[table]
        places = np.zeros(len(inputs), np.int64)
        parts, rows = [], 0
        for batch in full_batches(encoder, ((i, given) for i, given in enumerate(inputs) if given is not None)):
            parts.append(encoder.encode([given for _, given in batch]))
            places[[i for i, _ in batch]] = range(rows, rows + len(batch))
            rows += len(batch)
        if rows < len(inputs):
            if table not in self._reserved:
                self._reserved[table] = encoder.encode([encoder.reserved()])
            parts.append(self._reserved[table])
            places[[i for i, given in enumerate(inputs) if given is None]] = rows
        encoded = _joined(parts)
        return encoded if (places == np.arange(len(inputs))).all() else self._take(encoded, places)

    def _take(self, rows: dict[str, torch.Tensor], positions: np.ndarray) -> dict[str, torch.Tensor]:
        """The rows at `positions` (n,), in that order."""
        offsets = rows.pop(OFFSETS, None)
        taken = {}
        for name, values in rows.items():
            if offsets is not None and self._cache.field(name).ragged:
                runs = values.split(offsets.diff().tolist())
                taken[name] = torch.cat([runs[position] for position in positions.tolist()])
            else:
                taken[name] = values[positions]
        if offsets is not None:
            taken[OFFSETS] = functional.pad(offsets.diff()[positions].cumsum(0), (1, 0))
        return taken

    def _image(self, sample: int) -> bytes:
        content = self._source.image(self._positions[sample])
        if content_key(content) != self._keys[sample]:
            name = self._source.name(self._positions[sample])
            raise SourceError(f"{name} changed since the cache was built; build the cache again, then train")
        return content


def _positions(source: Source, keys: Sequence[bytes]) -> list[int]:
    """Where in the source each key's image stands."""
    found: dict[bytes, int] = {}
    with DigestMemo() as memo:
        for i in range(len(source)):
            try:
                found.setdefault(source.image_key(i, memo, False), i)
            except InputRejected:
                continue  # not in the cache either; a sample that should be is reported below
    missing = sum(key not in found for key in keys)
    if missing:
        raise SourceError(
            f"{source.description}: {missing} of the cache's {len(keys)} samples are not in it; "
            "give the source that the cache was built from, or build the cache again"
        )
    return [found[key] for key in keys]


def _load_all(cache: Cache, tables: set[str], device: torch.device) -> dict[str, Encoder]:
    """The encoder of each table; those of pictures of several shapes share a network."""
    encoders: dict[str, Encoder] = {}
    for table in sorted(tables):
        recipe = cache.recipes[table]
        held = next((each for each in encoders.values() if shares_network(each, recipe)), None)
        encoders[table] = _load(cache, table, device, held)
    return encoders


def _load(cache: Cache, table: str, device: torch.device, held: Encoder | None) -> Encoder:
    """The encoder that made `table`; raises CacheMismatchError when its weights are not the recipe's any more."""
    recipe, kind = cache.recipes[table], kind_of(table)
    if kind.per == "control":
        return ControlEncoder(recipe)
    model = cache.models[kind.role]
    repository = find_repository(str(model["name"]), model["revision"], (kind.component, *kind.with_it))
    with DigestMemo() as memo:
        found = weights_digest(repository, kind.component, memo, known=recipe.weights)
    if found != recipe.weights:
        raise CacheMismatchError(
            f"{kind.component} in {repository.name} has weights {found[:12]}…; {table} of {cache.path} was made with "
            f"{recipe.weights[:12]}…; build the cache again, then train"
        )
    return load_encoder(recipe, repository, device, held=held)


def _joined(parts: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The rows of several encoded batches as those of one."""
    # Rows as the cache has them: convolutions hand out channels-last tensors, and the layout decides rounding later on.
    rows = {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0] if name != OFFSETS}
    if OFFSETS in parts[0]:
        lengths = torch.cat([part[OFFSETS].diff() for part in parts])
        rows[OFFSETS] = functional.pad(lengths.cumsum(0), (1, 0))
    return rows
