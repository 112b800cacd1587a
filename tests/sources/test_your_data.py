"""Every row of the tables in docs/your-data.md is so."""

import io
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from documents import ROOT
from source_folders import write

from kcache.config import AS_FOUND, SourceConfig
from kcache.disk.memo import DigestMemo
from kcache.errors import InputRejected, SourceError
from kcache.plainly import plainly
from kcache.sources import Source, open_source
from kcache.store.digests import NO_CONTROL


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, "x")
    return buffer.getvalue()


def parquet(rows: int) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": [b"A"] * rows, "text": ["of the table"] * rows}), buffer)
    return buffer.getvalue()


CONTENTS = {
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n",
    "a git-annex pointer": b"/annex/objects/SHA256E-s31--f87e.jpg\n",
    "an empty file": b"",
    "zero bytes only": bytes(100),
    "an HTML page": b"<!DOCTYPE html><html><title>404 Not Found</title></html>",
    "a server's error in JSON": b'{"error": "Repository not found"}',
    "a HEIC picture": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "a JPEG XL picture": b"\xff\x0a\xfa\x1f",
    "a JPEG picture": b"\xff\xd8\xff\xe0\0\x10JFIF",
    "a camera's RAW file": b"II*\0\x08\0\0\0\1\0" + bytes.fromhex("12c6 0100 04000000 01040000") + bytes(20),
    "a Photoshop document": b"8BPS\0\1",
    "a PDF document": b"%PDF-1.7\n",
    "an SVG drawing": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "an MP4 video": b"\0\0\0\x18ftypisom\0\0\0\0mp42isom",
    "a zip archive": zipped("a.jpg"),
    "a pickled PyTorch file": zipped("archive/data.pkl"),
    "UTF-16 text": "a red fox".encode("utf-16"),
    "UTF-16 text without its mark": "a red fox".encode("utf-16-le"),
    "Windows-1252 text": "größer".encode("cp1252"),
    "a link that Git wrote as text": b"../pool/fox.jpg",
    "a table of one row": parquet(1),
    "a table of two rows": parquet(2),
}


def tables() -> Iterator[list[str]]:
    """The rows of tables with a column `said`, heads left out; the first cell of the head comes before the cells."""
    head = ""
    for line in (ROOT / "docs/your-data.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("|"):
            head = ""
        elif not head:
            head = cells[0] if "said" in cells[-1] else "told"
        elif head != "told" and not line.startswith("|---"):
            yield [head, *(cell.removesuffix(" |").strip() for cell in cells)]


ROWS = list(tables())
OF_FOLDERS = [row[1:] for row in ROWS if row[0] == "beside `fox.jpg`"]
OF_FLAGS = [row[1:] for row in ROWS if row[0] == "beside `fox.jpg`, with"]
OF_LINKS = [row[1:] for row in ROWS if row[0] == "`fox.jpg` is"]
OF_KINDS = [row[1:] for row in ROWS if row[0] == "such a file"]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]*)`", cell.replace("``", "` `") if cell == "``" else cell)


def files_of(cell: str) -> dict[str, str | bytes]:
    """The files that a cell lists as `name`, `name`: `content` or `name`: a kind of content."""
    files: dict[str, str | bytes] = {}
    for name, text, kind in re.findall(r"`([^`]+)`(?:: (?:`([^`]*)`|([^`,]+)))?(?:, |$)", cell):
        literal = re.sub(r"\\([nt])", lambda sign: {"n": "\n", "t": "\t"}[sign[1]], text)
        files[name] = CONTENTS[kind] if kind else literal
    return files


def outcome(folder: Path, config: SourceConfig = AS_FOUND) -> tuple[list[str] | None, str]:
    """The captions of fox.jpg, and all that is said."""
    try:
        source = open_source(str(folder), config)
    except SourceError as error:
        return None, str(error)
    captions = {source.name(i): list(source.captions(i)) for i in range(len(source))}
    said = [source.description, *(f"{refusal.name}: {refusal.reason}" for refusal in source.refused)]
    return captions.get("fox.jpg"), "\n".join(said)


def check(found: tuple[list[str] | None, str], captions: str, words: str) -> None:
    wanted = None if captions == "—" else [text.strip() for text in quoted(captions)]
    assert found[0] == wanted, found
    assert [each for each in quoted(words) if each not in found[1]] == [], found[1]


def test_there_are_tables() -> None:
    assert (len(OF_FOLDERS), len(OF_FLAGS), len(OF_LINKS), len(OF_KINDS)) == (49, 15, 8, 18)
    assert len(ROWS) == 49 + 15 + 8 + 18


@pytest.mark.parametrize("row", OF_FOLDERS, ids=lambda row: row[0])
def test_folder(row: list[str], tmp_path: Path) -> None:
    cell, captions, words = row
    files = files_of(cell)
    assert files or cell == "nothing"
    check(outcome(write(tmp_path, {"fox.jpg": b"A", **files})), captions, words)


@pytest.mark.parametrize("row", OF_FLAGS, ids=lambda row: f"{row[0]} {row[1]}")
def test_further_columns(row: list[str], tmp_path: Path) -> None:
    cell, typed, taken, words = row
    flag, value = re.split("[ =]", quoted(typed)[0], maxsplit=1)
    name = flag.removeprefix("--").replace("-", "_")
    config = SourceConfig(**{name: (value,) if name == "hint_column" else value})
    write(tmp_path, {"fox.jpg": b"A", **files_of(cell)})
    try:
        source = open_source(str(tmp_path), config)
    except SourceError as error:
        found, said = None, str(error)
    else:
        said = "\n".join(f"{refusal.name}: {refusal.reason}" for refusal in source.refused)
        found = next((taken_of(source, i, config) for i in range(len(source)) if source.name(i) == "fox.jpg"), None)
    if isinstance(found, InputRejected):
        found, said = None, f"{said}{found.reason}"
    assert found == (None if taken == "—" else "nothing" if taken == "nothing" else quoted(taken)[0]), said
    assert [each for each in quoted(words) if each not in said] == [], said


def taken_of(source: Source, i: int, config: SourceConfig) -> str | InputRejected:
    """The control image of a sample, or its numbers, in words; or why it is refused."""
    if config.counts:
        return "weight {:g}, repeats {}".format(*source.counts(i))
    try:
        with DigestMemo() as memo:
            (key,) = source.control_keys(i, memo, False)
        return "nothing" if key == NO_CONTROL else source.control(i, *config.controls).decode()
    except InputRejected as rejection:
        return rejection


@pytest.mark.parametrize("row", OF_KINDS, ids=lambda row: row[0])
def test_what_a_refusal_says(row: list[str]) -> None:
    kind, words = row
    assert all(each in (plainly(CONTENTS[kind]) or "") for each in quoted(words)), plainly(CONTENTS[kind])


SNAPSHOT = "hub/datasets--owner--name/snapshots/5f0c"
LINKS = {
    "a link into the `blobs` of the same snapshot": (SNAPSHOT, "hub/datasets--owner--name/blobs/0f", False),
    "a link into `.git/annex/objects` of the same repository": ("git/photos", "git/.git/annex/objects/f8/x", False),
    "a link to a picture elsewhere": ("data", "pool/fox.jpg", False),
    "a link to a picture elsewhere, with `--follow-links`": ("data", "pool/fox.jpg", True),
    "a link into another repository of the Hub's cache": (SNAPSHOT, "hub/datasets--owner--other/blobs/0f", False),
    "a link to nothing": ("data", None, False),
    "a link to itself": ("data", "data/fox.jpg", False),
    "a file, beside a link to the folder that it lies in, with `--follow-links`": ("data", "data", True),
}
"""Where the source lies, where the link in it leads, and whether links may."""


@pytest.mark.parametrize("row", OF_LINKS, ids=lambda row: row[0])
def test_links(row: list[str], tmp_path: Path) -> None:
    case, captions, words = row
    place, target, follow = LINKS[case]
    folder = write(tmp_path / place, {"fox.txt": "a"})
    if target == place:
        write(folder, {"fox.jpg": b"A"})
        (folder / "loop").symlink_to(".")
    else:
        (folder / "fox.jpg").symlink_to("none.jpg" if target is None else os.path.relpath(tmp_path / target, folder))
    if target is not None and target not in (place, f"{place}/fox.jpg"):
        write(tmp_path, {target: b"A"})
    check(outcome(folder, SourceConfig(follow_links=str(tmp_path)) if follow else AS_FOUND), captions, words)
