"""Shards are plain zarr v3: byte for byte what zarr-python writes, and open to other readers as they are."""

import json
from pathlib import Path

import numpy as np
import pytest
import zarr
import zarr.codecs
from measuring.synthetic import write_synthetic_cache

from kcache import Cache
from kcache.store.formats.zarr import array_file, row_spans, write_group

FIELDS = ["image_embeds", "latents", "text_embeds", "text_encoder_hidden_states"]


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("dtype", ["float16", "float32", "uint8", "int64"])
def test_files_equal_zarr_pythons(tmp_path: Path, rows: int, dtype: str) -> None:
    array = np.random.default_rng(0).integers(0, 100, (rows, 3, 2)).astype(dtype)
    chunk = min(64, rows)
    little = None if dtype == "uint8" else "little"
    sharding = zarr.codecs.ShardingCodec(
        chunk_shape=(chunk, 3, 2),
        codecs=[zarr.codecs.BytesCodec(endian=little), zarr.codecs.Crc32cCodec()],
        index_location="end",
    )
    with zarr.config.set({"array.write_empty_chunks": True}):
        theirs = zarr.create(
            store=str(tmp_path / "theirs"), shape=array.shape, dtype=dtype, chunks=(-(-rows // chunk) * chunk, 3, 2),
            codecs=[sharding], fill_value=0, zarr_format=3, dimension_names=["row", "a", "b"],
        )  # fmt: skip
        theirs[:] = array
    (tmp_path / "ours").mkdir()
    write_group(tmp_path / "ours", {"field": array}, {"field": ("row", "a", "b")})
    file = array_file("field", (3, 2))
    assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file.removeprefix("field/")).read_bytes()
    ours = json.loads((tmp_path / "ours" / "field" / "zarr.json").read_bytes())
    assert ours == json.loads((tmp_path / "theirs" / "zarr.json").read_bytes())


def test_rows_stand_where_the_offsets_say(tmp_path: Path) -> None:
    array = np.arange(150 * 5, dtype=np.int64).reshape(150, 5)
    (tmp_path / "group").mkdir()
    write_group(tmp_path / "group", {"field": array}, {"field": ("row", "embedding")})
    content = (tmp_path / "group" / array_file("field", (5,))).read_bytes()
    for row, offset in enumerate(row_spans(np.arange(150), 40)):
        assert content[offset : offset + 40] == array[row].tobytes()


def test_every_foreign_reader_sees_what_kcache_reads(tmp_path: Path) -> None:
    """zarr-python, xarray and tensorstore against Cache.read, over all shards and arrays."""
    manifest = write_synthetic_cache(tmp_path / "cache", 150, dim=6, latent_side=2, rows_per_shard=70)
    cache = Cache.open(tmp_path / "cache")
    rows = cache.read(range(150), FIELDS)
    seen = {reader: {name: [] for name in FIELDS} for reader in ("zarr", "xarray", "tensorstore")}
    for entry in manifest.tables.values():
        names = [field.name for field in entry.recipe.fields]
        for shard in entry.shards:
            group = cache.path / shard.data
            for name in names:
                seen["zarr"][name].append(zarr.open_group(group, mode="r")[name][:])
                seen["xarray"][name].append(_xarray(group)[name].to_numpy())
                seen["tensorstore"][name].append(_tensorstore(group / name))
    for reader, arrays in seen.items():
        for name in FIELDS:
            # The reserved row comes first in its table: one row of image_embeds, the tokens of "" in the text.
            found = np.concatenate(arrays[name])[-len(rows[name]) :]
            assert found.dtype == rows[name].dtype
            assert (found == rows[name]).all(), (reader, name)


def _xarray(group: Path):
    import xarray

    return xarray.open_zarr(group, consolidated=False, chunks=None)


def _tensorstore(array: Path) -> np.ndarray:
    import tensorstore

    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(array)}}
    return tensorstore.open(spec, open=True).result().read().result()
