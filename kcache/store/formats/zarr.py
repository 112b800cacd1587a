"""One shard as a zarr v3 group of its own, written byte for byte as zarr-python would, without its codec pipeline.

Every array is one `sharding_indexed` file: inner chunks of 64 rows, each followed by the crc32c of its bytes, no
compression, then the index (offset and length of each inner chunk) and its crc32c. zarr-python, tensorstore, zarrs and
xarray open it as it is; kcache itself reads rows at the offsets that `row_spans` gives.
"""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kcache.disk.durable import new_file, sync_folder
from kcache.store.formats.checksums import crc32c
from kcache.store.recipe import Field

CHUNK_ROWS = 64
"""Rows of one inner chunk: large enough for foreign readers to stream, small enough for their random reads."""

CHECKSUM_BYTES = 4
"""Bytes of the crc32c behind each inner chunk."""


def array_file(name: str, row_shape: tuple[int, ...]) -> str:
    """Path, inside a shard's group, of the one file that holds the array `name`."""
    return "/".join([name, "c", *["0"] * (1 + len(row_shape))])


def field_file(data: str, field: Field) -> str:
    """Path of the file that holds `field`, given the path of the shard's group."""
    return f"{data}/{array_file(field.name, field.shape)}"


def pieces(unit_bytes: int) -> tuple[int, int]:
    """Payload bytes of one inner chunk, and the bytes of the checksum behind it."""
    return CHUNK_ROWS * unit_bytes, CHECKSUM_BYTES


def row_spans(starts: np.ndarray, row_bytes: int) -> np.ndarray:
    """Offsets in the file of rows (or tokens) by their number in the array: (n,) int64 → (n,) int64."""
    return starts * row_bytes + starts // CHUNK_ROWS * CHECKSUM_BYTES


def write_group(folder: Path, arrays: Mapping[str, np.ndarray], dimensions: Mapping[str, tuple[str, ...]]) -> None:
    """Write `arrays` as a zarr group into the empty folder `folder`, every file and folder synced.

    `dimensions` names the axes of each array, which xarray needs. Arrays are C-contiguous and little-endian.
    """
    _write_json(folder, {"attributes": {}, "node_type": "group", "zarr_format": 3})
    for name, array in arrays.items():
        _write_array(folder / name, array, dimensions[name])
    for parent, _, _ in os.walk(folder, topdown=False):
        sync_folder(Path(parent))


def _write_array(folder: Path, array: np.ndarray, dimensions: tuple[str, ...]) -> None:
    chunk_rows = max(1, min(CHUNK_ROWS, len(array)))
    chunk_count = -(-len(array) // chunk_rows)
    folder.mkdir()
    _write_json(folder, _array_metadata(array, chunk_rows, chunk_count, dimensions))
    if not chunk_count:
        return
    path = folder.joinpath(*["c", *["0"] * array.ndim])
    path.parent.mkdir(parents=True)
    entries = []
    with new_file(path) as file:
        for start in range(0, len(array), chunk_rows):
            chunk = _whole_chunk(array[start : start + chunk_rows], chunk_rows)
            entries.append((file.tell(), len(chunk) + CHECKSUM_BYTES))
            file.write(chunk.data)
            file.write(struct.pack("<I", crc32c(chunk)))
        index = b"".join(struct.pack("<QQ", *entry) for entry in entries)
        file.write(index + struct.pack("<I", crc32c(index)))


def _whole_chunk(rows: np.ndarray, chunk_rows: int) -> np.ndarray:
    """The bytes of `rows`; the last chunk of an array is filled up with zeros, the fill value."""
    flat = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
    missing = (chunk_rows - len(rows)) * (flat.size // len(rows))
    return np.concatenate([flat, np.zeros(missing, np.uint8)]) if missing else flat


def _array_metadata(
    array: np.ndarray, chunk_rows: int, chunk_count: int, dimensions: tuple[str, ...]
) -> dict[str, Any]:
    to_bytes: dict[str, Any] = {"name": "bytes"}
    if array.dtype.itemsize > 1:
        to_bytes["configuration"] = {"endian": "little"}
    inner = [chunk_rows, *array.shape[1:]]
    sharding = {
        "chunk_shape": inner,
        "codecs": [to_bytes, {"name": "crc32c"}],
        "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "index_location": "end",
    }
    outer = [chunk_rows * max(1, chunk_count), *array.shape[1:]]
    return {
        "attributes": {},
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": outer}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "data_type": array.dtype.name,
        "dimension_names": list(dimensions),
        "fill_value": 0 if array.dtype.kind in "iu" else 0.0,
        "node_type": "array",
        "shape": list(array.shape),
        "storage_transformers": [],
        "zarr_format": 3,
    }


def field_dimensions(field: Field) -> tuple[str, ...]:
    """Names of a field's axes, as xarray shows them: first the rows (or tokens), then what one row is made of."""
    inner = {1: ("embedding",), 3: ("channel", "height", "width")}
    axes = inner.get(len(field.shape), tuple(f"axis_{i}" for i in range(len(field.shape))))
    return ("token" if field.ragged else "row", *axes)


def _write_json(folder: Path, value: Mapping[str, Any]) -> None:
    with new_file(folder / "zarr.json") as file:
        file.write(json.dumps(value, indent=2, sort_keys=True).encode() + b"\n")
