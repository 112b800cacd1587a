"""Converting: the other form holds the same samples and rows, comes whole or not at all, and others read it."""

import gc
import io
import json
import os
import shutil
import signal
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
import webdataset
from small_builds import build, copy_pictures, digests, encoded

from kcache import Cache
from kcache.build.joined_tars import SAMPLES
from kcache.errors import CacheCorruptError, CacheMismatchError, CacheNotFoundError, ConfigError
from kcache.store.shards import record_commit
from kcache.upkeep.convert import convert_cache

FIELDS = ["image_embeds", "latents", "text_embeds", "text_encoder_hidden_states"]
OTHER = {"zarr": "webdataset", "webdataset": "zarr"}


@pytest.fixture(scope="module")
def source(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures: one with two captions, two with the same caption, one image under two names, one that is none."""
    folder = copy_pictures(oracle, tmp_path_factory.mktemp("convert") / "pictures")
    (folder / "img_02.txt").write_text("the first caption\nand a second, longer one")
    (folder / "img_03.txt").write_text("picture number 0")
    shutil.copyfile(folder / "img_04.png", folder / "img_05.png")
    (folder / "img_06.png").write_bytes(b"no picture")
    (folder / "img_06.txt").write_text("a caption whose picture cannot be decoded")
    return folder


@pytest.fixture(scope="module")
def caches(source: Path, oracle: Path) -> dict[str, Path]:
    """A cache of the source in each form, built."""
    built = {}
    for form in OTHER:
        built[form] = source.parent / form
        build(source, built[form], oracle, dtype="float16", format=form, rows_per_shard=4)
    return built


def all_rows(path: Path) -> dict[str, np.ndarray]:
    """Every row of a cache, all captions of all samples and the reserved rows."""
    cache = Cache.open(path)
    counts = np.diff(cache.caption_bounds)
    samples = np.concatenate([np.repeat(np.arange(len(cache)), counts), [0]])
    captions = np.concatenate([*[np.arange(count) for count in counts], [0]])
    drop = np.arange(len(samples)) == len(samples) - 1
    return cache.read(samples, FIELDS, captions, drop_caption=drop, drop_image=drop)


@pytest.mark.parametrize("form", OTHER)
def test_the_other_form_holds_the_same(caches: dict[str, Path], form: str, tmp_path: Path) -> None:
    manifest = convert_cache(caches[form], tmp_path / "new", OTHER[form], rows_per_shard=3)
    old, new = Cache.open(caches[form]), Cache.open(tmp_path / "new")
    assert (manifest.format, new.manifest.format) == (OTHER[form], OTHER[form])
    assert (new.samples_digest, new.fingerprint, new.recipes) == (old.samples_digest, old.fingerprint, old.recipes)
    assert (new.models, new.samples) == (old.models, old.samples)
    expected, found = all_rows(caches[form]), all_rows(tmp_path / "new")
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
    assert (tmp_path / "new" / "rejected.jsonl").read_bytes() == (caches[form] / "rejected.jsonl").read_bytes()


def test_there_and_back_gives_the_same_bytes(oracle: Path, source: Path, tmp_path: Path) -> None:
    clean = Path(shutil.copytree(source, tmp_path / "clean"))
    (clean / "img_06.png").unlink()
    (clean / "img_06.txt").unlink()
    for form in OTHER:
        build(clean, tmp_path / form, oracle, dtype="float16", format=form, rows_per_shard=4)
    convert_cache(tmp_path / "zarr", tmp_path / "there", "webdataset", rows_per_shard=4)
    convert_cache(tmp_path / "there", tmp_path / "back", "zarr", rows_per_shard=4)
    assert digests(tmp_path / "there") == digests(tmp_path / "webdataset")
    assert digests(tmp_path / "back") == digests(tmp_path / "zarr")


@pytest.mark.parametrize("form", OTHER)
def test_building_on_has_nothing_to_do(
    caches: dict[str, Path], source: Path, oracle: Path, form: str, tmp_path: Path
) -> None:
    convert_cache(caches[form], tmp_path / "new", OTHER[form])
    before = digests(tmp_path / "new")
    result = build(source, tmp_path / "new", oracle, dtype="float16", format=OTHER[form])
    assert (encoded(result), result.rejected) == ({}, 1)
    assert digests(tmp_path / "new") == before


@pytest.mark.parametrize("form", OTHER)
def test_an_interrupted_conversion_is_no_cache_and_is_finished(
    caches: dict[str, Path], form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_cache(caches[form], tmp_path / "whole", OTHER[form], rows_per_shard=2)
    for _ in range(4):
        left = 1

        def interrupted(*arguments: object, **options: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return record_commit(*arguments, **options)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr("kcache.store.shards.record_commit", interrupted)
            patch.setattr("kcache.build.joined_tars.record_commit", interrupted)
            with pytest.raises(KeyboardInterrupt):
                convert_cache(caches[form], tmp_path / "new", OTHER[form], rows_per_shard=2)
        with pytest.raises(CacheNotFoundError):
            Cache.open(tmp_path / "new")
    convert_cache(caches[form], tmp_path / "new", OTHER[form], rows_per_shard=2)
    assert digests(tmp_path / "new") == digests(tmp_path / "whole")
    convert_cache(caches[form], tmp_path / "new", OTHER[form], rows_per_shard=2)
    assert digests(tmp_path / "new") == digests(tmp_path / "whole")


def test_a_signal_that_comes_last_is_not_lost(caches: dict[str, Path], tmp_path: Path) -> None:
    def report(name: str, done: int, total: int) -> None:
        if name == SAMPLES and done == total:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        convert_cache(caches["zarr"], tmp_path / "new", "webdataset", report=report)
    assert len(Cache.open(tmp_path / "new")) == len(Cache.open(caches["zarr"]))


def test_rows_that_no_sample_uses_are_left_behind(
    caches: dict[str, Path], source: Path, oracle: Path, tmp_path: Path
) -> None:
    pictures = Path(shutil.copytree(source, tmp_path / "pictures"))
    cache = Path(shutil.copytree(caches["zarr"], tmp_path / "cache"))
    (pictures / "img_00.txt").write_text("another caption")
    build(pictures, cache, oracle, dtype="float16", format="zarr")
    old, new = Cache.open(cache).manifest, convert_cache(cache, tmp_path / "new", "webdataset")
    again = convert_cache(tmp_path / "new", tmp_path / "again", "zarr")
    assert again.tables["text"].rows == len(
        {"", *Cache.open(cache).samples["captions"].combine_chunks().flatten().to_pylist()}
    )
    assert (new.samples_digest, again.fingerprint) == (old.samples_digest, old.fingerprint)


def test_a_damaged_row_stops_the_conversion(caches: dict[str, Path], tmp_path: Path) -> None:
    cache = Path(shutil.copytree(caches["zarr"], tmp_path / "cache"))
    path = next(cache.glob("latents-64-*/00000-*/latents/c/0/0/0/0"))
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(CacheCorruptError, match="corrupt in the row"):
        convert_cache(cache, tmp_path / "new", "webdataset")
    with pytest.raises(CacheNotFoundError):
        Cache.open(tmp_path / "new")


def test_a_folder_with_something_else_is_left_alone(caches: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "letter.txt").write_text("dear reader")
    with pytest.raises(CacheMismatchError, match=r"not empty \(found letter.txt\)"):
        convert_cache(caches["zarr"], tmp_path / "notes", "webdataset")
    other = Path(shutil.copytree(caches["zarr"], tmp_path / "other"))
    with pytest.raises(CacheMismatchError, match="is a zarr cache"):
        convert_cache(caches["zarr"], other, "webdataset")
    with pytest.raises(ConfigError, match="expected zarr or webdataset"):
        convert_cache(caches["zarr"], tmp_path / "new", "tar")


def tars(cache: Path) -> list[str]:
    return sorted(str(path) for path in cache.glob("samples-*/*.tar"))


def test_webdataset_reads_the_tars(caches: dict[str, Path]) -> None:
    cache = Cache.open(caches["webdataset"])
    ids = cache.samples["id"].to_pylist()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves files for the garbage collector to close
        members = list(webdataset.WebDataset(tars(caches["webdataset"]), shardshuffle=False))
        gc.collect()
    seen = []
    for member in members:
        i = ids.index(member["__key__"])
        seen.append(i)
        captions = cache.samples["captions"].to_pylist()[i]
        assert member["txt"].decode() == captions[0]
        assert json.loads(member["json"])["captions"] == captions
        for number in range(len(captions)):
            suffix = f".{number}" if number else ""
            expected = cache.read([i], FIELDS, number)
            for name in ("text_embeds", "text_encoder_hidden_states"):
                row = np.load(io.BytesIO(member[f"{name}{suffix}.npy"]), allow_pickle=False)
                np.testing.assert_array_equal(row, expected[name].reshape(row.shape))
                assert row.dtype == expected[name].dtype
        for name in ("image_embeds", "latents"):
            row = np.load(io.BytesIO(member[f"{name}.npy"]), allow_pickle=False)
            np.testing.assert_array_equal(row, expected[name][0])
    assert sorted(seen) == list(range(len(cache)))


def test_datasets_reads_the_tars(source: Path, oracle: Path, tmp_path: Path) -> None:
    pictures = Path(shutil.copytree(source, tmp_path / "pictures"))
    (pictures / "img_02.txt").write_text("only one caption")
    build(pictures, tmp_path / "cache", oracle, dtype="float16", format="webdataset", rows_per_shard=4)
    cache = Cache.open(tmp_path / "cache")
    loaded = datasets.load_dataset(
        "webdataset", data_files=tars(tmp_path / "cache"), split="train", cache_dir=str(tmp_path / "hf")
    )
    assert sorted(loaded["__key__"]) == sorted(cache.samples["id"].to_pylist())
    ids = cache.samples["id"].to_pylist()
    for member in loaded:
        i = ids.index(member["__key__"])
        expected = cache.read([i], FIELDS)
        # Arrays come as nested lists; their dtype is in the features.
        for name in FIELDS:
            row = np.array(member[f"{name}.npy"], np.float16)
            np.testing.assert_array_equal(row, expected[name].reshape(row.shape))
        assert (member["txt"], member["json"]["name"]) == (
            cache.samples["captions"].to_pylist()[i][0],
            cache.samples["name"].to_pylist()[i],
        )
    # numpy and torch formats give arrays, in float32, which holds every float16.
    [latents] = loaded.with_format("numpy")[:1]["latents.npy"]
    assert (latents.shape, latents.dtype) == ((4, 8, 8), np.float32)
