"""A folder of pictures: whose captions are whose, what is named instead of read, and nothing from outside."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from source_folders import metadata, offered, reasons, write

from kcache.config import SourceConfig
from kcache.disk.memo import DigestMemo
from kcache.errors import InputRejected, SourceError
from kcache.sources import open_source
from kcache.store.digests import content_key


@pytest.fixture
def memo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DigestMemo]:
    with DigestMemo(tmp_path_factory.mktemp("memo") / "digests.sqlite") as memo:
        yield memo


# ---- folders with metadata


def test_imagefolder_joins_rows_and_images_by_path(tmp_path: Path, memo: DigestMemo) -> None:
    rows = metadata({"file_name": "sub/b.png", "text": ["one", "two"]}, {"file_name": "./a.jpg", "text": ""})
    write(tmp_path, {"metadata.jsonl": rows, "a.jpg": b"A", "sub/b.png": b"B", "README.md": "about"})
    source = open_source(str(tmp_path))
    assert offered(source) == {"a.jpg": ("",), "sub/b.png": ("one", "two")}
    assert [source.image(i) for i in range(2)] == [b"A", b"B"]
    assert [source.image_key(i, memo, False) for i in range(2)] == [content_key(b"A"), content_key(b"B")]
    assert not source.refused
    assert source.description == "imagefolder: 2 images, 3 captions from metadata.jsonl column 'text'"


def test_metadata_in_sub_folders_is_relative_to_itself(tmp_path: Path) -> None:
    row = metadata({"file_name": "a.jpg", "text": "nested"})
    write(tmp_path, {"x/metadata.jsonl": row, "x/a.jpg": b"A", "y/metadata.csv": "text,file_name\nflat,a.jpg\n"})
    write(tmp_path, {"y/a.jpg": b"A"})
    assert offered(open_source(str(tmp_path))) == {"x/a.jpg": ("nested",), "y/a.jpg": ("flat",)}


def test_csv_captions_may_be_quoted_and_span_lines(tmp_path: Path) -> None:
    table = (
        '\ufefffile_name,caption\r\na.jpg,"a cat, ""sitting""\nstill"\r\nb.jpg,\r\nc.jpg,a cat, sitting\r\nd.jpg\r\n'
    )
    write(tmp_path, {"metadata.csv": table, **dict.fromkeys(["a.jpg", "b.jpg", "c.jpg", "d.jpg"], b"")})
    source = open_source(str(tmp_path), SourceConfig(caption_column="caption"))
    assert offered(source) == {"a.jpg": ('a cat, "sitting"\nstill',), "b.jpg": ("",)}
    assert "quote commas" in reasons(source)["metadata.csv line 5"]
    assert "quote commas" in reasons(source)["metadata.csv line 6"]


def test_image_without_a_row_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"metadata.jsonl": metadata({"file_name": "a.jpg", "text": "a"}), "a.jpg": b"", "b.jpg": b""})
    assert reasons(open_source(str(tmp_path))) == {
        "b.jpg": "no row of the metadata names it, and there is no 'b.txt' beside it"
    }


def test_captions_are_optional_when_not_needed(tmp_path: Path) -> None:
    rows = metadata({"file_name": "a.jpg", "text": "a"}, {"file_name": "b.jpg"}, {"file_name": "c.jpg", "text": 3})
    write(tmp_path, {"metadata.jsonl": rows, "a.jpg": b"", "b.jpg": b"", "c.jpg": b"", "d.jpg": b""})
    source = open_source(str(tmp_path), need_captions=False)
    assert offered(source) == {"a.jpg": ("a",), "b.jpg": (), "d.jpg": ()}
    assert "int" in reasons(source)["c.jpg"]


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        (None, "no caption"),
        ([], "no caption"),
        (7, "of type int"),
        ({"en": "a"}, "of type dict"),
        ([None], "no caption"),
        (["fine", 7], "of type int"),
        ("nul \0 inside", "NUL"),
        ("half \ud83d pair", "lone surrogate"),
    ],
)
def test_bad_caption_costs_its_image_only(tmp_path: Path, caption: object, reason: str) -> None:
    rows = metadata({"file_name": "a.jpg", "text": caption}, {"file_name": "b.jpg", "text": "good"})
    write(tmp_path, {"metadata.jsonl": rows, "a.jpg": b"", "b.jpg": b""})
    source = open_source(str(tmp_path))
    assert offered(source) == {"b.jpg": ("good",)}
    assert re.search(reason, reasons(source)["a.jpg"])


def test_one_image_is_not_called_several(tmp_path: Path) -> None:
    write(tmp_path, {"metadata.jsonl": metadata({"file_name": "a.jpg", "text": "a"}), "a.jpg": b""})
    assert open_source(str(tmp_path)).description.startswith("imagefolder: 1 image, captions")


def test_bytes_that_are_not_utf8_cost_their_row_only(tmp_path: Path) -> None:
    rows = b'{"file_name": "a.jpg", "text": "caf\xe9"}\n' + metadata({"file_name": "b.jpg", "text": "good"}).encode()
    write(tmp_path, {"metadata.jsonl": rows, "a.jpg": b"", "b.jpg": b""})
    source = open_source(str(tmp_path))
    assert offered(source) == {"b.jpg": ("good",)}
    assert "not UTF-8" in reasons(source)["a.jpg"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", "JSON object"),
        ("[" * 100_000, "JSON object"),
        ('"a.jpg"', "JSON object"),
        ('{"text": "a"}', "file_name is None"),
        ('{"file_name": "../secret.jpg", "text": "a"}', "leads out"),
        ('{"file_name": "sub/../../secret.jpg", "text": "a"}', "leads out"),
        ('{"file_name": "/etc/passwd", "text": "a"}', "leads out"),
        ('{"file_name": "missing.jpg", "text": "a"}', "no readable file"),
        ('{"file_name": "", "text": "a"}', "not a file name"),
        (f'{{"file_name": "{"x" * 5000}", "text": "a"}}', "File name too long"),
        ('{"file_name": "a\\u0000.jpg", "text": "a"}', "not a file name"),
        ('{"file_name": "\\ud800.jpg", "text": "a"}', "not a file name"),
        ('{"file_name": "sub", "text": "a"}', "a folder"),
        ('{"file_name": "good.jpg", "text": 7}', "of type int"),
    ],
)
def test_bad_row_is_named_by_its_line(tmp_path: Path, line: str, reason: str) -> None:
    folder = write(tmp_path / "data", {"metadata.jsonl": metadata({"file_name": "good.jpg", "text": "good"}) + line})
    write(folder, {"good.jpg": b"", "sub/note": "", "../secret.jpg": b"secret"})
    source = open_source(str(folder))
    assert offered(source) == {"good.jpg": ("good",)}
    assert reason in reasons(source)["metadata.jsonl line 2"]


def test_links_may_not_leave_the_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", {"a.jpg": b"A", "a.txt": "a", "in.txt": "linked"})
    write(tmp_path, {"secret.jpg": b"secret", "more/c.jpg": b"secret"})
    (folder / "in.jpg").symlink_to(folder / "a.jpg")
    (folder / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "more").symlink_to(tmp_path / "more")
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    (folder / "gone.jpg").symlink_to(folder / "nothing")
    source = open_source(str(folder))
    assert offered(source) == {"a.jpg": ("a",), "in.jpg": ("linked",)}
    assert "outside the source" in reasons(source)["out.jpg"]
    assert "outside the source" in reasons(source)["more"]
    assert set(reasons(source)) == {"out.jpg", "more", "loop.jpg", "gone.jpg"}


def test_what_only_looks_like_an_image_file_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"a.jpg": b"A", "a.txt": "a", "folder.png/b.jpg": b"B", "folder.png/b.txt": "b"})
    os.mkfifo(tmp_path / "pipe.jpg")
    source = open_source(str(tmp_path))
    assert set(offered(source)) == {"a.jpg", "folder.png/b.jpg"}
    assert reasons(source) == {"folder.png": "a folder, not a file", "pipe.jpg": "not a regular file"}


def test_folder_reached_by_a_link_is_its_own_root(tmp_path: Path) -> None:
    write(tmp_path / "real", {"a.jpg": b"A", "a.txt": "a"})
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert offered(open_source(str(tmp_path / "link"))) == {"a.jpg": ("a",)}


def test_name_that_is_not_utf8_is_written_out(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    write(tmp_path, {name: b"A", name.replace(".jpg", ".txt"): "coffee"})
    source = open_source(str(tmp_path))
    assert offered(source) == {r"caf\udce9.jpg": ("coffee",)}
    assert source.image(0) == b"A"


def test_hidden_files_do_not_belong(tmp_path: Path) -> None:
    write(tmp_path, {"a.jpg": b"", "a.txt": "a", "._a.jpg": b"", ".git/b.jpg": b""})
    source = open_source(str(tmp_path))
    assert (set(offered(source)), reasons(source)) == ({"a.jpg"}, {})


def test_unknown_caption_column_lists_the_columns(tmp_path: Path) -> None:
    write(tmp_path, {"metadata.jsonl": metadata({"file_name": "a.jpg", "prompt": "a"}), "a.jpg": b""})
    with pytest.raises(SourceError, match=r"no column 'text'; found file_name, prompt; .*--caption-column"):
        open_source(str(tmp_path))


def test_csv_without_file_name_lists_the_columns(tmp_path: Path) -> None:
    write(tmp_path, {"metadata.csv": "image,text\na.jpg,a\n", "a.jpg": b""})
    with pytest.raises(SourceError, match=r"no column 'file_name'; found image, text"):
        open_source(str(tmp_path))


# ---- folders with a text file beside each image


def test_pairs_take_one_caption_per_line(tmp_path: Path) -> None:
    captions = "\ufefffirst\r\n\r\n  second\u2028still second \n"
    write(tmp_path, {"b.v1.jpg": b"", "b.v1.txt": captions, "a.PNG": b"", "a.txt": "\n"})
    source = open_source(str(tmp_path))
    assert offered(source) == {"a.PNG": ("",), "b.v1.jpg": ("first", "second\u2028still second")}
    assert source.description == "folder: 2 images, 3 captions from .txt files, one per line"


def test_unpaired_files_are_named(tmp_path: Path) -> None:
    write(tmp_path, {"a.jpg": b"", "a.txt": "a", "b.jpg": b"", "c.txt": "c", "d.jpg": b"", "d.txt": b"\xff"})
    source = open_source(str(tmp_path))
    assert offered(source) == {"a.jpg": ("a",)}
    assert set(reasons(source)) == {"b.jpg", "c.txt", "d.jpg"}
    assert "not UTF-8" in reasons(source)["d.jpg"]


def test_images_alone_serve_when_captions_are_not_needed(tmp_path: Path) -> None:
    write(tmp_path, {"a.jpg": b"", "b.jpg": b""})
    source = open_source(str(tmp_path), need_captions=False)
    assert offered(source) == {"a.jpg": (), "b.jpg": ()}
    with pytest.raises(SourceError, match=r"offers no sample: all 2 inputs .*a\.jpg: no captions"):
        open_source(str(tmp_path))


def test_max_train_samples_takes_the_first_by_path(tmp_path: Path) -> None:
    write(tmp_path, {f"{name}.{suffix}": name for name in "cab" for suffix in ("jpg", "txt")})
    assert set(offered(open_source(str(tmp_path), max_train_samples=2))) == {"a.jpg", "b.jpg"}


def test_image_that_vanished_is_rejected_by_name_of_stage(tmp_path: Path, memo: DigestMemo) -> None:
    write(tmp_path, {"a.jpg": b"", "a.txt": "a"})
    source = open_source(str(tmp_path))
    (tmp_path / "a.jpg").unlink()
    for read in (lambda: source.image(0), lambda: source.image_key(0, memo, False)):
        with pytest.raises(InputRejected, match="source: cannot be read: No such file"):
            read()
