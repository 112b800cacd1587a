"""Samples: ids that stay when others come, and a parquet file that any tool reads."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kcache.errors import CacheCorruptError
from kcache.store import samples
from kcache.store.manifest import Manifest
from kcache.store.samples import Sample, read_samples, read_some_samples, sample_ids, write_samples


@given(st.lists(st.integers(0, 5).map(lambda i: bytes([i]) * 16)))
def test_ids_are_unique_and_start_with_the_images_key(keys: list[bytes]) -> None:
    ids = sample_ids(keys)
    assert len(set(ids)) == len(ids)
    assert all(i.split("-")[0] == key.hex() for i, key in zip(ids, keys, strict=True))
    assert all("." not in i and "/" not in i for i in ids)


def test_ids_stay_when_other_pictures_come() -> None:
    a, b, c = (bytes([i]) * 16 for i in range(3))
    before, after = sample_ids([a, b, a]), sample_ids([c, a, b, c, a])
    assert [i for i in after if i in before] == before


def test_any_parquet_reader_sees_the_samples(tmp_path: Path) -> None:
    sample = Sample(
        id="00", name="a.png", image_key=bytes(16), captions=("one", "zwei — 二"), caption_keys=(bytes(16), b"k" * 16),
        width=3, height=4,
    )  # fmt: skip
    _, digest = write_samples(tmp_path, [sample])
    [row] = pq.read_table(tmp_path / f"samples-{digest[:16]}.parquet").to_pylist()
    assert row == {
        "id": "00",
        "name": "a.png",
        "image_key": bytes(16),
        "captions": ["one", "zwei — 二"],
        "caption_keys": [bytes(16), b"k" * 16],
        "width": 3,
        "height": 4,
    }


def written(folder: Path, names: list[str]) -> Manifest:
    """The head of a cache of samples called `names`, each with as many captions as its number."""
    listed = [
        Sample(
            id=f"{i:02d}", name=name, image_key=bytes([i]) * 16, captions=("caption",) * i,
            caption_keys=(bytes(16),) * i, width=i, height=1,
        )
        for i, name in enumerate(names)
    ]  # fmt: skip
    digest, file_digest = write_samples(folder, listed)
    return Manifest(
        format="zarr", tables={}, samples=len(names), samples_digest=digest, samples_file_digest=file_digest,
        index_digest="", rejected=0, rejected_digest="", models={},
    )  # fmt: skip


@pytest.mark.parametrize("numbers", [[], [0], [1, 2, 3], [0, 3, 4, 6], [6]])
def test_some_samples_are_those_of_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numbers: list[int]
) -> None:
    monkeypatch.setattr(samples, "SAMPLES_PER_PART", 3)
    manifest = written(tmp_path, list("abcdefg"))
    whole = read_samples(tmp_path, manifest).select(["name", "captions"]).to_pylist()
    found = read_some_samples(tmp_path, manifest, np.array(numbers, np.int64), ["name", "captions"])
    assert found == [whole[number] for number in numbers]


def test_a_folder_that_is_called_like_the_beginning_of_a_url_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("s3:")
    folder.mkdir()
    manifest = written(folder, list("abc"))
    assert samples.short_sides(folder, manifest).tolist() == [0, 1, 1]
    assert samples.read_cut(folder, manifest) == {}
    assert read_some_samples(folder, manifest, np.arange(1), ["name"]) == [{"name": "a"}]


def test_some_samples_of_a_broken_list_are_refused(tmp_path: Path) -> None:
    manifest = written(tmp_path, list("abc"))
    with pytest.raises(CacheCorruptError, match="has 3 samples; the manifest says 4"):
        read_some_samples(tmp_path, replace(manifest, samples=4), np.arange(1), ["name"])
    path = tmp_path / manifest.samples_file
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CacheCorruptError, match="its sha256 is"):
        read_some_samples(tmp_path, manifest, np.arange(1), ["name"])
    path.unlink()
    with pytest.raises(CacheCorruptError, match="No such file"):
        read_some_samples(tmp_path, manifest, np.arange(1), ["name"])
