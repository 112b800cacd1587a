"""Where rows wait until a batch takes them: whole tables on the device or in memory, mapped files, or a stage."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kcache.errors import ConfigError
from kcache.loader.copies import copied
from kcache.machine import free_memory
from kcache.store.cache import Cache
from kcache.store.rows import token_numbers, unit_bytes
from kcache.store.shards import OFFSETS

_UPLOAD_ROWS = 1024
"""Rows that go to the device at a time: 75 MB of latents at 768 pixels, all the memory that an upload takes here."""


class DeviceTables:
    """Whole tables of a cache on a device, uploaded once, verified; each batch is gathered there.

    A batch then costs the host only the numbers of its rows, eight bytes each.
    """

    def __init__(self, cache: Cache, fields: Sequence[str], device: torch.device) -> None:
        self._cache = cache
        self._rows: dict[str, torch.Tensor] = {}
        self._bounds: dict[str, np.ndarray] = {}
        for name in fields:
            self._rows[name], bounds = _upload(cache, name, device)
            if cache.field(name).ragged:
                self._bounds[name] = bounds

    def numbers(self, samples: np.ndarray, captions: np.ndarray, **dropped: np.ndarray) -> dict[str, np.ndarray]:
        """What `take` needs to gather the rows that `Cache.read` gives for the same arguments, int64.

        Per fixed field (B,) numbers of rows; per ragged one (T,) numbers of tokens, and `text_offsets` (B + 1,).
        """
        numbers = self._cache.positions(samples, list(self._rows), captions, **dropped)
        for name, bounds in self._bounds.items():
            numbers[name], numbers[OFFSETS] = token_numbers(bounds, numbers[name])
        return numbers

    def take(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch with its rows (B, …) or (T, …) in place of their numbers; what are no rows' stays as it is."""
        return {
            name: self._rows[name].index_select(0, value) if name in self._rows else value
            for name, value in batch.items()
        }


def _upload(cache: Cache, name: str, device: torch.device) -> tuple[torch.Tensor, np.ndarray]:
    """All rows of a field's table on the device, and where each of them starts among the tokens, (n + 1,) int64."""
    field, dtype = cache.field(name), cache.dtype(name)
    length = cache.resident_bytes([name]) // unit_bytes(field, dtype)
    table = torch.empty((length, *field.shape), dtype=torch.from_numpy(np.empty(0, dtype)).dtype, device=device)
    bounds, filled = [np.zeros(1, np.int64)], 0
    for first in range(0, cache.table_length(name), _UPLOAD_ROWS):
        rows, offsets = cache.table_rows(name, first, first + _UPLOAD_ROWS)
        table[filled : filled + len(rows)] = torch.from_numpy(rows)
        bounds.append(filled + (np.arange(len(rows) + 1) if offsets is None else offsets)[1:])
        filled += len(rows)
    return table, np.concatenate(bounds)


def settle(
    asked: str,
    cache: Any,
    fields: Sequence[str],
    processes: int,
    device: torch.device,
    shuffle: str,
    stage_dir: Path | None,
    stage_bytes: int | None,
) -> tuple[str, Any]:
    """Where rows of `fields` wait, all shapes together, and what they are read from.

    It is what `choose_residency` says. With a `stage_dir`, "auto" copies the shards of a cache whose tables fit neither
    the GPU nor memory there, if they have no more than `stage_bytes`, and maps the copies.
    """
    if stage_dir is not None and isinstance(cache, Cache):
        if asked != "auto":
            raise ConfigError(
                f"residency is {asked!r}, and stage_dir {str(stage_dir)!r} is where 'auto' copies shards to that fit "
                "neither the GPU nor memory; expected one of the two; leave one out"
            )
        if _whole(cache, fields, processes, device) is None:
            copy = copied(cache, fields, stage_dir, stage_bytes)
            if copy is not None:
                return "mmap", copy
    return choose_residency(asked, cache, fields, processes, device, shuffle), cache


def _bytes_of(cache: Cache, fields: Sequence[str]) -> int:
    return sum(part.resident_bytes(fields) for part in cache.by_shape(*fields))


def _whole(cache: Cache, fields: Sequence[str], processes: int, device: torch.device) -> str | None:
    """Where whole tables have room, "gpu" or "ram"."""
    size = _bytes_of(cache, fields)
    if device.type == "cuda" and size <= torch.cuda.mem_get_info(device)[0] // 2:
        return "gpu"
    return "ram" if size * processes <= free_memory() // 2 else None


def choose_residency(
    asked: str, cache: Any, fields: Sequence[str], processes: int, device: torch.device, shuffle: str = "full"
) -> str:
    """Where rows of `fields` are to wait: "gpu", "ram", "mmap" or "stream", or "online" when they come from no cache.

    "auto" takes the first of "gpu", only on CUDA, and "ram", whose tables, in each of the `processes`, fit into half of
    the free memory; else "mmap", or "stream" of a bucket, which cannot be mapped. Raises ConfigError for a wish that is
    none, that the device cannot hold, or that does not go with the `shuffle`.
    """
    if asked not in ("auto", "gpu", "ram", "mmap", "stream"):
        raise ConfigError(f"residency is {asked!r}; expected 'auto', 'gpu', 'ram', 'mmap' or 'stream'")
    if not isinstance(cache, Cache):
        return "online"
    if asked == "stream":
        return _streamed(cache, shuffle)
    if asked == "mmap" and not isinstance(cache.path, Path):
        raise ConfigError(
            f"residency is 'mmap', but {cache.path} lies in an object store, whose files cannot be mapped; expected "
            "'auto', 'gpu', 'ram' or 'stream'; give one of these, or copy the cache to a disk"
        )
    size = _bytes_of(cache, fields)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    if asked == "gpu" and device.type == "cuda" and size > free:
        raise ConfigError(
            f"residency is 'gpu', but the tables of {', '.join(fields)} take {size / 1e9:.1f} GB and {device} has "
            f"{free / 1e9:.1f} GB free; expected them to fit; choose 'auto', 'ram' or 'mmap'"
        )
    if asked != "auto":
        return asked
    if (whole := _whole(cache, fields, processes, device)) is not None:
        return whole
    return "mmap" if isinstance(cache.path, Path) else _streamed(cache, shuffle)


def _streamed(cache: Cache, shuffle: str) -> str:
    if shuffle != "stream":
        raise ConfigError(
            f"the rows of {cache.path} are to be streamed, but shuffle is {shuffle!r}, which wants rows from "
            "everywhere at any time; expected an order that is read in blocks; give --shuffle stream"
        )
    return "stream"
