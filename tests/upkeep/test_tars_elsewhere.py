"""What others read of a cache in tars is what it holds."""

import gc
import io
import json
import shutil
import warnings
from pathlib import Path

import datasets
import numpy as np
import webdataset
from small_builds import build

from kcache import Cache

FIELDS = ["image_embeds", "latents", "text_embeds", "text_encoder_hidden_states"]


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


def test_datasets_reads_the_tars(pictures: Path, oracle: Path, tmp_path: Path) -> None:
    pictures = Path(shutil.copytree(pictures, tmp_path / "pictures"))
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
