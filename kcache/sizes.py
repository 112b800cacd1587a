"""How many bytes a build will write: the sizes of shards, from the numbers of their rows and tokens alone."""

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from kcache.assemble import Candidate
from kcache.formats.zarr import CHECKSUM_BYTES, CHUNK_ROWS
from kcache.plan import TablePlan
from kcache.recipe import Field, Recipe
from kcache.rows import unit_bytes
from kcache.shards import side_dtype

__all__ = ["reserved_tar_bytes", "table_bytes", "tar_bytes", "zarr_shard_bytes"]

# About what JSON files take: the metadata of a zarr group, of an array and each of its axes, a commit record and each
# file that it names.
_GROUP_JSON_BYTES = 67
_ARRAY_JSON_BYTES = 1_010
_AXIS_JSON_BYTES = 42
_RECORD_BYTES = 450
_RECORD_FILE_BYTES = 110
_TAR_BLOCK_BYTES = 512
_TAR_RECORD_BYTES = 10_240
_NPY_HEADER_BYTES = 128
_RESERVED_TOKENS = 2
"""The empty caption's: start and end."""


def table_bytes(plan: TablePlan, mean_tokens: float) -> int:
    """Bytes of the zarr shards of `plan`, whose ragged rows have `mean_tokens` tokens on average."""
    return sum(
        zarr_shard_bytes(plan.recipe, len(shard.keys), round(len(shard.keys) * mean_tokens)) for shard in plan.shards()
    )


def zarr_shard_bytes(recipe: Recipe, rows: int, tokens: int) -> int:
    """Bytes of a zarr shard with its side file and its commit record."""
    dtype = np.dtype(recipe.stored_dtype)
    sizes = [_array_bytes(rows, 16, 1)]
    sizes += [_array_bytes(tokens if f.ragged else rows, unit_bytes(f, dtype), 1 + len(f.shape)) for f in recipe.fields]
    if any(f.ragged for f in recipe.fields):
        sizes.append(_array_bytes(rows + 1, 8, 1))
    files = 2 * len(sizes) + 2
    side = _npy_bytes(side_dtype(recipe.fields), rows)
    return sum(sizes) + side + _GROUP_JSON_BYTES + _RECORD_BYTES + files * _RECORD_FILE_BYTES


def _array_bytes(length: int, row_bytes: int, axes: int) -> int:
    """The one file of an array: whole chunks with their checksums, their index and its checksum; and the metadata."""
    chunk = max(1, min(CHUNK_ROWS, length))
    chunks = -(-length // chunk)
    metadata = _ARRAY_JSON_BYTES + axes * _AXIS_JSON_BYTES
    return chunks * (chunk * row_bytes + CHECKSUM_BYTES + 16) + CHECKSUM_BYTES + metadata


def _npy_bytes(dtype: np.dtype, length: int) -> int:
    header = io.BytesIO()
    np.save(header, np.empty(0, dtype))
    return header.tell() + length * dtype.itemsize


def tar_bytes(
    recipes: Mapping[str, Recipe], samples: Sequence[Candidate], count: int, rows_per_shard: int, tokens: np.ndarray
) -> int:
    """Bytes of the tars of `count` samples such as `samples`, with side files and commit records.

    `tokens` (n,) are token counts such as the captions have.
    """
    mean = sum(_sample_bytes(recipes, sample, tokens) for sample in samples) / max(1, len(samples))
    captions = sum(len(sample.captions) for sample in samples) / max(1, len(samples))
    tars = [rows_per_shard] * (count // rows_per_shard) + [count % rows_per_shard][: count % rows_per_shard]
    total = 0
    for rows in tars:
        sides = [
            _npy_bytes(side_dtype(r.fields), round(rows * captions) if r.table == "text" else rows)
            for r in recipes.values()
        ]
        record = _RECORD_BYTES + _RECORD_FILE_BYTES * (2 + len(recipes))
        total += _whole_records(round(rows * mean)) + sum(sides) + _npy_bytes(np.dtype("u1"), 16 * rows) + record
    return total


def _sample_bytes(recipes: Mapping[str, Recipe], sample: Candidate, tokens: np.ndarray) -> float:
    """Bytes that one sample takes in a tar."""
    info = {
        "id": sample.image_key.hex(),
        "name": sample.name,
        "image_key": sample.image_key.hex(),
        "captions": list(sample.captions),
        "caption_keys": [key.hex() for key in sample.caption_keys],
        "width": 1024,
        "height": 1024,
    }
    total = float(_member_bytes(len(json.dumps(info, ensure_ascii=False).encode())))
    total += sum(_member_bytes(len(caption.encode())) for caption in sample.captions)
    for field, recipe in _fields(recipes):
        rows = len(sample.captions) if recipe.table == "text" else 1
        total += rows * _row_bytes(field, recipe, tokens)
    return total


def reserved_tar_bytes(recipes: Mapping[str, Recipe]) -> int:
    """Bytes of the tar of the reserved rows, with side files and commit record."""
    rows = [
        _row_bytes(field, recipe, np.array([_RESERVED_TOKENS]))
        for field, recipe in _fields(recipes)
        if recipe.table in ("text", "image_embeds")
    ]
    sides = [_npy_bytes(side_dtype(r.fields), 1) for r in recipes.values() if r.table in ("text", "image_embeds")]
    members = _member_bytes(20) + _member_bytes(0) + round(sum(rows))
    return (
        _whole_records(members) + sum(sides) + _npy_bytes(np.dtype("u1"), 16) + _RECORD_BYTES + 4 * _RECORD_FILE_BYTES
    )


def _fields(recipes: Mapping[str, Recipe]) -> Iterator[tuple[Field, Recipe]]:
    return ((field, recipe) for recipe in recipes.values() for field in recipe.fields)


def _row_bytes(field: Field, recipe: Recipe, tokens: np.ndarray) -> float:
    """A row's member, on average over rows of so many `tokens`."""
    unit = unit_bytes(field, np.dtype(recipe.stored_dtype))
    if not field.ragged:
        return _member_bytes(_NPY_HEADER_BYTES + unit)
    return float(np.mean([_member_bytes(_NPY_HEADER_BYTES + int(count) * unit) for count in tokens]))


def _member_bytes(content: int) -> int:
    return _TAR_BLOCK_BYTES * (1 + math.ceil(content / _TAR_BLOCK_BYTES))


def _whole_records(content: int) -> int:
    """A tar ends with two empty blocks and is filled up to whole records."""
    return math.ceil((content + 2 * _TAR_BLOCK_BYTES) / _TAR_RECORD_BYTES) * _TAR_RECORD_BYTES
