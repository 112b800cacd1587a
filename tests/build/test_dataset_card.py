"""The cache's README.md: true, the same for equal caches, and enough for `datasets` to load what is beside it."""

import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from small_builds import build, copy_pictures

from kcache import Cache


@pytest.fixture(scope="module")
def source(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_pictures(oracle, tmp_path_factory.mktemp("card") / "pictures")
    (folder / "img_02.txt").write_text("one\ntwo\nand three captions")
    return folder


def test_datasets_loads_a_webdataset_cache_by_its_card(source: Path, oracle: Path, tmp_path: Path) -> None:
    pictures = Path(shutil.copytree(source, tmp_path / "pictures"))
    for i, path in enumerate(sorted(pictures.glob("*.png"))):
        with Image.open(path) as picture:
            picture.convert("L").save(path.with_suffix(".grey.png"))
            Image.new("L", picture.size, 255 * (i % 2)).save(path.with_suffix(".hole.png"))
    settings: dict[str, Any] = {"hint_column": ("grey=grey",), "mask_column": "hole", "flip": True}
    build(pictures, tmp_path / "cache", oracle, format="webdataset", resolution=(64, 32), rows_per_shard=4, **settings)
    loaded = datasets.load_dataset(str(tmp_path / "cache"), split="train", cache_dir=str(tmp_path / "hf"))
    cache = Cache.open(tmp_path / "cache", resolution=32)
    ids = cache.samples["id"].to_pylist()
    assert sorted(loaded["__key__"]) == sorted(ids)
    for member in loaded:
        i = ids.index(member["__key__"])
        captions = cache.samples["captions"].to_pylist()[i]
        assert [member[name] for name in ("txt", "1.txt", "2.txt")][: len(captions)] == captions
        last = len(captions) - 1
        found = np.array(member[f"text_embeds.{last}.npy" if last else "text_embeds.npy"], np.float32)
        np.testing.assert_array_equal(found, cache.read([i], ["text_embeds"], last)["text_embeds"][0])
        found = np.array(member["latents-32.npy"], np.float32)
        np.testing.assert_array_equal(found, cache.read([i], ["latents"])["latents"][0])
        mirrored = cache.read([i], ["hint_grey", "masks"], mirrored=np.ones(1, np.bool_))
        np.testing.assert_array_equal(np.asarray(member["hint-grey-32.1.png"]), mirrored["hint_grey"][0, 0])
        np.testing.assert_array_equal(np.asarray(member["masks-32.1.png"]), mirrored["masks"][0, 0] == 1)


def test_datasets_loads_the_samples_of_a_zarr_cache_by_its_card(source: Path, oracle: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "cache", oracle, format="zarr")
    loaded = datasets.load_dataset(str(tmp_path / "cache"), split="train", cache_dir=str(tmp_path / "hf"))
    assert loaded["captions"][:] == Cache.open(tmp_path / "cache").samples["captions"].to_pylist()


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_a_card_that_was_taken_over_stays(source: Path, oracle: Path, form: str, tmp_path: Path) -> None:
    pictures = Path(shutil.copytree(source, tmp_path / "pictures"))
    build(pictures, tmp_path / "cache", oracle, format=form)
    card = tmp_path / "cache" / "README.md"
    text = card.read_text()
    assert "6 samples" in text
    assert Cache.open(tmp_path / "cache").fingerprint in text
    (pictures / "img_05.png").unlink()
    (pictures / "img_05.txt").unlink()
    build(pictures, tmp_path / "cache", oracle, format=form)
    assert "5 samples" in card.read_text()
    card.write_text("# My own words\n")
    (pictures / "img_04.png").unlink()
    (pictures / "img_04.txt").unlink()
    build(pictures, tmp_path / "cache", oracle, format=form)
    assert card.read_text() == "# My own words\n"
