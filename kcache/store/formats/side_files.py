"""What stands beside a shard's data, in small files: the key and place of every row, and the sizes of its pictures."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from kcache.store.digests import pack_keys
from kcache.store.formats import zarr
from kcache.store.formats.checksums import crc32c
from kcache.store.recipe import Field

LOCATOR = np.dtype([("offset", "<u8"), ("length", "<u4"), ("crc32c", "<u4")])
"""Where one row of one field stands in its file: offset and payload length in bytes, crc32c of the payload."""

SIZES = np.dtype([("key", "u1", (16,)), ("width", "<i4"), ("height", "<i4")])
"""The key of a row, and the size in pixels of its picture as it was decoded, upright; 0 for the reserved row."""


def side_dtype(fields: Sequence[Field]) -> np.dtype[np.void]:
    """Dtype of a side file's rows: the key, then a locator per field."""
    return np.dtype([("key", "u1", (16,)), *[(field.name, LOCATOR) for field in fields]])


def side_name(stem: str, part: str = "") -> str:
    """Name of a shard's side file; `part` names the table where shards hold several."""
    return f"{stem}.{part}.rows.npy" if part else f"{stem}.rows.npy"


def sizes_name(stem: str) -> str:
    """Name of the file with the sizes of the pictures behind a shard's rows."""
    return f"{stem}.sizes.npy"


def side_rows(
    fields: Sequence[Field], keys: np.ndarray, arrays: Mapping[str, np.ndarray], offsets: np.ndarray | None
) -> np.ndarray:
    """The side file of rows in a zarr group: `keys` (n, 16) uint8, the rows of each field, `offsets` of ragged ones."""
    side = np.zeros(len(keys), side_dtype(fields))
    side["key"] = keys
    for field in fields:
        array = arrays[field.name]
        flat = array.reshape(len(array), -1).view(np.uint8)
        row_bytes = flat.shape[1]
        bounds = offsets if field.ragged and offsets is not None else np.arange(len(side) + 1)
        side[field.name]["offset"] = zarr.row_spans(bounds[:-1], row_bytes)
        side[field.name]["length"] = np.diff(bounds) * row_bytes
        side[field.name]["crc32c"] = [crc32c(flat[a:b].reshape(-1)) for a, b in pairwise(bounds)]
    return side


def size_rows(keys: Sequence[bytes], sizes: Mapping[bytes, tuple[int, int]]) -> np.ndarray:
    """(n,) of SIZES for the rows of `keys`, 0 where `sizes`, width and height by key, have none."""
    rows = np.zeros(len(keys), SIZES)
    rows["key"] = pack_keys(keys)
    rows["width"], rows["height"] = np.array([sizes.get(key, (0, 0)) for key in keys], np.int32).reshape(-1, 2).T
    return rows
