"""The index: the same entries in parts as whole, wherever it lies; a part is looked at once, and told when damaged."""

import hashlib
import io
import json
import os
import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from in_bucket import damage
from measuring.synthetic import synthetic_recipe

from kcache.disk import scratch, sweeping
from kcache.errors import CacheCorruptError
from kcache.places import Place, place_of
from kcache.places.bucket import BucketPath
from kcache.places.effects import remove, write_bytes
from kcache.store import index
from kcache.store.digests import Keys
from kcache.store.formats import index_files, parts
from kcache.store.formats.columns import Sample, Samples
from kcache.store.formats.parts import PARTS, Parts, Rows, in_memory, write_rows
from kcache.store.formats.sample_extras import count_arrays
from kcache.store.formats.shard_files import CommittedFile
from kcache.store.formats.side_files import side_dtype
from kcache.store.index import (
    CAPTION_BOUNDS,
    StoredRows,
    bytes_of,
    index_dtype,
    merged_rows,
    open_index,
    stored_rows,
    write_index,
)
from kcache.store.manifest import Manifest, ShardEntry, TableEntry
from kcache.store.recipe import Field, json_digest
from kcache.store.shards import Commit

SAMPLES, SHARDS = 100, 3
RECIPES = [
    synthetic_recipe("image_embeds", (Field(name="image_embeds", shape=(4,)),), "float16"),
    synthetic_recipe("text", (Field(name="text_encoder_hidden_states", shape=(4,), ragged=True),), "float16"),
]
ROWS_PER_PART = {"image_embeds": 8, "text": 8, CAPTION_BOUNDS: 32}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(parts, "_PART_BYTES", 256)
    monkeypatch.setattr(index_files, "_SOON", 0)
    monkeypatch.setenv("KCACHE_HOME", str(tmp_path / "home"))


@pytest.fixture(params=["disk", "bucket"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache" if request.param == "disk" else place_of(f"memory://indexes/{secrets.token_hex(6)}")


def some_arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    bounds = np.concatenate([[0], np.cumsum(rng.integers(1, 4, SAMPLES))]).astype(np.int64)
    arrays = {CAPTION_BOUNDS: bounds}
    for recipe in RECIPES:
        rows = (int(bounds[-1]) if recipe.table == "text" else SAMPLES) + 1
        arrays[recipe.table] = np.zeros(rows, index_dtype(recipe.fields))
        arrays[recipe.table]["shard"] = rng.integers(0, SHARDS, rows)
        for field in recipe.fields:
            arrays[recipe.table][field.name]["offset"] = rng.integers(0, 1 << 40, rows)
            arrays[recipe.table][field.name]["length"] = 8 * (rng.integers(1, 9, rows) if field.ragged else 1)
    return arrays


def written(cache: Place, arrays: dict[str, np.ndarray], mark: str = "-0123456789abcdef") -> Manifest:
    """The manifest of a cache that has this index; without a `mark` its shards are named by number alone."""
    names = [f"0000{i}" for i in range(SHARDS)]
    tables = {
        recipe.table: TableEntry(
            recipe=recipe, rows=9, bytes=9,
            shards=tuple(ShardEntry(name=n, data=f"{recipe.directory}/{n}{mark}", rows=3, bytes=3) for n in names),
        )
        for recipe in RECIPES
    }  # fmt: skip
    digest = write_index(cache, {name: in_memory(array) for name, array in arrays.items()}, in_parts=bool(mark))
    return Manifest(
        format="zarr", tables=tables, samples=SAMPLES, samples_digest="0" * 64, samples_file_digest="0" * 64,
        index_digest=digest, rejected=0, rejected_digest="0" * 64, models={},
    )  # fmt: skip


KEY = st.integers(0, 30).map(lambda i: i.to_bytes(15, "big") + b"\0")


@given(folders=st.lists(st.lists(st.lists(KEY, max_size=6, unique=True), max_size=4), max_size=3), few=st.booleans())
def test_of_a_key_that_was_committed_again_the_last_row_counts(folders: list[list[list[bytes]]], few: bool) -> None:
    """Each folder has shards, each of these keys: as a dictionary says it that is written in their order."""
    [field] = RECIPES[0].fields
    of_folders, expected, shard = list[StoredRows](), dict[bytes, tuple[int, int]](), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scratch, "_IN_MEMORY", 1 << 20 if few else 40)
        patch.setattr(index, "_TOGETHER", 1 << 20 if few else 3)
        for number, keys_of in enumerate(folders):
            sides = [np.zeros(len(keys), side_dtype([field])) for keys in keys_of]
            for side, keys in zip(sides, keys_of, strict=True):
                side["key"], side[field.name]["offset"] = Keys.of(keys).packed, np.arange(len(keys))
                expected |= {key: (shard, i) for i, key in enumerate(keys)}
                shard += 1
            commits = [COMMIT] * len(keys_of)
            patch.setattr(index, "read_side_files", lambda *_, sides=sides: iter(sides))
            of_folders.append(stored_rows(Path(f"folder-{number}"), commits, RECIPES[0]))
        stored = merged_rows(RECIPES[0], of_folders)
    assert list(stored.known) == sorted(expected)
    assert [entry.data for entry in stored.shards] == [f"folder-{i}/0" for i, of in enumerate(folders) for _ in of]
    asked = [i.to_bytes(15, "big") + b"\0" for i in range(31)]
    found = stored.find(asked).tolist()
    entries = [(int(e["shard"]), int(e[field.name]["offset"])) for e in stored.entries[[i for i in found if i >= 0]]]
    assert entries == [expected[key] for key in asked if key in expected]
    assert [key for key, at in zip(asked, found, strict=True) if at >= 0] == [key for key in asked if key in expected]
    assert stored.used([*asked, *asked]) == len(expected)


COMMIT = Commit(
    name="0", fingerprint="", rows=0, data="0", files=(CommittedFile(path="0.rows.npy", bytes=0, crc32c=0),),
    rejected=(), absent=(), provenance={},
)  # fmt: skip


ASKED: list[Any] = [
    np.array([5, 0, 99, 5]), np.array([-1, 3, -100]), [7, -1], np.array([], np.int64), 42, -1,
    slice(3, 60), slice(None), slice(50, 3, -7), slice(0, 0), np.arange(101) % 7 == 0,
]  # fmt: skip


@pytest.mark.parametrize("rows", ASKED, ids=str)
def test_parts_give_what_the_array_gives(cache: Place, rows: Any) -> None:
    arrays = some_arrays()
    found = open_index(cache, written(cache, arrays))["image_embeds"]
    assert isinstance(found, Parts)
    assert (len(found), found.shape, found.dtype) == (101, (101,), arrays["image_embeds"].dtype)
    assert np.array_equal(found[rows], arrays["image_embeds"][rows])


@pytest.mark.parametrize("mark", ["-0123456789abcdef", ""], ids=["in parts", "whole"])
def test_an_index_is_read_as_it_was_written(cache: Place, mark: str) -> None:
    arrays = some_arrays()
    manifest = written(cache, arrays, mark)
    for whole in (False, True):
        found = open_index(cache, manifest, whole=whole)
        assert found.keys() == arrays.keys()
        assert all(np.array_equal(np.asarray(found[name]), arrays[name]) for name in arrays)
        assert np.array_equal(found["text"]["shard"], arrays["text"]["shard"])
        name = "text_encoder_hidden_states"
        assert bytes_of(found["text"], name) == arrays["text"][name]["length"].sum()
    before = sorted(cache.iterdir())
    assert written(cache, arrays, mark) == manifest
    assert sorted(cache.iterdir()) == before


def test_an_index_of_schema_1_keeps_its_digest(tmp_path: Path) -> None:
    arrays = some_arrays()
    manifest = written(tmp_path, arrays, mark="")
    files = {name: (tmp_path / manifest.index_folder / f"{name}.npy").read_bytes() for name in arrays}
    sums = [[name, len(content), parts.crc32c(content)] for name, content in sorted(files.items())]
    assert manifest.index_digest == json_digest(sums)
    assert not (tmp_path / manifest.index_folder / PARTS).exists()


def test_rows_are_written_as_numpy_does(tmp_path: Path) -> None:
    array = some_arrays()["text"]
    write_rows(tmp_path / "rows.npy", Rows(array.dtype, len(array), np.array_split(array, 7)))
    np.save(expected := io.BytesIO(), array)
    assert (tmp_path / "rows.npy").read_bytes() == expected.getvalue()


def test_only_a_touched_part_is_looked_at(tmp_path: Path) -> None:
    arrays = some_arrays()
    manifest = written(tmp_path, arrays)
    path = tmp_path / manifest.index_folder / "image_embeds.npy"
    content = bytearray(path.read_bytes())
    content[-1 - 2 * 20] ^= 1  # in the last part but none before: 101 entries in parts of 8
    path.write_bytes(content)
    found = open_index(tmp_path, manifest)["image_embeds"]
    assert np.array_equal(found[:96], arrays["image_embeds"][:96])
    for rows in (100, slice(90, 101), "shard", np.array([0, 97])):
        with pytest.raises(CacheCorruptError, match=r"image_embeds.npy is corrupt in part 12, .*build the cache again"):
            found[rows]
    with pytest.raises(CacheCorruptError, match="part 12"):
        open_index(tmp_path, manifest, whole=True)
    assert written(tmp_path, arrays) == manifest  # and is whole again
    open_index(tmp_path, manifest, whole=True)


def test_small_indexes_are_looked_at_when_they_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = written(tmp_path, some_arrays())
    path = tmp_path / manifest.index_folder / "text.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    monkeypatch.setattr(index_files, "_SOON", 1 << 20)
    with pytest.raises(CacheCorruptError, match=r"text\.npy is corrupt in part"):
        open_index(tmp_path, manifest)


def test_parts_of_a_bucket_are_fetched_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache, arrays = BucketPath.of(f"memory://indexes/{secrets.token_hex(6)}"), some_arrays()
    manifest = written(cache, arrays)
    asked, read = list[tuple[str, int, int]](), BucketPath.read_range
    monkeypatch.setattr(
        BucketPath, "read_range", lambda path, *span: asked.append((path.name, *span)) or read(path, *span)
    )
    found = open_index(cache, manifest)["image_embeds"]
    assert asked == []
    rows = np.array([50, 9, 10, 53])
    assert np.array_equal(found[rows], arrays["image_embeds"][rows])
    begins = found.parted.begins
    assert sorted(asked) == [("image_embeds.npy", begins + 160, 160), ("image_embeds.npy", begins + 48 * 20, 160)]
    found = open_index(cache, manifest)["image_embeds"]  # as another process does
    assert np.array_equal(found[rows], arrays["image_embeds"][rows])
    assert len(asked) == 2
    [kept] = (tmp_path / "home").glob("*/*/image_embeds.npy")
    with kept.open("r+b") as file:
        file.seek(begins + 160)
        file.write(b"damage")
    found = open_index(cache, manifest)["image_embeds"]
    assert np.array_equal(found[rows], arrays["image_embeds"][rows])
    assert len(asked) == 3
    assert np.array_equal(np.asarray(found), arrays["image_embeds"])
    assert len(asked) < 3 + len(found.parted.crc32c)


def test_a_damaged_part_in_a_bucket_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = BucketPath.of(f"memory://indexes/{secrets.token_hex(6)}")
    manifest = written(cache, some_arrays())
    damage(cache / manifest.index_folder / "text.npy", -1)
    found = open_index(cache, manifest)["text"]
    with pytest.raises(CacheCorruptError, match=r"memory://.*text.npy is corrupt .* fetched 3 times, .*; remove"):
        found[-1]


def touch(index: dict[str, np.ndarray]) -> None:
    for array in index.values():
        array[:]


def told_wrongly(arrays: dict[str, np.ndarray], wrong: str) -> None:
    if wrong == "shard":
        arrays["image_embeds"]["shard"][70] = SHARDS
    elif wrong == "length":
        arrays["text"]["text_encoder_hidden_states"]["length"][-1] = 5
    elif wrong == "order":
        arrays[CAPTION_BOUNDS][40] = arrays[CAPTION_BOUNDS][41]
    elif wrong == "border":
        arrays[CAPTION_BOUNDS][32] = arrays[CAPTION_BOUNDS][31]  # parts have 32
    else:
        arrays[wrong] = arrays[wrong][:-1]


@pytest.mark.parametrize("wrong", ["shard", "length", "order", "border", "text", "image_embeds", CAPTION_BOUNDS])
def test_entries_that_cannot_be_are_told(cache: Place, wrong: str) -> None:
    arrays = some_arrays()
    told_wrongly(arrays, wrong)
    manifest = written(cache, arrays)
    for whole in (False, True):
        with pytest.raises(CacheCorruptError, match="build the cache again"):
            touch(open_index(cache, manifest, whole=whole))


def test_another_list_of_parts_is_told(cache: Place) -> None:
    manifest = written(cache, some_arrays())
    path = cache / manifest.index_folder / PARTS
    write_bytes(path, path.read_bytes().replace(b"1", b"2", 1))
    with pytest.raises(CacheCorruptError, match="sha256"):
        open_index(cache, manifest)
    remove(path)
    with pytest.raises(CacheCorruptError, match="is not there"):
        open_index(cache, manifest)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("rows_per_part", 7, "says that text has"), ("rows_per_part", 0, "says that text has"),
        ("crc32c", [], "says that text has"), ("begins", -1, "no numbers"), ("crc32c", ["x"], "no numbers"),
        ("begins", 1 << 40, "bytes instead of"), ("borders", None, "cannot be read"), ("more", 1, "cannot be read"),
    ],
)  # fmt: skip
def test_a_list_of_parts_that_cannot_be_is_told(tmp_path: Path, name: str, value: Any, said: str) -> None:
    manifest = written(tmp_path, some_arrays())
    folder = tmp_path / manifest.index_folder
    listed = json.loads((folder / PARTS).read_bytes())
    listed["arrays"]["text"][name] = value
    (folder / PARTS).write_bytes(content := json.dumps(listed).encode())
    manifest = replace(manifest, index_digest=hashlib.sha256(content).hexdigest())
    folder.rename(tmp_path / manifest.index_folder)
    with pytest.raises(CacheCorruptError, match=said):
        open_index(tmp_path, manifest)


def test_an_index_of_a_bucket_is_not_swept_away_while_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process sweeps just after it was found whole."""
    monkeypatch.setattr(sweeping, "_held", {})
    arrays, cache = some_arrays(), place_of(f"memory://indexes/{secrets.token_hex(6)}")
    manifest, digest_of = written(cache, arrays, mark=""), index_files._index_digest
    open_index(cache, manifest)
    for descriptor in sweeping._held.values():
        os.close(descriptor)
    sweeping._held.clear()

    def swept_meanwhile(folder: Path, names: list[str]) -> str:
        found = digest_of(folder, names)
        sweeping.sweep(tmp_path / "home/index", -1)
        return found

    monkeypatch.setattr(index_files, "_index_digest", swept_meanwhile)
    opened = open_index(cache, manifest)
    assert all(np.array_equal(opened[name], array) for name, array in arrays.items())


@pytest.mark.parametrize("mark", ["-0123456789abcdef", ""], ids=["in parts", "whole"])
def test_what_samples_count_is_there_where_any_says_it(cache: Place, mark: str) -> None:
    """In the samples' order, checked: by the digests, and by what a weight and repeats can be."""
    samples = [
        Sample(name=f"{i}", image_key=bytes(16), captions=(), caption_keys=(), weight=0.1 * (i == 3), repeats=1 + i % 3)
        for i in range(SAMPLES)
    ]
    arrays = some_arrays()
    counts = {name: np.concatenate(list(rows.runs)) for name, rows in count_arrays(Samples.of(samples)).items()}
    assert (counts["weight"].dtype, counts["repeats"].dtype) == (np.float32, np.int32)
    found = open_index(cache, written(cache, arrays | counts, mark))
    assert np.asarray(found["weight"]).tolist() == [np.float32(sample.weight) for sample in samples]
    assert np.asarray(found["repeats"]).tolist() == [sample.repeats for sample in samples]
    for name, wrong in {"weight": [np.nan, -1, np.inf], "repeats": [0, -1]}.items():
        for value in wrong:
            broken = counts[name].copy()
            broken[5] = value
            with pytest.raises(CacheCorruptError, match=f"{name}.npy has {value}.*build the cache again"):
                np.asarray(open_index(cache, written(cache, arrays | {name: broken}, mark))[name])
    with pytest.raises(CacheCorruptError, match=r"weight.npy has shape \(99,\)"):
        open_index(cache, written(cache, arrays | {"weight": counts["weight"][1:]}, mark))
    assert count_arrays(Samples.of([replace(each, weight=1.0, repeats=1) for each in samples])) == {}
