"""Tables on the device give the rows that the cache gives, and "auto" takes the nearest place where they fit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from in_bucket import put
from measuring.synthetic import write_synthetic_cache

from kcache import Cache
from kcache.errors import ConfigError
from kcache.loader.residency import DeviceTables, choose_residency

SAMPLES = 23
FIELDS = ["latents", "image_embeds", "text_embeds", "text_encoder_hidden_states"]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    path = tmp_path_factory.mktemp("residency") / "cache"
    write_synthetic_cache(path, SAMPLES, dim=4, latent_side=2, captions=2, rows_per_shard=8)
    return Cache.open(path)


@pytest.fixture(scope="module")
def tables(cache: Cache) -> DeviceTables:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kcache.loader.residency._UPLOAD_ROWS", 5)
        return DeviceTables(cache, FIELDS, CPU)


@given(
    picked=st.lists(st.tuples(st.integers(0, SAMPLES - 1), st.integers(0, 1), st.booleans(), st.booleans()), max_size=9)
)
def test_tables_give_the_rows_that_the_cache_gives(
    cache: Cache, tables: DeviceTables, picked: list[tuple[int, int, bool, bool]]
) -> None:
    samples, captions, without_caption, without_image = np.array(picked, np.int64).reshape(-1, 4).T
    dropped = {"drop_caption": without_caption.astype(bool), "drop_image": without_image.astype(bool)}
    expected = cache.read(samples, FIELDS, captions, **dropped)
    numbers = tables.numbers(samples, captions, **dropped)
    found = tables.take({name: torch.from_numpy(array) for name, array in numbers.items()})
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(found[name].numpy(), array)
        assert found[name].numpy().dtype == array.dtype


def test_auto_takes_the_nearest_place_where_the_tables_fit(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    size = cache.resident_bytes(FIELDS)
    free = {"device": 0, "host": 0}
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (free["device"], 10**12))
    monkeypatch.setattr("kcache.loader.residency.free_memory", lambda: free["host"])

    def chosen(device: torch.device, on_device: int, on_host: int, processes: int = 1) -> str:
        free.update(device=on_device, host=on_host)
        return choose_residency("auto", cache, FIELDS, processes, device)

    assert chosen(CUDA, 2 * size, 0) == "gpu"
    assert chosen(CUDA, 2 * size - 1, 2 * size) == "ram"
    assert chosen(CUDA, 2 * size - 1, 2 * size - 1) == "mmap"
    assert chosen(CPU, 10**12, 10**12) == "ram"
    assert chosen(CPU, 0, 4 * size, processes=2) == "ram"
    assert chosen(CPU, 0, 4 * size, processes=3) == "mmap"


def test_a_device_that_cannot_hold_the_tables_is_said(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (3, 10**12))
    with pytest.raises(
        ConfigError, match=r"residency is 'gpu', but the tables of latents take .* cuda has 0.0 GB free"
    ):
        choose_residency("gpu", cache, ["latents"], 1, CUDA)
    with pytest.raises(ConfigError, match="residency is 'tape'; expected 'auto', 'gpu', 'ram', 'mmap' or 'stream'"):
        choose_residency("tape", cache, ["latents"], 1, CUDA)


def test_what_is_no_cache_has_no_residency(tmp_path: Path) -> None:
    assert choose_residency("auto", object(), FIELDS, 1, CUDA) == "online"


@pytest.mark.parametrize("shuffle", ["full", "block"])
def test_another_order_cannot_be_streamed(cache: Cache, shuffle: str) -> None:
    with pytest.raises(ConfigError, match=f"shuffle is '{shuffle}'.*give --shuffle stream"):
        choose_residency("stream", cache, FIELDS, 1, CPU, shuffle)


def test_auto_of_a_bucket_is_memory_or_a_stage(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(cache.path, Path)
    far = Cache.open(put(cache.path, "memory://residency/cache"))
    assert choose_residency("auto", far, FIELDS, 1, CPU) == "ram"
    monkeypatch.setattr("kcache.loader.residency.free_memory", lambda: 0)
    assert choose_residency("auto", far, FIELDS, 1, CPU, "stream") == "stream"
    assert choose_residency("auto", cache, FIELDS, 1, CPU, "stream") == "mmap"
    with pytest.raises(ConfigError, match=r"shuffle is 'full'.*give --shuffle stream"):
        choose_residency("auto", far, FIELDS, 1, CPU)
    with pytest.raises(ConfigError, match="lies in an object store, whose files cannot be mapped"):
        choose_residency("mmap", far, FIELDS, 1, CPU)
