"""The encoders in the training loop, read like a cache: the baseline that a cache is measured against, and its proof.

The same samples in the same order go through the same preprocessing and the same encoders, in the recipe's batch shape.
Rows come out unrounded, in the dtype that the encoders compute in: with float32 rows in the cache both ways are equal
bit for bit on the CPU.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from kcache.cache import Cache
from kcache.digests import DigestMemo, content_key
from kcache.encoders import Encoder, load_encoder
from kcache.errors import CacheMismatchError, InputRejected, SourceError
from kcache.repositories import Repository, find_repository, weights_digest
from kcache.rows import Empty
from kcache.shards import OFFSETS
from kcache.sources import Source
from kcache.tables import decoder_components, prior_components

__all__ = ["OnlineEncoders"]


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
        self._positions = _positions(source, self._keys)
        tables = {cache.table_of(name) for name in fields}
        self._encoders = {table: _load(cache, table, device) for table in tables}
        self._decoders = ThreadPoolExecutor(num_workers or os.cpu_count() or 1, "kcache-decode")

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

    def read(
        self,
        samples: Sequence[int] | np.ndarray,
        fields: Sequence[str],
        caption: int | np.ndarray = 0,
        *,
        empty: Empty = np.empty,
    ) -> dict[str, torch.Tensor]:
        """Rows of `fields` for `samples`, named and shaped as `Cache.read` gives them, just encoded.

        The encoders make their own tensors, so `empty` is not called.
        """
        numbers = np.asarray(samples, np.int64).tolist()
        captions = np.broadcast_to(caption, len(numbers)).tolist()
        rows: dict[str, torch.Tensor] = {}
        for table in dict.fromkeys(self._cache.table_of(name) for name in fields):
            contents = self._contents(table, numbers, captions)
            encoded = _encode(self._encoders[table], contents, self._decoders)
            rows |= {name: value for name, value in encoded.items() if name in fields or name == OFFSETS}
        return rows

    def _contents(self, table: str, samples: list[int], captions: list[int]) -> list[Callable[[], bytes | str]]:
        if table == "text":
            return [lambda i=i, c=c: self._captions[i][c] for i, c in zip(samples, captions, strict=True)]  # type: ignore[misc]
        return [lambda i=i: self._image(i) for i in samples]  # type: ignore[misc]

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


def _load(cache: Cache, table: str, device: torch.device) -> Encoder:
    """The encoder that made `table`; raises CacheMismatchError when its weights are not the recipe's any more."""
    recipe = cache.recipes[table]
    decoder = None
    if table.startswith("latents-"):
        decoder = repository = _repository(cache, "decoder", decoder_components("decoder"))
        prior, component = repository, "movq"
    else:
        prior = repository = _repository(cache, "prior", prior_components("prior" if table == "text" else "decoder"))
        component = "text_encoder" if table == "text" else "image_encoder"
    with DigestMemo() as memo:
        found = weights_digest(repository, component, memo)
    if found != recipe.weights:
        raise CacheMismatchError(
            f"{component} in {repository.name} has weights {found[:12]}…; {table} of {cache.path} was made with "
            f"{recipe.weights[:12]}…; build the cache again, then train"
        )
    return load_encoder(recipe, prior, decoder, device)


def _repository(cache: Cache, role: str, components: Sequence[str]) -> Repository:
    model = cache.models[role]
    return find_repository(str(model["name"]), model["revision"], components)


def _encode(
    encoder: Encoder, contents: Sequence[Callable[[], bytes | str]], pool: ThreadPoolExecutor
) -> dict[str, torch.Tensor]:
    prepared: list[Any] = list(pool.map(lambda content: encoder.prepare(content()), contents))
    parts = [
        encoder.encode(prepared[start : start + encoder.batch_size])
        for start in range(0, len(prepared), encoder.batch_size)
    ]
    return {name: _joined(name, [part[name] for part in parts]) for name in parts[0]}


def _joined(name: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    if name != OFFSETS:
        # Rows as the cache has them: convolutions hand out channels-last tensors, and the layout decides rounding
        # later on.
        return torch.cat(list(parts)).contiguous()
    joined = [parts[0]]
    for part in parts[1:]:
        joined.append(part[1:] + joined[-1][-1])
    return torch.cat(joined)
