"""Samples: ids that stay when others come, and a parquet file that any tool reads."""

from pathlib import Path

import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from kcache.samples import Sample, sample_ids, write_samples


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
