"""Every kind of image file becomes the picture that it shows, or is rejected with a reason."""

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil

from kcache.encoders.decoding import Decoding, decode_image
from kcache.encoders.pixels import ClipProcessor, movq_pixels
from kcache.encoders.recipes import MAX_PIXELS
from kcache.errors import InputRejected, ModelError

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(content: bytes, alpha: str = "white") -> np.ndarray:
    image = decode_image(content, Decoding(alpha=alpha, max_pixels=MAX_PIXELS))
    assert image.mode == "RGB"
    return np.asarray(image)


def reason(content: bytes) -> str:
    with pytest.raises(InputRejected) as caught:
        decode_image(content, Decoding(max_pixels=MAX_PIXELS))
    assert caught.value.stage == "decode"
    return caught.value.reason


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims to be so large, with next to no data."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("mode", ["L", "P", "RGB"])
def test_eight_bit_modes_keep_their_values(mode: str) -> None:
    image = Image.fromarray(RAMP)
    pixels = decoded(encoded(image.convert(mode)))
    np.testing.assert_array_equal(pixels, np.repeat(RAMP[..., None], 3, 2))


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("1", "PNG"), ("LA", "PNG"), ("RGBA", "PNG"), ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("LAB", "TIFF")],
)
def test_other_modes_become_rgb(mode: str, kind: str) -> None:
    white = Image.new("RGB", (8, 6), "white").convert(mode)
    pixels = decoded(encoded(white, kind))
    assert pixels.shape == (6, 8, 3)
    assert pixels.min() >= 253


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(RAMP.astype(np.uint16) * 257, id="16-bit"),
        pytest.param(RAMP.astype(np.int32) * 257, id="16-bit in 32"),
        pytest.param(RAMP.astype(np.int32) // 2 * 16843009, id="32-bit"),
        pytest.param((RAMP / 255).astype(np.float32), id="float to 1"),
        pytest.param(RAMP.astype(np.float32), id="float to 255"),
    ],
)
def test_wide_values_are_scaled_not_cut_off(values: np.ndarray) -> None:
    pixels = decoded(encoded(Image.fromarray(values), "TIFF"))
    expected = RAMP // 2 if values.max() > 65535 else RAMP
    np.testing.assert_array_equal(pixels, np.repeat(expected[..., None], 3, 2))


def test_sixteen_bits_round_to_the_nearest_of_eight() -> None:
    values = np.array([[0, 128, 129, 65406, 65407, 65535]], np.uint16)
    assert decoded(encoded(Image.fromarray(values)))[0, :, 0].tolist() == [0, 0, 1, 254, 255, 255]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0, 256.0])
def test_floats_that_are_no_picture_are_rejected(bad: float) -> None:
    values = np.full((4, 4), 0.5, np.float32)
    values[1, 2] = bad
    assert "values" in reason(encoded(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize(("alpha", "expected"), [("white", 255), ("black", 0), ("drop", 40)])
def test_transparent_pixels_are_laid_on_the_background_asked_for(alpha: str, expected: int) -> None:
    assert decoded(encoded(Image.new("RGBA", (2, 2), (40, 40, 40, 0))), alpha).max() == expected
    assert decoded(encoded(Image.new("LA", (2, 2), (40, 0))), alpha).max() == expected
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 40, 40, 40])
    for transparency in (1, b"\xff\x00"):
        assert decoded(encoded(palette, transparency=transparency), alpha).max() == expected


def test_half_transparent_pixels_are_mixed() -> None:
    assert decoded(encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 128))), "white").max() == 127


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_picture_upright(orientation: int) -> None:
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :16] = 255
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored))
    for kind, said in (
        ("JPEG", {"exif": exif}),
        ("PNG", {"exif": exif}),
        ("TIFF", {"tiffinfo": {0x0112: orientation}}),
    ):
        pixels = decoded(encoded(image, kind, quality=100, **said))
        assert pixels.shape == upright.shape
        assert np.abs(pixels.astype(int) - upright).max() < 10


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black")]
    assert decoded(encoded(frames[0], kind, save_all=True, append_images=frames[1:])).min() > 250


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_files_cut_short_are_rejected(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    content = encoded(noise, kind)
    for cut in (len(content) // 3, len(content) // 2, len(content) - len(content) // 8):
        assert reason(content[:cut])


def test_what_is_no_image_is_rejected_in_plain_words() -> None:
    assert "an empty file (0 bytes)" in reason(b"")
    assert "known format" in reason(b"<html>404</html>")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    assert "known format" in reason(postscript)


@pytest.mark.parametrize("side", [8_001, 11_000, 20_000, 100_000])
def test_too_many_pixels_are_rejected_before_decoding(side: int) -> None:
    assert f"{MAX_PIXELS:,} pixels" in reason(png_header(side, side))


def test_very_long_images_are_rejected() -> None:
    assert "1×5000" in reason(encoded(Image.new("RGB", (1, 5000))))
    assert decoded(encoded(Image.new("RGB", (1, 100)))).shape == (100, 1, 3)


def test_damaged_files_are_decoded_or_rejected_and_nothing_else(oracle: Path) -> None:
    chance = np.random.default_rng(0)
    files = [(oracle / "data" / name).read_bytes() for name in ("img_07.png", "img_11.png", "img_15.png")]
    files += [
        encoded(Image.fromarray(RAMP), kind) for kind in ("JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "JPEG2000")
    ]
    for content in files:
        for _ in range(60):
            damaged = bytearray(content)
            for _ in range(3):
                damaged[chance.integers(len(damaged))] = chance.integers(256)
            with suppress(InputRejected):
                assert decode_image(bytes(damaged), Decoding(max_pixels=MAX_PIXELS)).mode == "RGB"


def test_threads_decode_alike(oracle: Path) -> None:
    files = [path.read_bytes() for path in sorted((oracle / "data").glob("img_*"))] * 4
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(decoded, files))
    for content, pixels in zip(files, together, strict=True):
        np.testing.assert_array_equal(decoded(content), pixels)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"image_mean": [0.5]}, "mean must have 3"), ({"image_std": [0, 0, 0]}, "NaN"),
        ({"resample": 99}, "resampling"), ({"size": "9"}, "size"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value)")
def test_settings_that_do_not_work_are_no_pictures_fault(setting: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=f"preprocessor_config.json gives settings that do not work: .*{words}"):
        ClipProcessor({"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}} | setting)


@pytest.mark.parametrize(
    "setting",
    [
        {}, {"resample": 2, "do_rescale": False}, {"do_normalize": False, "crop_size": {"height": 30, "width": 17}},
        {"size": {"shortest_edge": 20}}, {"size": {"height": 40, "width": 33}}, {"do_center_crop": False},
    ],
    ids=str,
)  # fmt: skip
def test_clip_pixels_are_those_of_the_pillow_processor(setting: dict[str, Any]) -> None:
    settings = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}} | setting
    ours, theirs = ClipProcessor(settings), CLIPImageProcessorPil(**settings)
    for size in ((301, 90), (31, 33), (45, 200), (32, 32)):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
        expected = theirs(images=image, return_tensors="np")["pixel_values"][0]
        assert ours.pixels(image).dtype == np.float32
        np.testing.assert_array_equal(ours.pixels(image), expected.astype(np.float32))


def test_a_pillow_processor_that_does_otherwise_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (31, 45, 3), np.uint8))
    plain, process = ClipProcessor(settings).pixels(image), CLIPImageProcessorPil.resize
    monkeypatch.setattr(CLIPImageProcessorPil, "resize", lambda *given, **named: 255 - process(*given, **named))
    changed = ClipProcessor(settings).pixels(image)
    assert not np.array_equal(changed, plain)
    processor = CLIPImageProcessorPil(**settings)
    np.testing.assert_array_equal(changed, processor(images=image, return_tensors="np")["pixel_values"][0])


def test_movq_pixels_are_the_central_square_in_minus_one_to_one() -> None:
    image = Image.new("RGB", (300, 100), "black")
    image.paste("white", (100, 0, 200, 100))
    assert movq_pixels(image, (50, 50)).shape == (3, 50, 50)
    assert movq_pixels(image, (50, 50)).dtype == np.float32
    np.testing.assert_array_equal(movq_pixels(image, (50, 50)), 1)
    np.testing.assert_array_equal(movq_pixels(Image.new("RGB", (3, 9)), (50, 50)), -1)


def test_movq_leaves_half_pixels_of_the_crop_to_pillow() -> None:
    # 258×255: the box is 1.5 to 256.5, which Pillow rounds to the even neighbours 2 and 256.
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (255, 258, 3), np.uint8))
    square = image.crop((2, 0, 256, 255))
    expected = square.resize((64, 64), Image.Resampling.BICUBIC, reducing_gap=1)
    found = movq_pixels(image, (64, 64))
    np.testing.assert_allclose(found, np.asarray(expected).transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
