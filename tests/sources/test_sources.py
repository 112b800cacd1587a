"""A source offers what it can, names all it cannot, and never leaves its folder."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from source_folders import offered, reasons, write

from kcache.config import SourceConfig
from kcache.disk.memo import DigestMemo
from kcache.errors import InputRejected, SourceError
from kcache.sources import open_source
from kcache.sources.reading import caption_tuple
from kcache.store.digests import content_key

IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture
def memo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DigestMemo]:
    with DigestMemo(tmp_path_factory.mktemp("memo") / "digests.sqlite") as memo:
        yield memo


# ---- datasets of rows


def rows_table(images: list[bytes | None], texts: list[Any], text_type: pa.DataType | None = None) -> pa.Table:
    cells = [None if image is None else {"bytes": image, "path": None} for image in images]
    return pa.table({"image": pa.array(cells, IMAGE_TYPE), "text": pa.array(texts, text_type)})


def save_parquet(folder: Path, table: pa.Table) -> str:
    pq.write_table(table.slice(0, 2), folder / "train-0.parquet", row_group_size=1)
    pq.write_table(table.slice(2), folder / "train-1.parquet")
    return str(folder)


def save_dataset(folder: Path, table: pa.Table) -> str:
    dataset = datasets.Dataset(table).cast_column("image", datasets.Image(decode=False))
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(folder, num_shards={"train": 2, "test": 1})
    return str(folder)


@pytest.mark.parametrize(
    ("save", "names"),
    [
        (save_parquet, ["train-0.parquet row 0", "train-0.parquet row 1", "train-1.parquet row 0"]),
        (save_dataset, ["train row 0", "train row 1", "train row 2"]),
    ],
)
def test_tables_offer_their_rows_in_order(
    tmp_path: Path, memo: DigestMemo, save: Callable[[Path, pa.Table], str], names: list[str]
) -> None:
    source = open_source(save(tmp_path, rows_table([b"A", b"B", b"C"], ["a", "", "c"])))
    assert list(offered(source).items()) == list(zip(names, [("a",), ("",), ("c",)], strict=True))
    assert [source.image(i) for i in (2, 0, 1)] == [b"C", b"A", b"B"]
    assert [source.image_key(i, memo, False) for i in (2, 0, 1)] == [content_key(c) for c in (b"C", b"A", b"B")]


@pytest.mark.parametrize("save", [save_parquet, save_dataset])
def test_refused_rows_leave_the_others_with_their_own_captions(
    tmp_path: Path, memo: DigestMemo, save: Callable[[Path, pa.Table], str]
) -> None:
    table = rows_table([b"A", b"B", None, b"D"], [["a", "aa"], None, ["c"], ["d"]])
    source = open_source(save(tmp_path, table))
    assert list(offered(source).values()) == [("a", "aa"), ("c",), ("d",)]
    assert [refusal.reason[:10] for refusal in source.refused] == ["no caption"]
    assert (source.image(2), source.image_key(2, memo, False)) == (b"D", content_key(b"D"))
    for read in (lambda: source.image(1), lambda: source.image_key(1, memo, False)):
        with pytest.raises(InputRejected, match="no image in column 'image'"):
            read()


def test_rows_of_an_unchanged_file_are_digested_once(
    tmp_path: Path, memo: DigestMemo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kcache.disk.memo._RACY_NS", -10_000_000_000)
    path = save_parquet(tmp_path, rows_table([b"A", b"B", b"C"], ["a", "b", "c"]))
    first = [open_source(path).image_key(i, memo, False) for i in range(3)]
    monkeypatch.setattr("kcache.sources.arrow_files.content_key", lambda content: pytest.fail("digested again"))
    source = open_source(path)
    assert [source.image_key(i, memo, False) for i in range(3)] == first
    with pytest.raises(pytest.fail.Exception, match="digested again"):
        source.image_key(0, memo, True)


def test_chunks_let_go_of_are_read_again_from_any_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kcache.sources.arrow_files._HELD_BYTES", 0)
    contents = [bytes([i]) * 10 for i in range(50)]
    pq.write_table(rows_table(list(contents), ["a"] * 50), tmp_path / "x.parquet", row_group_size=3)
    source = open_source(str(tmp_path))
    order = [i * 17 % 50 for i in range(200)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(source.image, order)) == [contents[i] for i in order]


def test_max_train_samples_takes_the_first_rows(tmp_path: Path) -> None:
    path = save_parquet(tmp_path, rows_table([b"A", b"B", b"C", b"D"], [None, "b", "c", "d"]))
    source = open_source(path, max_train_samples=2)
    assert list(offered(source)) == ["train-0.parquet row 1", "train-1.parquet row 0"]


def test_plain_binary_column_and_categories_of_pandas(tmp_path: Path) -> None:
    captions = pa.array(["a", "b", "a"]).dictionary_encode()
    pq.write_table(pa.table({"jpg": [b"A", b"B", b"C"], "caption": captions}), tmp_path / "x.parquet")
    source = open_source(str(tmp_path / "x.parquet"), SourceConfig(image_column="jpg", caption_column="caption"))
    assert list(offered(source).values()) == [("a",), ("b",), ("a",)]
    assert source.image(1) == b"B"


def test_caption_bytes_that_are_not_utf8_cost_their_row_only(tmp_path: Path) -> None:
    broken = pa.array([b"caf\xe9", b"good"]).view(pa.string())
    pq.write_table(rows_table([b"A", b"B"], ["", ""]).set_column(1, "text", broken), tmp_path / "x.parquet")
    source = open_source(str(tmp_path))
    assert list(offered(source).values()) == [("good",)]
    assert "not UTF-8" in reasons(source)["x.parquet row 0"]


def test_paths_in_rows_stay_in_the_folder(tmp_path: Path, memo: DigestMemo) -> None:
    folder = write(tmp_path / "data", {"a.jpg": b"A", "../secret.jpg": b"secret"})
    paths = ["a.jpg", "../secret.jpg", str(tmp_path / "secret.jpg"), "none.jpg"]
    images = pa.array([{"bytes": None, "path": path} for path in paths], IMAGE_TYPE)
    pq.write_table(pa.table({"image": images, "text": ["a"] * 4}), folder / "x.parquet")
    source = open_source(str(folder / "x.parquet"))
    assert (source.image(0), source.image_key(0, memo, False)) == (b"A", content_key(b"A"))
    for i, reason in [(1, "leads out"), (2, "leads out"), (3, "no readable file")]:
        with pytest.raises(InputRejected, match=reason):
            source.image(i)
        with pytest.raises(InputRejected, match=reason):
            source.image_key(i, memo, False)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"picture": [b"A"], "text": ["a"]}, r"no column 'image'; found picture, text; .*--image-column"),
        ({"image": [b"A"], "prompt": ["a"]}, r"no column 'text'; found image, prompt; .*--caption-column"),
        (
            {"image": ["a.jpg"], "text": ["a"]},
            r"column 'image' that holds string; expected image bytes.*URLs .* not fetched",
        ),
        ({"image": [b"A"], "text": [3]}, r"column 'text' that holds int64; expected strings"),
        ({"image": [b"A"], "text": pa.array([None], pa.string())}, r"offers no sample: all 1 .*row 0: no caption"),
        ({"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())}, r"offers no sample: it is empty"),
    ],
)
def test_unfit_columns_are_errors_that_say_what_is_there(tmp_path: Path, columns: Any, message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(SourceError, match=message):
        open_source(str(tmp_path))


def test_rows_need_no_caption_column_when_captions_are_not_needed(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"A", b"B"]}), tmp_path / "x.parquet")
    source = open_source(str(tmp_path), need_captions=False)
    assert list(offered(source).values()) == [(), ()]
    assert source.description == "parquet: 2 images from column 'image', no captions"


@pytest.mark.parametrize("size", [0, 10, 200])
def test_cut_parquet_file_is_an_error(tmp_path: Path, size: int) -> None:
    pq.write_table(rows_table([b"A"], ["a"]), tmp_path / "x.parquet")
    os.truncate(tmp_path / "x.parquet", size)
    with pytest.raises(SourceError, match=r"x\.parquet (cannot be read|is no file of rows: it is an empty file)"):
        open_source(str(tmp_path))


def test_damaged_row_group_rejects_its_rows(tmp_path: Path, memo: DigestMemo) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(rows_table([b"A" * 5000, b"B" * 5000], ["a", "b"]), path, compression="none", row_group_size=1)
    content = bytearray(path.read_bytes())
    content[4:40] = b"\xff" * 36
    path.write_bytes(content)
    source = open_source(str(tmp_path))
    with pytest.raises(InputRejected, match=r"x\.parquet cannot be read"):
        source.image_key(0, memo, False)
    assert source.image(1) == b"B" * 5000


def test_images_beside_parquet_files_are_named(tmp_path: Path) -> None:
    pq.write_table(rows_table([b"A"], ["a"]), tmp_path / "x.parquet")
    write(tmp_path, {"banner.png": b""})
    assert set(reasons(open_source(str(tmp_path)))) == {"banner.png"}


def test_saved_dataset_without_train_split_names_the_splits(tmp_path: Path) -> None:
    write(tmp_path, {"dataset_dict.json": '{"splits": ["test"]}'})
    with pytest.raises(SourceError, match=r"no split 'train'; found test; .*--split test"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("state", ["", "[]", "{}", '{"_data_files": [{"filename": "../secret.arrow"}]}'])
def test_saved_dataset_with_a_foreign_state_is_refused(tmp_path: Path, state: str) -> None:
    write(tmp_path, {"data/state.json": state, "data/dataset_info.json": "{}", "secret.arrow": b""})
    with pytest.raises(SourceError, match=r"state\.json"):
        open_source(str(tmp_path / "data"))


# ---- the Hub, and what is no source


def test_hub_dataset_is_the_train_split_undecoded(
    tmp_path: Path, memo: DigestMemo, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(rows_table([b"A", b"B"], ["a", "b"]), tmp_path / "x.parquet")
    load, cache = datasets.load_dataset, str(tmp_path / "cache")

    def load_local(name: str, *, split: str, keep_in_memory: bool) -> datasets.Dataset:
        assert (name, split, keep_in_memory) == ("owner/pictures", "train", False)
        return load("parquet", data_files={"train": str(tmp_path / "x.parquet")}, split=split, cache_dir=cache)

    monkeypatch.setattr(datasets, "load_dataset", load_local)
    source = open_source("owner/pictures")
    assert offered(source) == {"owner/pictures row 0": ("a",), "owner/pictures row 1": ("b",)}
    assert (source.image(1), source.image_key(1, memo, False)) == (b"B", content_key(b"B"))
    assert source.description.startswith("Hub dataset: 2 images")


def test_hub_dataset_that_cannot_be_loaded_is_a_source_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(SourceError, match=r"'data/naruto' is no folder or file here, .*offline.*go online"):
        open_source("data/naruto")


@pytest.mark.parametrize("spec", ["nowhere", "/nowhere/at/all", "a/b/c", "x" * 5000, "nul\0"])
def test_what_is_not_there_is_a_source_error(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=r"metadata\.jsonl"):
        open_source(spec)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("photos/a.jpg", r"one file \(it is a JPEG picture by its first bytes\); .*; give the folder that holds"),
        ("photos/b.zip", r"one file \(it is a zip archive; unpack it"),
        ("photos/*.jpg", "is a pattern, .*; give the folder 'photos'"),
        ("$PLACE/photos", r"did you mean .*/photos\?"),
        ("~/photos", r"did you mean .*/photos\?"),
        ("'photos'", r"did you mean photos\?"),
        ("photos\n", r"did you mean photos\?"),
        ("a\\b", r"did you mean a/b\?"),
        ("~/x/{0..1}.tar", r"2 of the 2 tars .* missing, .* correct the pattern"),
        ("~/photos/{0..1}.tar", r"2 of the 2 tars .* missing, .*; did you mean the folder .*/photos\?"),
        ("C:\\photos", "is a path of Windows, .* /mnt/c"),
        ("", "no path; .*if it is a variable, set it"),
        ("/dev/null", "neither a file nor a folder"),
        ("owner/name@main", "for the Hub's dataset owner/name, give only that id"),
        ("datasets/owner/name", "for the Hub's dataset owner/name, give only that id"),
        ("https://huggingface.co/datasets/owner/name/tree/main", "give its id, 'owner/name'"),
        ("file://localhost/my%20photos", "there is no file or folder '/my photos'"),
        ("saved", "holds saved/inner, which save_to_disk wrote; give"),
        ("hidden", "begin with a dot are hidden, and not read"),
        ("a", r"b/x.arrow: .* rows are read from parquet files and from folders that save_to_disk wrote"),
    ],
)
def test_what_is_meant_is_said(spec: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLACE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    write(
        tmp_path,
        {"photos/a.jpg": b"\xff\xd8\xff\xe0", "photos/b.zip": b"PK\3\4", "hidden/.a.jpg": b"", "a/b/x.arrow": b""},
    )
    write(tmp_path, {"saved/saved/inner/state.json": "{}", "saved/saved/inner/dataset_info.json": "{}"})
    with pytest.raises(SourceError, match=said):
        open_source(spec)


def test_columns_of_one_name_cost_their_file(tmp_path: Path) -> None:
    pq.write_table(pa.table([[b"A"], ["a"], ["b"]], names=["image", "text", "text"]), tmp_path / "x.parquet")
    with pytest.raises(SourceError, match="has 2 columns 'text'"):
        open_source(str(tmp_path))


def test_text_that_is_kept_as_bytes_is_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"A", b"B"], "text": [b"a", b"\xff"]}), tmp_path / "x.parquet")
    source = open_source(str(tmp_path))
    assert offered(source) == {"x.parquet row 0": ("a",)}
    assert "not valid Unicode" in reasons(source)["x.parquet row 1"]


# ---- captions


@given(st.one_of(st.none(), st.text(), st.integers(), st.lists(st.one_of(st.text(), st.none(), st.binary()))))
def test_captions_are_valid_text_or_rejected(cell: object) -> None:
    wanted = [each for each in cell if each is not None] if isinstance(cell, list) else [cell]
    if wanted and all(isinstance(caption, str) and "\0" not in caption for caption in wanted):
        assert list(caption_tuple(cell, needed=True)) == wanted
    else:
        with pytest.raises(InputRejected) as rejected:
            caption_tuple(cell, needed=True)
        assert "\n" not in rejected.value.reason
        assert rejected.value.reason.encode().decode() == rejected.value.reason
