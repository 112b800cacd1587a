"""Bad inputs of every kind in one build: each costs itself and is named with a reason, and the good ones are cached."""

import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_builds import build, encoded, foretold, missing, small_config

from kcache import Cache
from kcache.encoders.decoding import Decoding, decode_image
from kcache_cli.app import main

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 40, 3), np.uint8))
RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)
"""Grey levels 0 to 1, of which each wide format holds its own version."""


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, data: bytes) -> bytes:
    """A greyscale PNG of that size around compressed `data`."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def flat_png(side: int) -> bytes:
    """A real PNG of side × side equal pixels: small, because it is all zeros."""
    rows = zlib.compressobj(9)
    return png(side, side, b"".join(rows.compress(bytes(side + 1)) for _ in range(side)) + rows.flush())


def frames(kind: str) -> bytes:
    return saved(PICTURE, kind, save_all=True, append_images=[Image.new("RGB", PICTURE.size)])


def palette_with_alpha() -> bytes:
    return saved(PICTURE.quantize(16), transparency=bytes([0, 128, 255]))


def upright_by_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(PICTURE, "JPEG", exif=exif)


def grey(values: np.ndarray, kind: str) -> bytes:
    return saved(Image.fromarray(values), kind)


def damaged_stream() -> bytes:
    content = bytearray(saved(PICTURE))
    start = content.index(b"IDAT") + 4
    content[start + 10 : start + 60] = bytes(50)
    return bytes(content)


# What is offered as an image, and None where the picture must be cached, else the stage and words of the reason.
Fate = tuple[str, str] | None
# fmt: off
IMAGES: dict[str, tuple[Callable[[], bytes], Fate]] = {
    "truncated.jpg": (lambda: saved(PICTURE, "JPEG")[:900], ("decode", "cut short")),
    "truncated.png": (lambda: saved(PICTURE)[:-800], ("decode", "cut short")),
    "no-last-byte.webp": (lambda: saved(PICTURE, "WEBP")[:-300], ("decode", "cut short")),
    "stream.png": (damaged_stream, ("decode", "damaged")),
    "not-zlib.png": (lambda: png(8, 8, b"not zlib"), ("decode", "damaged")),
    "header-only.png": (lambda: saved(PICTURE)[:33], ("decode", "a PNG picture by its first bytes, whose header")),
    # Its key is the empty caption's, and the next one's is a caption's, too.
    "zero.jpg": (lambda: b"", ("decode", "an empty file")),
    "text.jpg": (lambda: b"one", ("decode", "text that begins 'one'")),
    "reserved.jpg": (lambda: b"kcache: all-zero pixels", ("source", "no image")),
    "page.jpg": (lambda: b"<html><body>404 Not Found</body></html>", ("decode", "it is an HTML page")),
    "archive.jpg": (lambda: b"PK\3\4" + bytes(100), ("decode", "not an image")),
    "vector.png": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", ("decode", "not an image")),
    "script.jpg": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", ("decode", "not an image")),
    "bomb-121.png": (lambda: flat_png(11_000), ("decode", "64,000,000 pixels; --max-pixels raises")),
    "bomb-400.png": (lambda: png(20_000, 20_000, b""), ("decode", "pixels")),
    "bomb-max.png": (lambda: png(2**31 - 1, 2**31 - 1, b""), ("decode", "pixels")),
    "no-pixels.png": (lambda: png(0, 8, b""), ("decode", "")),
    "phone.heic": (lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64), ("decode", "it is a HEIC picture")),
    "long.png": (lambda: saved(Image.new("RGB", (1, 5000))), ("decode", "1×5000 is longer")),
    "nan.tiff": (lambda: grey(np.full((8, 8), np.nan, np.float32), "TIFF"), ("decode", "values reach from nan")),
    "below.tiff": (lambda: grey(np.full((8, 8), -1, np.float32), "TIFF"), ("decode", "values reach from -1")),
    "dot.png": (lambda: saved(Image.new("RGB", (1, 1), "red")), None),
    "cmyk.jpg": (lambda: saved(PICTURE.convert("CMYK"), "JPEG"), None),
    "sixteen.png": (lambda: grey(np.rint(RAMP * 65535).astype(np.uint16), "PNG"), None),
    "integer.tiff": (lambda: grey(np.rint(RAMP * 2147483647).astype(np.int32), "TIFF"), None),
    "float.tiff": (lambda: grey(RAMP.astype(np.float32), "TIFF"), None),
    "float-255.tiff": (lambda: grey((RAMP * 255).astype(np.float32), "TIFF"), None),
    "palette.png": (palette_with_alpha, None),
    "alpha.png": (lambda: saved(PICTURE.convert("LA")), None),
    "clear.png": (lambda: saved(Image.new("RGBA", (9, 9), (255, 0, 0, 0))), None),
    "one-bit.png": (lambda: saved(PICTURE.convert("1")), None),
    "moving.gif": (lambda: frames("GIF"), None),
    "moving.webp": (lambda: frames("WEBP"), None),
    "moving.apng": (lambda: frames("PNG"), None),
    "turned.jpg": (upright_by_exif, None),
    "really-a-png.jpg": (lambda: saved(PICTURE), None),
    "new.avif": (lambda: saved(PICTURE, "AVIF"), None),
    "naïve 图片 🎈.png": (lambda: saved(PICTURE.rotate(90)), None),
}
CAPTIONS: dict[str, tuple[Any, Fate]] = {
    "none": (None, ("source", "no caption")),
    "empty-list": ([], ("source", "no caption")),
    "number": (7, ("source", "int; expected a string")),
    "truth": (True, ("source", "of type bool; expected a string")),
    "object": ({"en": "a"}, ("source", "of type dict; expected a string")),
    "nested": ([["a"], "b"], ("source", "of type list; expected a string")),
    "none-in-list": ([None], ("source", "no caption")),
    "nul": ("a\0b", ("source", "NUL character")),
    "lone-surrogate": ("a \ud83d b", ("source", "lone surrogate")),
    "list": (["one", "two"], None),
    "long": ("word " * 20_000, None),
    "one-long-word": ("x" * 100_000, None),
    "emoji": ("👩‍👩‍👧 🎈", None),
    "right-to-left": ("\u202eقطة حمراء", None),
    "whitespace": (" \t\u00a0 ", None),
    "empty": ("", None),
    "separators": ("a\u2028b\r\nc", None),
    "control": ("\x1b[31mred\x07", None),
}
# fmt: on
LINES: dict[str, tuple[bytes, Fate]] = {
    "up": (b'{"file_name": "../outside.png", "text": "a"}', ("source", "leads out of the source")),
    "absolute": (b'{"file_name": "/etc/passwd", "text": "a"}', ("source", "leads out of the source")),
    "by-link": (b'{"file_name": "door/outside.png", "text": "a"}', ("source", "outside the source")),
    "missing": (b'{"file_name": "nowhere.png", "text": "a"}', ("source", "no readable file")),
    "folder": (b'{"file_name": "folder.png", "text": "a"}', ("source", "a folder, not a file")),
    "nul-name": (b'{"file_name": "a\\u0000.png", "text": "a"}', ("source", "not a file name")),
    "no-name": (b'{"text": "a"}', ("source", "file_name is None")),
    "number-name": (b'{"file_name": 3, "text": "a"}', ("source", "file_name is 3")),
    "broken": (b'{"file_name": "dot.png", ', ("source", "expected a JSON object")),
    "array": (b'["dot.png", "a"]', ("source", "expected a JSON object")),
    "deep": (b"[" * 100_000, ("source", "expected a JSON object")),
    "again": (b'{"file_name": "dot.png", "text": 7}', ("source", "int; expected a string")),
    "latin": (b'{"file_name": "latin.png", "text": "caf\xe9"}', ("source", "not UTF-8")),
}
NAMED_BY_IMAGE = {"latin": "latin.png"}


@dataclass(frozen=True, kw_only=True)
class Built:
    """A source with all that is bad, what should become of each input by name, and the cache of it."""

    source: Path
    cache: Path
    fates: dict[str, Fate]

    @property
    def bad(self) -> dict[str, tuple[str, str]]:
        return {name: fate for name, fate in self.fates.items() if fate is not None}

    def rejections(self) -> dict[str, dict[str, str]]:
        lines = (self.cache / "rejected.jsonl").read_text().splitlines()
        return {entry["name"]: entry for entry in map(json.loads, lines)}


def write_images(source: Path, fates: dict[str, Fate]) -> list[bytes]:
    """One image of each kind, each with a good caption."""
    rows = []
    for name, (make, fate) in IMAGES.items():
        (source / name).write_bytes(make())
        rows.append(json.dumps({"file_name": name, "text": f"a picture, {name}"}).encode())
        fates[name] = fate
    return rows


def write_captions(source: Path, fates: dict[str, Fate]) -> list[bytes]:
    """One caption of each kind, each for a good image of its own."""
    rows = []
    for number, (name, (caption, fate)) in enumerate(CAPTIONS.items()):
        image = f"caption-{name}.png"
        (source / image).write_bytes(saved(Image.new("RGB", (20, 20), (number, 9, 9))))
        rows.append(json.dumps({"file_name": image, "text": caption}).encode())
        fates[image] = fate
    return rows


def write_entries(source: Path, fates: dict[str, Fate]) -> None:
    """What stands in the folder and is no file of its own."""
    outside = source.parent / "outside"
    outside.mkdir()
    (outside / "outside.png").write_bytes(saved(PICTURE))
    (source.parent / "outside.png").write_bytes(saved(PICTURE))
    (source / "folder.png").mkdir()
    os.mkfifo(source / "pipe.png")
    (source / "door").symlink_to(outside)
    (source / "dangling.png").symlink_to("nowhere.png")
    (source / "escaping.png").symlink_to(outside / "outside.png")
    (source / "loop.png").symlink_to("loop.png")
    (source / "unnamed.png").write_bytes(saved(PICTURE))
    (source / "latin.png").write_bytes(saved(PICTURE))
    fates |= {
        "folder.png": ("source", "a folder"),
        "pipe.png": ("source", "not a regular file"),
        "door": ("source", "outside the source"),
        "dangling.png": ("source", "a dangling link"),
        "escaping.png": ("source", "outside the source"),
        "loop.png": ("source", "leads back to itself"),
        "unnamed.png": ("source", "no row of the metadata"),
    }


@pytest.fixture(scope="module")
def built(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The one build of everything."""
    folder = tmp_path_factory.mktemp("bad")
    source, fates = folder / "source", dict[str, Fate]()
    source.mkdir()
    rows = write_images(source, fates) + write_captions(source, fates)
    write_entries(source, fates)
    for name, (line, fate) in LINES.items():
        rows.append(line)
        fates[NAMED_BY_IMAGE.get(name, f"metadata.jsonl line {len(rows)}")] = fate
    (source / "metadata.jsonl").write_bytes(b"\n".join(rows) + b"\n")
    build(source, folder / "cache", oracle)
    return Built(source=source, cache=folder / "cache", fates=fates)


def test_there_are_enough_kinds(built: Built) -> None:
    assert len(built.fates) >= 60
    assert len(built.bad) >= 40


def test_each_bad_input_is_named_with_stage_and_reason(built: Built) -> None:
    found = built.rejections()
    assert found.keys() == built.bad.keys()
    assert {name: entry["stage"] for name, entry in found.items()} == {n: stage for n, (stage, _) in built.bad.items()}
    unlike = {
        name: found[name]["reason"] for name, (_, words) in built.bad.items() if words not in found[name]["reason"]
    }
    assert unlike == {}


def test_reasons_are_one_short_line_for_people(built: Built) -> None:
    for entry in built.rejections().values():
        assert len(entry["reason"].splitlines()) == 1
        assert 10 < len(entry["reason"]) < 300
        assert "Traceback" not in entry["reason"]
        assert str(built.source) not in entry["reason"].replace(f"relative to {built.source}", "")


def test_every_good_input_is_cached(built: Built) -> None:
    cache = Cache.open(built.cache)
    good = {name for name, fate in built.fates.items() if fate is None}
    assert set(cache.samples["name"].to_pylist()) == good
    rows = cache.read(range(len(cache)), ["image_embeds", "latents", "text_embeds"])
    assert all(np.isfinite(array).all() for array in rows.values())


def test_captions_are_stored_as_they_are(built: Built) -> None:
    table = Cache.open(built.cache).samples
    stored = dict(zip(table["name"].to_pylist(), table["captions"].to_pylist(), strict=True))
    for name, (caption, fate) in CAPTIONS.items():
        if fate is None:
            assert stored[f"caption-{name}.png"] == (caption if isinstance(caption, list) else [caption])


def test_a_strict_build_exits_with_three(
    built: Built, oracle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(oracle)
    models = [
        f"--pretrained-prior-model-name-or-path={config.pretrained_prior_model_name_or_path}",
        f"--pretrained-decoder-model-name-or-path={config.pretrained_decoder_model_name_or_path}",
    ]
    flags = ["--resolution=64", "--dtype=float32", "--batch-size=4", "--device=cpu", *models]
    monkeypatch.setattr("sys.argv", ["kcache", "cache-build", str(built.source), str(built.cache), "--strict", *flags])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 3
    assert f"{len(built.bad)} " in capsys.readouterr().err


def test_retrying_tries_the_rejected_and_nothing_else(built: Built, oracle: Path, tmp_path: Path) -> None:
    assert missing(foretold(built.source, built.cache, oracle)) == {}
    retried = missing(foretold(built.source, built.cache, oracle, retry_rejected=True))
    undecodable = {(built.source / name).read_bytes() for name, (stage, _) in built.bad.items() if stage == "decode"}
    assert retried == {"image_embeds": len(undecodable), "latents-64": len(undecodable)}


@pytest.mark.parametrize("name", ["sixteen.png", "integer.tiff", "float.tiff", "float-255.tiff"])
def test_wide_values_keep_their_brightness(name: str) -> None:
    pixels = np.asarray(decode_image(IMAGES[name][0](), Decoding()), np.float64)
    reference = np.repeat(RAMP[..., None] * (127.5 if name == "integer.tiff" else 255), 3, 2)
    assert np.abs(pixels - reference).max() <= 1


def test_transparency_is_composited_as_arithmetic_says() -> None:
    for name, mode in (("palette.png", "RGBA"), ("alpha.png", "RGBA"), ("clear.png", "RGBA")):
        content = IMAGES[name][0]()
        rgba = np.asarray(Image.open(io.BytesIO(content)).convert(mode), np.float64)
        share = rgba[..., 3:] / 255
        for background, value in (("white", 255), ("black", 0)):
            pixels = np.asarray(decode_image(content, Decoding(alpha=background)), np.float64)
            assert np.abs(pixels - (rgba[..., :3] * share + value * (1 - share))).max() <= 1


# ---- captions in text files


def test_bad_text_files_are_named(oracle: Path, tmp_path: Path) -> None:
    source = tmp_path / "pairs"
    texts: dict[str, tuple[bytes | None, Fate]] = {
        "good": (b"a cat\n\na second one\n", None),
        "blank": (b" \n\t\n", None),
        "marked": ("\ufeffa cat".encode(), None),
        "latin": (b"caf\xe9", ("source", "not UTF-8")),
        "wide": ("a cat".encode("utf-16"), None),
        "nul": (b"a\0b", ("source", "NUL")),
        "huge": (b"x" * (1 << 21), ("source", "more than 1,048,576")),
        "absent": (None, ("source", "no captions")),
    }
    source.mkdir()
    for number, (name, (text, _)) in enumerate(texts.items()):
        (source / f"{name}.png").write_bytes(saved(Image.new("RGB", (20, 20), (number, 9, 9))))
        if text is not None:
            (source / f"{name}.txt").write_bytes(text)
    (source / "orphan.txt").write_text("a caption of nothing")
    (source / "escaping.png").write_bytes(saved(PICTURE))
    (source / "escaping.txt").symlink_to("/etc/hostname")
    result = build(source, tmp_path / "cache", oracle)
    fates = {f"{name}.png": fate for name, (_, fate) in texts.items()}
    fates |= {"orphan.txt": ("source", "without an image"), "escaping.png": ("source", "no captions")}
    fates["escaping.txt"] = ("source", "outside the source")
    made = Built(source=source, cache=tmp_path / "cache", fates=fates)
    assert made.rejections().keys() == made.bad.keys()
    assert all(words in made.rejections()[name]["reason"] for name, (_, words) in made.bad.items())
    captions = Cache.open(made.cache).samples["captions"].to_pylist()
    assert captions == [[""], ["a cat", "a second one"], ["a cat"], ["a cat"]]
    assert encoded(result)["text"] == 3


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, oracle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("a", "b"):
        (source / f"{name}.png").write_bytes(saved(PICTURE))
        (source / f"{name}.txt").write_text(name)

    # Not by chmod, which does not bind root.
    def guarded(path: Any, *arguments: Any, readable: Any = io.FileIO, **options: Any) -> Any:
        if path == str(source / "a.png"):
            raise PermissionError(13, "Permission denied")
        return readable(path, *arguments, **options)

    monkeypatch.setattr("kcache.sources.reading.io", SimpleNamespace(FileIO=guarded))
    build(source, tmp_path / "cache", oracle)
    made = Built(source=source, cache=tmp_path / "cache", fates={})
    assert made.rejections()["a.png"]["reason"] == "cannot be read: Permission denied"
