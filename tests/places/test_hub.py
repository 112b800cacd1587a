"""A cache in a dataset of the Hub: fetched once, file by file, and read; nothing is written there."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import serve_files
from huggingface_hub import constants

from kcache import Cache
from kcache.errors import CacheNotFoundError, ConfigError, StoreError
from kcache.places import cache_place, place_of
from kcache.upkeep.info import describe_cache
from kcache.upkeep.verify import verify_cache

URL = "hf://datasets/owner/name"


@pytest.fixture
def root(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What every repository of the Hub holds: a cache."""
    root = Path(shutil.copytree(cache, tmp_path / "repository"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with serve_files(root) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield root


def test_a_cache_on_the_hub_is_read_like_any_other(root: Path, cache: str) -> None:
    here, there = Cache.open(cache), Cache.open(f"{URL}@v1")
    assert there.fingerprint == here.fingerprint
    assert (there.read([3, 0], ["latents"])["latents"] == here.read([3, 0], ["latents"])["latents"]).all()
    assert not verify_cache(URL).corrupt
    about = describe_cache(URL)
    assert (about["cache"], about["samples"], about["orphaned_bytes"]) == (URL, len(here), None)


def test_to_be_described_no_shard_is_fetched(root: Path) -> None:
    describe_cache(URL)
    fetched = {path.suffix for path in cache_place(URL, ["manifest.json"]).rglob("*") if path.is_file()}
    assert fetched <= {".json", ".npy", ".parquet", ".jsonl"}
    assert not list(cache_place(URL, ["manifest.json"]).glob("latents-*"))


def test_of_what_is_no_cache_nothing_is_fetched(root: Path) -> None:
    (root / "manifest.json").unlink()
    with pytest.raises(CacheNotFoundError, match=f"{URL} is not a finished cache: there is no manifest"):
        Cache.open(URL)
    assert not [path for path in (root.parent / "hub").rglob("*") if path.name.endswith(".parquet")]


def test_nothing_is_written_to_the_hub() -> None:
    with pytest.raises(ConfigError, match=r"'hf://datasets/owner/name' is a URL of the .* Hub, which is only read"):
        place_of(URL)


def test_a_hub_that_is_not_there_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with serve_files(tmp_path) as url:
        pass
    monkeypatch.setattr(constants, "ENDPOINT", url)
    with pytest.raises(StoreError, match=rf"{URL}@v2 cannot be fetched: ") as raised:
        Cache.open(f"{URL}@v2")
    assert "\n" not in str(raised.value)
