"""Metadata costs no picture, however odd: it is upright, of one size everywhere, and whatever is refused has a name."""

import io
import json
import os
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import photos as support
import pytest
from photos import SIZE, chunk, exif_block, jpeg_with, photos, picture, png_with, saved
from PIL import Image

from kcache.encoders import decoding
from kcache.encoders.decoding import Decoding, decode_image
from kcache.encoders.side_data import png_profile, without_side_data
from kcache.errors import InputRejected

AS_IS = Decoding()
TURNED = exif_block(274, 3, 1, struct.pack("<H", 6))

DECODE_ALL = """
import json
import sys

from photos import photos

from kcache.encoders.decoding import Decoding, decode_image
from kcache.errors import InputRejected

for color in ("as-is", "srgb"):
    for photo in photos(int(sys.argv[1])):
        try:
            found = decode_image(photo.content, Decoding(color=color)).size
        except InputRejected as error:
            found = error.reason
        print(json.dumps([photo.name, found]))
"""


def reason(content: bytes, how: Decoding = AS_IS) -> str:
    with pytest.raises(InputRejected) as caught:
        decode_image(content, how)
    return caught.value.reason


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(decode_image(content, AS_IS))


def test_every_photo_is_decoded_as_it_is_seen_or_refused_and_nothing_else_is_said() -> None:
    # In a process of its own: what Pillow, and the C libraries under it, print goes past Python's own streams.
    paths = [str(Path(__file__).parents[2]), str(Path(support.__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-W", "always", "-c", DECODE_ALL, "0"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    found = [json.loads(line) for line in result.stdout.splitlines()]
    expected = photos(0) * 2
    assert len(expected) >= 2 * 200
    for (name, outcome), photo in zip(found, expected, strict=True):
        assert name == photo.name
        if photo.sound:
            assert (name, tuple(outcome)) == (name, photo.size)
        else:
            assert isinstance(outcome, list) or len(outcome.splitlines()) == 1


@pytest.mark.parametrize(
    "added",
    [
        pytest.param([chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(2_000_000)))], id="profile of 2 MB"),
        pytest.param([chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(2_000_000)))], id="text of 2 MB"),
        pytest.param([chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1_000_000)))] * 70, id="texts of 70 MB"),
        pytest.param([chunk(b"tEXt", b"k\0v", sound=False)], id="wrong checksum"),
        pytest.param([chunk(b"pHYs", b"")], id="nothing in it"),
    ],
)
def test_a_chunk_that_cannot_be_read_costs_neither_pixels_nor_orientation(added: list[bytes]) -> None:
    plain = saved(picture(), "PNG")
    turned = np.rot90(pixels(plain), -1)
    for behind in (False, True):
        content = png_with(png_with(plain, chunk(b"eXIf", TURNED)), *added, behind=behind)
        np.testing.assert_array_equal(pixels(content), turned)


def test_transparency_and_palette_stay_where_metadata_go() -> None:
    palette = picture().quantize(8)
    plain = saved(palette, "PNG", transparency=2)
    np.testing.assert_array_equal(pixels(png_with(plain, chunk(b"gAMA", b""))), pixels(plain))


@pytest.mark.parametrize("segment", [b"ICC_PROFILE\0", b"MPF\0junk"])
def test_a_segment_that_cannot_be_read_costs_neither_pixels_nor_orientation(segment: bytes) -> None:
    plain = saved(picture(), "JPEG")
    content = jpeg_with(jpeg_with(plain, 0xE2, segment), 0xE1, b"Exif\0\0" + TURNED)
    np.testing.assert_array_equal(pixels(content), np.rot90(pixels(plain), -1))


def test_damage_of_pixels_stays_damage_whatever_else_is_taken_off() -> None:
    content = png_with(saved(picture(), "PNG"), chunk(b"gAMA", b""))
    at = content.index(b"IDAT") + 40
    damaged = content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]
    assert "gAMA" not in reason(damaged)
    assert reason(damaged).startswith("damaged or cut short: ")
    assert reason(content[: at + 40]).startswith("damaged or cut short: ")


def test_what_takes_metadata_off_stops_at_any_content() -> None:
    rng = np.random.default_rng(0)
    for photo in photos(2, damaged=200):
        if not photo.sound:
            content = bytearray(photo.content)
            content[int(rng.integers(len(content)))] ^= 255
            assert all(isinstance(bare, bytes) for bare in without_side_data(bytes(content)))
            png_profile(bytes(content))


def test_a_profile_is_unpacked_up_to_a_limit() -> None:
    plain = saved(picture(), "PNG")
    assert png_profile(png_with(plain, chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(3_000_000))))) == bytes(3_000_000)
    bomb = zlib.compress(bytes(100_000_000))
    assert png_profile(png_with(plain, chunk(b"iCCP", b"x\0\0" + bomb))) is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "an empty file (0 bytes)"),
        (bytes(1000), "nothing but zero bytes"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64), "a HEIC picture, as iPhones make them; convert it"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(64), "a JPEG XL picture; convert it"),
        (b"<!DOCTYPE html><title>404 Not Found</title>", "an HTML page ('404 Not Found')"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", "a Git LFS pointer"),
        (b"\xff\xd8\xff\xe0 no more", "a JPEG picture by its first bytes, whose header cannot be read"),
    ],
)
def test_a_refusal_says_what_the_file_plainly_is(content: bytes, words: str) -> None:
    assert words in reason(content)


def test_the_limit_of_pixels_can_be_raised_and_pillows_own_does_not_contradict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    content = saved(picture(size=(60, 50)), "PNG")
    for limit in (40, 2999):
        why = "more than {:,} pixels; --max-pixels raises the limit (with --retry-rejected)".format
        assert why(limit) in reason(content, Decoding(max_pixels=limit))
    assert decode_image(content, Decoding(max_pixels=3000)).size == (60, 50)
    assert decode_image(content, AS_IS).size == (60, 50)


def test_large_pictures_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    content, at_once, most, together = saved(picture(), "PNG"), [0], [0], threading.Barrier(2, timeout=0.2)
    load = Image.Image.transpose

    def watched(self: Image.Image, turn: Image.Transpose) -> Image.Image:
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        try:
            together.wait()
        except threading.BrokenBarrierError:
            together.reset()
        at_once[0] -= 1
        return load(self, turn)

    monkeypatch.setattr(Image.Image, "transpose", watched)
    turned = png_with(content, chunk(b"eXIf", TURNED))
    for limit, expected in ((SIZE[0] * SIZE[1], 2), (SIZE[0] * SIZE[1] - 1, 1)):
        monkeypatch.setattr(decoding, "MAX_PIXELS", limit)
        most[0] = 0
        threads = [threading.Thread(target=decode_image, args=(turned, AS_IS)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most[0] == expected


def test_threads_decode_what_one_does() -> None:
    contents = [photo.content for photo in photos(0, damaged=0)][::9]
    alone = [np.asarray(decode_image(content, Decoding(color="srgb"))).tobytes() for content in contents]
    found: list[list[bytes]] = [[], []]

    def decode(into: list[bytes]) -> None:
        into += [np.asarray(decode_image(content, Decoding(color="srgb"))).tobytes() for content in contents]

    threads = [threading.Thread(target=decode, args=(into,)) for into in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone, alone]


def test_a_picture_of_a_multi_picture_file_is_its_first() -> None:
    two = saved(picture(1), "MPO", save_all=True, append_images=[picture(2)])
    first = np.asarray(Image.open(io.BytesIO(two)).convert("RGB"))
    np.testing.assert_array_equal(pixels(two), first)
