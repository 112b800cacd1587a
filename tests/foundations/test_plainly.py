"""What a file plainly is, is said in words, whatever its bytes are."""

import gzip
import io
import re
import struct
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kcache.plainly import HEAD_BYTES, plainly, plainly_at, printable, shown


def saved(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, kind)
    return buffer.getvalue()


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, "x")
    return buffer.getvalue()


def tiff(*entries: tuple[int, int]) -> bytes:
    """The head of a TIFF file with these tags and numbers in its first directory."""
    cells = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + cells + b"\0" * 300


def boxed(*brands: bytes) -> bytes:
    body = brands[0] + b"\0\0\0\0" + b"".join(brands[1:])
    return struct.pack(">I", 8 + len(body)) + b"ftyp" + body + b"\0\0\0\x08meta" * 9


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"", "empty file"),
        (bytes(5000), "nothing but zero bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "git lfs pull"),
        (b"/annex/objects/SHA256E-s31--f87e.jpg\n", "git annex get"),
        (b"../.git/annex/objects/f8/7e/SHA256E-s31--f87e.jpg", "git annex get"),
        (b"outs:\n- md5: a304afb96060aad90176268345e10355\n  path: a.jpg\n", "dvc pull"),
        (b"../../blobs/4d7a214614ab", "the text of a link to '../../blobs/4d7a214614ab'"),
        (boxed(b"heic", b"mif1", b"heic"), "HEIC .*convert it to JPEG or PNG, e.g. with heif-convert"),
        (boxed(b"mif1", b"heic"), "HEIC"),
        (boxed(b"mif1", b"avif"), "AVIF"),
        (boxed(b"crx "), "camera RAW .CR3"),
        (boxed(b"isom", b"mp42"), "video .MP4"),
        (b"\0\0\0\x08wide\0\0\0\0mdat", "QuickTime"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\xff\x0a\xfa\x1f", "JPEG XL"),
        (b"\x1aE\xdf\xa3\x9fB\x86", "WebM"),
        (b"RIFF\0\0\0\0AVI LIST", "AVI"),
        (tiff((254, 0), (50706, 0x401)), "camera RAW .DNG"),
        (tiff((254, 1), (330, 400)), "camera RAW .*NEF"),
        (tiff((256, 8), (257, 8)), "TIFF picture"),
        (b"II*\0\x10\0\0\0CR\x02\0", "camera RAW .CR2"),
        (b"8BPS\0\1", "Photoshop"),
        (b"%PDF-1.7\n", "PDF"),
        (saved("JPEG"), "a JPEG picture by its first bytes"),
        (saved("PNG"), "PNG"),
        (saved("TIFF"), "TIFF"),
        (saved("BMP"), "BMP"),
        (gzip.compress(b"x" * 100, mtime=0), "gzip archive; unpack"),
        (zipped("a.jpg"), "zip archive; unpack"),
        (zipped("archive/data.pkl"), "never unpickles"),
        (b"\x80\x04\x95\0\0", "pickle"),
        (b"7z\xbc\xaf\x27\x1c", "7z"),
        (b"a.jpg".ljust(257, b"\0") + b"ustar\x0000", "a tar"),
        (struct.pack("<Q", 40) + b'{"__metadata__":{}}', "safetensors"),
        (b"PAR1\x15\x04", "Parquet"),
        (
            b"\n<!DOCTYPE html><html><head><title>404 Not\n Found &amp; \x1b[31m</title>",
            r"an HTML page \('404 Not Found & \\x1b\[31m'\).*fetch it again",
        ),
        (b"<HTML><body>Sign in</body></HTML>", "HTML page, as a failed"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "AccessDenied"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b'{"error": "Repository not found"}', "Repository not found"),
        (b'[\n  {"file_name": "a.jpg"}\n]', "JSON text"),
        ("a fox".encode("utf-16"), "iconv -f UTF-16 -t UTF-8"),
        ("a fox".encode("utf-16-le"), "iconv -f UTF-16LE"),
        (b"Access denied\n", "text that begins 'Access denied'"),
        ("ein Fuchs, größer".encode("cp1252"), "iconv -f WINDOWS-1252 -t UTF-8"),
        ("лиса в снегу".encode("cp1251"), "not UTF-8; convert"),
        ("é".encode() * 3000, "text that begins"),
        (b"/9j/4AAQSkZJRg==", "base64 -d"),
        (b"\0\x05\x16\x07\0\x02", "AppleDouble"),
    ],
)
def test_what_a_file_is_and_what_to_do(head: bytes, words: str) -> None:
    found = plainly(head)
    assert found is not None
    assert re.search(words, found), found
    assert found == printable(found)


def test_noise_is_not_given_a_name() -> None:
    assert plainly(bytes(range(90, 256)) * 3) is None


@given(st.binary(max_size=400), st.sampled_from([b"", b"II*\0", b"MM\0*", b"\0\0\0\x20ftyp", b"<", b"{", b"PK\3\4"]))
def test_any_bytes_give_printable_words_or_none(tail: bytes, start: bytes) -> None:
    words = plainly(start + tail)
    assert words is None or (words and words == printable(words))


def test_a_file_is_looked_into_no_further_than_its_head(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(HEAD_BYTES) + b"x")
    assert "zero bytes" in (plainly_at(tmp_path / "a.bin") or "")
    assert plainly_at(tmp_path) is plainly_at(tmp_path / "none") is None


def test_what_is_quoted_of_a_file_is_safe_to_print() -> None:
    assert shown("a\0b\x1b[2J\n\udcff\u202e 図") == r"a\x00b\x1b[2J\n\udcff\u202e 図"
    assert (
        printable("family \U0001f469\u200d\U0001f467 \u3000 العربية")
        == "family \U0001f469\u200d\U0001f467 \u3000 العربية"
    )
    assert shown("x" * 100, 10) == "x" * 9 + "…"
    assert shown(["a\0"]) == r"['a\x00']"
