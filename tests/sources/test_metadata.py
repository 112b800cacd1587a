"""Metadata and text files as tools and systems of all kinds write them: read, or named for what they plainly are."""

import json
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_folders import metadata, offered, reasons, write

from kcache.config import SourceConfig
from kcache.errors import SourceError
from kcache.sources import open_source

ROWS = [{"file_name": "a.jpg", "text": "a fox"}, {"file_name": "b.jpg", "text": "größer, ”so”"}]
PLAIN = 'file_name,text\na.jpg,a fox\nb.jpg,"größer, ”so”"\n'
FOUND = {"a.jpg": ("a fox",), "b.jpg": ("größer, ”so”",)}
IMAGES: dict[str, str | bytes] = {"a.jpg": b"A", "b.jpg": b"B"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.jsonl", metadata(*ROWS).encode("utf-16")),
        ("metadata.jsonl", metadata(*ROWS).replace("\n", "\r\n").encode("utf-8-sig")),
        ("metadata.jsonl", metadata(*ROWS).replace("\n", "\r").encode()),
        ("metadata.jsonl", json.dumps(ROWS, indent=2).encode()),
        ("metadata.jsonl", "\n".join(json.dumps(row, indent=2) for row in ROWS).encode()),
        ("Metadata.JSONL", metadata(*ROWS).encode()),
        ("metadata.json", json.dumps(ROWS).encode()),
        ("metadata.json", metadata(*ROWS).encode("utf-32")),
        ("metadata.csv", PLAIN.encode("utf-16")),
        ("metadata.csv", PLAIN.replace("\n", "\r").encode("utf-8-sig")),
        (
            "metadata.csv",
            PLAIN.replace("t\na.jpg,", "t \n\n\na.jpg, ").replace(",t", ", t").replace(',"', ', "').encode(),
        ),
        ("metadata.csv", PLAIN.replace("e,t", "e;t").replace("g,", "g;").encode()),
        ("metadata.csv", ("sep=;\r\n" + PLAIN.replace("e,t", "e;t").replace("g,", "g;") + ";\r\n").encode()),
        (
            "metadata.csv",
            PLAIN.replace("e,t", "e\tt").replace("g,", "g\t").encode("utf-16"),
        ),
        ("Metadata.TSV", PLAIN.replace("e,t", "e\tt").replace("g,", "g\t").encode()),
    ],
)
def test_metadata_of_any_make_is_read(tmp_path: Path, name: str, content: bytes) -> None:
    source = open_source(str(write(tmp_path, {name: content, **IMAGES})))
    assert offered(source) == FOUND
    assert not source.refused


def test_metadata_in_parquet_is_read(tmp_path: Path) -> None:
    write(tmp_path, {"sub/a.jpg": b"A", "sub/b.jpg": b"B"})
    columns = {"file_name": ["a.jpg", "b.jpg", "c.jpg"], "text": [["a fox", "a red fox"], None, ["c"]], "id": [1, 2, 3]}
    pq.write_table(pa.table(columns), tmp_path / "sub/metadata.parquet")
    source = open_source(str(tmp_path))
    assert offered(source) == {"sub/a.jpg": ("a fox", "a red fox")}
    assert "no caption in its row" in reasons(source)["sub/b.jpg"]
    assert "no readable file 'c.jpg'" in reasons(source)["sub/metadata.parquet row 2"]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_rows_of_one_picture_are_its_captions_in_their_order(tmp_path: Path, name: str) -> None:
    captions = ["one", "two", "two", "three", "one"]
    rows = [{"file_name": f"{image}.jpg", "text": f"{image} {text}"} for text in captions for image in "ab"]
    folder = write(tmp_path, {**IMAGES, "metadata.jsonl": metadata(*rows)})
    if name == "metadata.csv":
        lines = "".join(f"{row['file_name']},{row['text']}\n" for row in rows)
        write(folder, {name: "file_name,text\n" + lines})
    if name == "metadata.parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / name)
    if name != "metadata.jsonl":
        (folder / "metadata.jsonl").unlink()
    source = open_source(str(folder))
    assert offered(source) == {f"{image}.jpg": tuple(f"{image} {n}" for n in ("one", "two", "three")) for image in "ab"}
    assert not source.refused
    assert source.description == f"imagefolder: 2 images, 6 captions from {name} column 'text'"


def test_rows_of_several_files_are_joined(tmp_path: Path) -> None:
    rows = {
        "metadata.jsonl": metadata({"file_name": "x/a.jpg", "text": "all"}, {"file_name": "x/a.jpg", "text": 7}),
        "x/metadata.csv": "file_name,text\na.jpg,part\na.jpg,all\n",
    }
    source = open_source(str(write(tmp_path, {"x/a.jpg": b"A", **rows})))
    assert offered(source) == {"x/a.jpg": ("all", "part")}
    assert set(reasons(source)) == {"metadata.jsonl line 2"}


def test_stray_quote_costs_its_row_only(tmp_path: Path) -> None:
    rows = [
        'a.jpg,"a" fox',
        "b.jpg,b",
        'c.jpg,"never closed',
        "d.jpg,d",
        'e.jpg,a 5" fox',
        'f.jpg,"two\nlines"',
        "g.jpg,g",
    ]
    images = {f"{name}.jpg": b"" for name in "abcdefg"}
    source = open_source(str(write(tmp_path, {"metadata.csv": "file_name,text\n" + "\n".join(rows), **images})))
    assert offered(source) == {
        "b.jpg": ("b",), "d.jpg": ("d",), "e.jpg": ('a 5" fox',), "f.jpg": ("two\nlines",), "g.jpg": ("g",),
    }  # fmt: skip
    assert set(reasons(source)) == {"metadata.csv line 2", "a.jpg", "metadata.csv line 4", "c.jpg"}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metadata.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        ("metadata.csv", b"<!DOCTYPE html><title>404</title>", "an HTML page"),
        ("metadata.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("metadata.csv", "file_name,text\na.jpg,a\n".encode("utf-16-le"), "iconv -f UTF-16LE"),
        ("metadata.csv", b"PK\x03\x04\0\0", "a zip archive"),
        ("metadata.csv", b"File;Caption\na.jpg;a\n", "no column 'file_name'; found File, Caption; .*--image-column"),
        ("metadata.csv", b"", "an empty file"),
        ("metadata.jsonl", b"\n\n", "holds no rows"),
        ("metadata.csv", b"file_name,text\n", "holds no rows"),
        ("metadata.json", b'{"images": [], "annotations": []}', "no column 'file_name'; found annotations, images"),
        ("metadata.jsonl", b'{"image": "a.jpg", "text": "a"}\n', "no column 'file_name'; found image, text"),
        ("metadata.csv", b"file\x1b[31m\0name,text\na.jpg,a\n", r"found file\\x1b\[31m\\x00name, text"),
    ],
)
def test_metadata_that_cannot_be_used_is_called_what_it_is(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    folder = write(tmp_path, {name: content, "a.jpg": b"A"})
    with pytest.raises(SourceError, match=words) as raised:
        open_source(str(folder))
    assert str(raised.value).isprintable()
    # Where text files serve the pictures, it costs itself only.
    source = open_source(str(write(folder, {"a.txt": "a"})))
    assert offered(source) == {"a.jpg": ("a",)}
    assert set(reasons(source)) == {name}


def test_column_of_paths_may_have_any_name(tmp_path: Path) -> None:
    folder = write(tmp_path, {"metadata.csv": "image;caption\na.jpg;a\n", "a.jpg": b"A"})
    source = open_source(str(folder), SourceConfig(image_column="image", caption_column="caption"))
    assert offered(source) == {"a.jpg": ("a",)}


@pytest.mark.parametrize("name", ["café.jpg", r"sub\deep\a.jpg", r".\a.jpg", "ideograph 図.jpg", "sub/../a.jpg"])
def test_names_of_another_system_find_their_file(tmp_path: Path, name: str) -> None:
    path = unicodedata.normalize("NFD", name.replace("\\", "/"))
    write(tmp_path, {"sub/x": "", path: b"A", "metadata.jsonl": metadata({"file_name": name, "text": "a"})})
    assert list(offered(open_source(str(tmp_path))).values()) == [("a",)]


def test_names_mean_their_own_file_where_both_forms_are_there(tmp_path: Path) -> None:
    names = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    files = {f"{name}.{suffix}": str(number) for number, name in enumerate(names) for suffix in ("jpg", "txt")}
    write(tmp_path / "texts", files)
    write(tmp_path / "rows", {path: text for path, text in files.items() if path.endswith("jpg")})
    rows = [{"file_name": f"{name}.jpg", "text": str(number)} for number, name in enumerate(names)]
    write(tmp_path / "rows", {"metadata.jsonl": metadata(*rows)})
    for folder in ("texts", "rows"):
        assert offered(open_source(str(tmp_path / folder))) == {f"{n}.jpg": (str(i),) for i, n in enumerate(names)}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("A.JPG", "did you mean 'a.jpg'"),
        (r"C:\photos\a.jpg", "a path on another machine"),
        (r"..\..\a.jpg", "leads out"),
    ],
)
def test_names_that_find_no_file_are_told_why(tmp_path: Path, name: str, words: str) -> None:
    write(tmp_path, {**IMAGES, "metadata.jsonl": metadata({"file_name": name, "text": "a"}, ROWS[1])})
    source = open_source(str(tmp_path))
    assert words in reasons(source)["metadata.jsonl line 1"]


# ---- text files


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("a.txt", "a\r\n\r\nb\r\n".encode("utf-16")), ("a.TXT", b"a\rb"), ("a.caption", b"\xef\xbb\xbfa\nb"),
        ("a.jpg.txt", b"a\nb"), ("a.jpg.caption", b"a\nb"),
    ],
)  # fmt: skip
def test_text_files_of_any_make_are_read(tmp_path: Path, text: str, content: bytes) -> None:
    source = open_source(str(write(tmp_path, {"a.jpg": b"A", text: content})))
    assert offered(source) == {"a.jpg": ("a", "b")}
    assert not source.refused
    kind = text.rpartition(".")[2].lower()
    assert source.description == f"folder: 1 image, 2 captions from .{kind} files, one per line"


def test_of_several_text_files_one_is_read_and_the_others_are_counted(tmp_path: Path) -> None:
    texts = {"a.txt": "1", "a.caption": "2", "a.jpg.txt": "3", "b.caption": "4", "a.json": "{}", "b.npz": b"PK"}
    source = open_source(str(write(tmp_path, {**IMAGES, **texts})))
    assert offered(source) == {"a.jpg": ("1",), "b.jpg": ("4",)}
    assert source.description == (
        "folder: 2 images, captions from .txt and .caption files, one per line; not read beside them: "
        "1 .caption, 1 .json, 1 .npz, 1 .txt"
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("größer".encode("cp1252"), "iconv -f WINDOWS-1252 -t UTF-8"), ("a fox".encode("utf-16-le"), "UTF-16LE text"),
        (b"PK\x03\x04\xff\xff", "a zip archive"), (b"\xff\xd8\xff\xe0\0\x10JFIF", "a JPEG picture"),
    ],
)  # fmt: skip
def test_text_file_that_is_no_text_is_called_what_it_is(tmp_path: Path, content: bytes, words: str) -> None:
    source = open_source(str(write(tmp_path, {**IMAGES, "a.txt": content, "b.txt": "b"})))
    assert offered(source) == {"b.jpg": ("b",)}
    assert words in reasons(source)["a.jpg"]


def test_what_is_not_called_like_a_picture_is_named_by_kind(tmp_path: Path) -> None:
    files = {f"{n}.nef": b"II*\0\x10\0\0\0CR\x02\0" for n in range(30)} | {f"{n}.part": b"x" for n in range(2)}
    files |= {
        "noext": b"\xff\xd8\xff\xe0",
        "noext.txt": "a",
        "archive.zip": b"PK\x03\x04",
        "README.md": "",
        "LICENSE": "",
    }
    source = open_source(str(write(tmp_path, {**IMAGES, "a.txt": "a", "b.txt": "b", **files})))
    assert len(source) == 2
    found = reasons(source)
    assert set(found) == {"*.nef", "*.part", "noext", "noext.txt", "archive.zip"}
    assert "30 files such as '0.nef': not called like a picture" in found["*.nef"]
    assert "the first is camera RAW" in found["*.nef"]
    assert "unfinished download" in found["*.part"]
    assert "beside it is 'noext', which is a JPEG picture" in found["noext.txt"]
    assert "unpack it" in found["archive.zip"]


def test_names_are_shown_without_what_a_terminal_obeys(tmp_path: Path) -> None:
    write(tmp_path, {**IMAGES, "a.txt": "a", "b.txt": "b", "new\nline\x1b[2J.jpg": b"", "\u202egpj.txt": ""})
    source = open_source(str(tmp_path))
    assert set(reasons(source)) == {r"new\nline\x1b[2J.jpg", r"\u202egpj.txt"}
    assert all(reason.isprintable() for reason in reasons(source).values())


def test_pictures_of_every_name_that_the_decoder_knows_are_offered(tmp_path: Path) -> None:
    names = ["a.mpo", "b.jpg_large", "c.JFIF", "d.j2k", "e.dib", "f.avifs"]
    write(tmp_path, dict.fromkeys(names, b"") | {f"{name[0]}.txt": name for name in names})
    assert list(offered(open_source(str(tmp_path)))) == names


@pytest.mark.parametrize("name", ["metadata.parquet", "x.parquet"])
def test_damaged_parquet_ends_no_process(tmp_path: Path, name: str) -> None:
    """Each byte of the footer in turn: pyarrow aborts on some of them, if it is asked for what a column holds."""
    write(tmp_path, {"a.jpg": b"A", "a.txt": "a"})
    columns = {"file_name": ["a.jpg"], "image": [b"A"], "text": [["of the table", "a fox"]]}
    pq.write_table(pa.table(columns), tmp_path / name, compression="none")
    whole = (tmp_path / name).read_bytes()
    for at in range(len(whole) // 2, len(whole) - 8, 3):
        (tmp_path / name).write_bytes(whole[:at] + bytes([whole[at] ^ 0x9D]) + whole[at + 1 :])
        source = open_source(str(tmp_path))
        assert len(source) == 1
        assert all(reason.isprintable() for reason in reasons(source).values())
