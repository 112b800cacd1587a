"""Opening and reading a cache: the rows asked for in the order asked, and nothing that was not committed."""

import os
import resource
from pathlib import Path

import numpy as np
import pytest
import zarr
from measuring.synthetic import write_synthetic_cache

from kcache import Cache
from kcache.errors import (
    CacheCorruptError,
    CacheIncompleteError,
    CacheMismatchError,
    CacheNotFoundError,
    ConfigError,
    KcacheError,
)
from kcache.store.shaped.choice import Reads
from kcache.store.shaped.held import Held

FIELDS = ["image_embeds", "latents", "text_embeds", "text_encoder_hidden_states"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "cache"
    write_synthetic_cache(path, 100, dim=8, latent_side=4, rows_per_shard=30, captions=2)
    return path


def test_rows_come_in_the_order_asked(folder: Path) -> None:
    cache = Cache.open(folder)
    everything = cache.read(range(100), FIELDS, caption=1)
    order = np.array([99, 0, 31, 31, 7])
    rows = cache.read(order, FIELDS, caption=1)
    assert len(cache) == 100
    for name in FIELDS[:3]:
        assert (rows[name] == everything[name][order]).all()
    bounds = everything["text_offsets"]
    expected = np.concatenate([everything["text_encoder_hidden_states"][bounds[i] : bounds[i + 1]] for i in order])
    assert (rows["text_encoder_hidden_states"] == expected).all()
    assert (np.diff(rows["text_offsets"]) == np.diff(bounds)[order]).all()


def test_rows_are_the_committed_ones(folder: Path) -> None:
    cache = Cache.open(folder)
    entry = cache.manifest.tables["latents-32"]
    parts = [zarr.open_group(folder / shard.data)["latents"][:] for shard in entry.shards]
    assert (cache.read(range(100), ["latents"])["latents"] == np.concatenate(parts)).all()


def test_more_shards_than_files_may_be_open(folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    expected, cache = Cache.open(folder).read(range(100), FIELDS), Cache.open(folder)
    free = os.open(folder, os.O_RDONLY)
    os.close(free)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 3, hard))
        rows = cache.read(range(100), FIELDS)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert all((rows[name] == expected[name]).all() for name in FIELDS)


def test_each_sample_can_take_another_caption(folder: Path) -> None:
    cache = Cache.open(folder)
    mixed = cache.read([3, 4], ["text_embeds"], caption=np.array([1, 0]))["text_embeds"]
    assert (mixed[0] == cache.read([3], ["text_embeds"], caption=1)["text_embeds"][0]).all()
    assert (mixed[1] == cache.read([4], ["text_embeds"], caption=0)["text_embeds"][0]).all()
    assert (mixed[0] != cache.read([3], ["text_embeds"], caption=0)["text_embeds"][0]).any()


def test_resident_rows_are_the_same(folder: Path) -> None:
    resident = Cache.open(folder)
    resident.make_resident(FIELDS)
    mapped = Cache.open(folder).read(range(100), FIELDS)
    for name, rows in resident.read(range(100), FIELDS).items():
        assert (rows == mapped[name]).all()


def test_what_is_not_there_is_said(folder: Path, tmp_path: Path) -> None:
    cache = Cache.open(folder)
    with pytest.raises(IndexError, match="cache of 100 samples"):
        cache.read([100], ["latents"])
    with pytest.raises(IndexError, match="caption 2 asked of sample 5, which has 2"):
        cache.read([5], ["text_embeds"], caption=2)
    with pytest.raises(CacheIncompleteError, match="holds no 'depth'; found image_embeds, latents"):
        cache.read([0], ["depth"])
    with pytest.raises(CacheIncompleteError, match="no table latents-768; found image_embeds, latents-32, text"):
        Cache.open(folder, resolution=768)
    with pytest.raises(CacheNotFoundError, match="nothing at that path; run `kcache cache-build"):
        Cache.open(tmp_path / "nowhere")


def test_two_resolutions_need_a_choice(tmp_path: Path) -> None:
    from kcache.store.manifest import MANIFEST, read_manifest

    write_synthetic_cache(tmp_path / "c", 5, dim=4, latent_side=4)
    cache = Cache.open(tmp_path / "c")
    manifest = read_manifest(tmp_path / "c")
    both = {**manifest.tables, "latents-64": manifest.tables["latents-32"]}
    several = type(manifest)(**{**_fields(manifest), "tables": both})
    ambiguous = Cache(cache.path, several, Held(Reads.of(cache.path, several, {}, None, None, None), {}))
    with pytest.raises(ConfigError, match="latents at 32, 64 pixels; say which"):
        ambiguous.table_of("latents")
    chosen = Cache(cache.path, several, Held(Reads.of(cache.path, several, {}, 64, None, None), {}))
    assert chosen.table_of("latents") == "latents-64"
    assert (tmp_path / "c" / MANIFEST).exists()


def _fields(manifest: object) -> dict[str, object]:
    return {name: getattr(manifest, name) for name in manifest.__dataclass_fields__}  # type: ignore[attr-defined]


@pytest.mark.parametrize("residency", ["mapped", "resident"])
def test_every_flipped_byte_of_a_row_is_noticed(tmp_path: Path, residency: str) -> None:
    write_synthetic_cache(tmp_path / "c", 8, dim=4, latent_side=2)
    for table, field in [
        ("image_embeds", "image_embeds"),
        ("text", "text_encoder_hidden_states"),
        ("latents-16", "latents"),
    ]:
        reference = Cache.open(tmp_path / "c")
        file = reference.field_files(field).files[0].path
        content = file.read_bytes()
        rng = np.random.default_rng(0)
        size = sum(reference.index[table][field]["length"].tolist())
        for position in rng.integers(0, size, 40).tolist():
            damaged = bytearray(content)
            damaged[position] ^= 1 << int(rng.integers(8))
            file.write_bytes(damaged)
            cache = Cache.open(tmp_path / "c")
            entries = cache.index[table][field]
            end = entries["offset"] + entries["length"]
            touched = np.flatnonzero((entries["offset"] <= position) & (position < end))
            if len(touched) and touched[0] < len(cache):
                with pytest.raises(CacheCorruptError, match="crc32c"):
                    cache.make_resident([field]) if residency == "resident" else cache.read([int(touched[0])], [field])
        file.write_bytes(content)
        Cache.open(tmp_path / "c").read(range(8), [field])


def test_cut_emptied_and_missing_files_are_noticed(tmp_path: Path) -> None:
    write_synthetic_cache(tmp_path / "c", 8, dim=4, latent_side=2)
    file = Cache.open(tmp_path / "c").field_files("latents").files[0].path
    content = file.read_bytes()
    for size in (0, 1, 30, 32 * 7 + 31):
        file.write_bytes(content[:size])
        with pytest.raises(CacheCorruptError):
            Cache.open(tmp_path / "c").read(range(8), ["latents"])
    file.unlink()
    with pytest.raises(CacheCorruptError, match="is not there"):
        Cache.open(tmp_path / "c").read(range(8), ["latents"])


def test_a_damaged_manifest_or_index_is_noticed(tmp_path: Path) -> None:
    write_synthetic_cache(tmp_path / "c", 8, dim=4, latent_side=2)
    rng = np.random.default_rng(0)
    for file in [tmp_path / "c" / "manifest.json", *sorted((tmp_path / "c").glob("index-*/*.npy"))]:
        content = file.read_bytes()
        for _ in range(40):
            damaged = bytearray(content)
            damaged[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
            file.write_bytes(damaged)
            with pytest.raises((CacheCorruptError, CacheMismatchError)):
                Cache.open(tmp_path / "c")
        file.write_bytes(content)
    Cache.open(tmp_path / "c")


def test_a_cache_of_another_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"schema_version": 99}')
    with pytest.raises(CacheMismatchError, match="schema version 99; this kcache reads 1, 2, 3 and 4"):
        Cache.open(tmp_path)


def test_every_refusal_is_a_kcache_error(tmp_path: Path) -> None:
    for content in (
        b"",
        b"[]",
        b"null",
        b"{}",
        b"\xff",
        b'{"schema_version": 1}',
        b'{"schema_version": 1, "digest": 5}',
    ):
        (tmp_path / "manifest.json").write_bytes(content)
        with pytest.raises(KcacheError):
            Cache.open(tmp_path)
