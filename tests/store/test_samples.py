"""Samples: ids that stay when others come, and a parquet file that any tool reads."""

import hashlib
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kcache.errors import CacheCorruptError
from kcache.store import samples
from kcache.store.formats import columns, records
from kcache.store.formats.columns import Samples, sample_ids, sample_list, sample_schema, table_of
from kcache.store.formats.picture_sizes import Sizes
from kcache.store.formats.side_files import SIZES
from kcache.store.manifest import Manifest
from kcache.store.samples import (
    Sample,
    read_samples,
    read_some_samples,
    samples_digest,
    samples_in_columns,
    with_ids,
    write_samples,
)


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
    with pytest.raises(
        CacheCorruptError, match=r"parquet is not there; if the cache was copied, finish that, else build"
    ):
        read_some_samples(tmp_path, manifest, np.arange(1), ["name"])


def test_a_list_is_read_in_columns_or_refused(tmp_path: Path) -> None:
    manifest = written(tmp_path, list("abc"))
    found = samples_in_columns(tmp_path, manifest)
    assert found == sample_list(read_samples(tmp_path, manifest))
    with pytest.raises(CacheCorruptError, match="its sha256 is"):
        samples_in_columns(
            tmp_path, replace(manifest, samples_file_digest=manifest.samples_file_digest[:16] + "0" * 48)
        )


def some(count: int) -> list[Sample]:
    """Samples of few pictures, with up to three captions each."""
    return [
        Sample(
            name=f"né {i}", image_key=bytes([i % 5] * 16), captions=("one", "", "drei")[: i % 4],
            caption_keys=tuple(bytes([c] * 15 + [0]) for c in range(min(i % 4, 3))), width=i, height=2 * i,
        )
        for i in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("count", [0, 1, 7, 8, 50])
def test_samples_in_columns_are_those_of_the_list(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "SAMPLES_PER_TABLE", 4)
    monkeypatch.setattr(records, "TABLES_IN_MEMORY", 3)  # more are in a file
    listed = some(count)
    found = Samples.of(listed)
    assert (list(found), len(found), found == listed) == (listed, count, True)
    assert [found[i] for i in range(-count, count)] == listed + listed
    assert found[1:7] == listed[1:7]
    assert list(found.image_keys) == [sample.image_key for sample in listed]
    assert list(found.caption_keys) == [key for sample in listed for key in sample.caption_keys]
    assert np.diff(found.caption_bounds).tolist() == [len(sample.captions) for sample in listed]
    ids = sample_ids([sample.image_key for sample in listed])
    assert list(with_ids(listed)) == [replace(s, id=i) for s, i in zip(listed, ids, strict=True)]
    for rows in (1, 4, 6, 1000):
        groups = list(found.groups(rows))
        assert [s for group in groups for s in sample_list(group)] == listed
        assert all(len(group) == rows for group in groups[:-1])


@pytest.mark.parametrize("count", [0, 1, 8, 50])
def test_of_samples_in_columns_some_are_taken(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "SAMPLES_PER_TABLE", 4)
    listed = some(count)
    found = Samples.of_table(table_of(listed).slice(count // 3)).where(np.arange(count - count // 3) % 3 != 1)
    kept = [sample for i, sample in enumerate(listed[count // 3 :]) if i % 3 != 1]
    assert (list(found), list(found.image_keys)) == (kept, [sample.image_key for sample in kept])
    texts = {key: text for s in kept for key, text in zip(s.caption_keys, s.captions, strict=True)}
    asked = [bytes([c] * 15 + [0]) for c in (2, 9, 0, 1, 0)]
    assert found.texts(asked) == {key: texts[key] for key in asked if key in texts}
    captions = [text for sample in kept for text in sample.captions]
    assert found.captions(np.arange(len(captions))[::-1]) == captions[::-1]
    odd = [bool(i % 2) for i in range(len(captions))]
    which = iter(odd)
    counts = [sum(next(which) for _ in sample.captions) for sample in kept]
    assert found.count_captions(np.array(odd, np.bool_)).tolist() == counts
    sizes = Sizes(found)
    sizes.add([np.array([(list(b"x" * 16), 1, 2), (list(bytes(16)), 3, 4), (list(b"x" * 16), 5, 6)], SIZES)])
    known = {bytes(16): (3, 4), **{s.image_key: (s.width, s.height) for s in kept}, b"x" * 16: (5, 6)}
    rows = sizes.at(sizes.find(list(known)))
    assert list(zip(rows["width"].tolist(), rows["height"].tolist(), strict=True)) == list(known.values())
    assert sizes.find([b"y" * 16]).tolist() == [-1]


def test_what_few_samples_say_is_kept_and_costs_the_others_no_column(tmp_path: Path) -> None:
    plain = list(with_ids(some(5)))
    said = [*plain]
    said[1] = replace(plain[1], weight=0.25, repeats=3)
    said[3] = replace(plain[3], control_keys=(b"c" * 16, bytes(16)))
    listed = {0: plain, 1: [replace(plain[0], weight=0.5), *plain[1:]], 3: said}
    digests = set()
    for columns_more, each in listed.items():
        digest, file_digest = write_samples(tmp_path, each)
        digests |= {digest, samples_digest(each)}
        manifest = Manifest(
            format="zarr", tables={}, samples=5, samples_digest=digest, samples_file_digest=file_digest,
            index_digest="", rejected=0, rejected_digest="", models={},
        )  # fmt: skip
        table = read_samples(tmp_path, manifest)
        assert table.schema.equals(sample_schema())
        assert sample_list(table) == each
        assert list(samples_in_columns(tmp_path, manifest)) == each
        assert len(pq.read_schema(tmp_path / manifest.samples_file).names) == 7 + columns_more
        some_columns = read_some_samples(tmp_path, manifest, np.array([1, 3]), ["weight", "name"])
        assert [row["weight"] for row in some_columns] == [each[1].weight, each[3].weight]
    assert len(digests) == 3
    # That of samples that say nothing more is what it was before there was more to say.
    lines = [json.dumps([s.id, s.name, [key.hex() for key in s.caption_keys]], separators=(",", ":")) for s in plain]
    assert samples_digest(plain) == hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


def test_samples_lie_in_the_same_bytes_however_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed, cut = list(with_ids(some(50))), {bytes(16): 3, b"x" * 16: 1}
    notes = {"kcache_tokens_cut": json.dumps({"00" * 16: 3}, separators=(",", ":"))}
    schema = pa.schema(list(sample_schema())[:7]).with_metadata(notes)  # none says anything by the other columns
    monkeypatch.setattr(samples, "_ROW_GROUP", 20)
    pq.write_table(
        table_of(listed).select(schema.names).cast(schema),
        expected := io.BytesIO(),
        compression="zstd",
        row_group_size=20,
    )
    for per_table in (1, 7, 20, 1000):
        monkeypatch.setattr(columns, "SAMPLES_PER_TABLE", per_table)
        _, digest = write_samples(tmp_path, listed, cut)
        assert (tmp_path / f"samples-{digest[:16]}.parquet").read_bytes() == expected.getvalue()
    assert len(list(tmp_path.iterdir())) == 1


def test_the_digest_is_that_of_lines_of_json() -> None:
    lines = [[s.id, s.name, [key.hex() for key in s.caption_keys]] for s in with_ids(some(9))]
    expected = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    assert samples_digest(some(0)) == hashlib.sha256().hexdigest()
    assert samples_digest(with_ids(some(9))) == hashlib.sha256(expected.encode()).hexdigest()


def test_reading_the_samples_leaves_no_threads_behind(tmp_path: Path) -> None:
    """One of Arrow's that still holds a file or bytes of Python's when a short command ends would abort it."""
    sample = Sample(
        id="00", name="a", image_key=bytes(16), captions=("b",), caption_keys=(bytes(16),), width=3, height=4
    )
    _, digest = write_samples(tmp_path, [sample])
    told = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path), digest], capture_output=True, text=True, check=True
    )
    assert told.stdout == "3 1 1 0\n"


ALONE = """
import os, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pyarrow, pyarrow.parquet
from kcache.store.samples import read_some_samples, short_sides, stored_samples
folder, digest = sys.argv[1:]
file = f"samples-{digest[:16]}.parquet"
manifest = SimpleNamespace(samples_file=file, samples_file_digest=digest, samples=1)
before = len(os.listdir("/proc/self/task"))
side = short_sides(Path(folder), manifest)[0]
some = read_some_samples(Path(folder), manifest, np.zeros(1, int), ["id"])
rows = len(stored_samples(Path(folder), manifest)), len(some)
print(side, *rows, len(os.listdir("/proc/self/task")) - before)
"""
