"""Sizes of pictures by their headers: those with which they are decoded, whatever is wrong with their metadata."""

import io

import pytest
from photos import ENDINGS, photos, picture, saved
from PIL import Image

from kcache.encoders.decoding import Decoding, decode_image, picture_size
from kcache.errors import InputRejected


def test_headers_say_what_decoding_finds() -> None:
    known = [photo for photo in photos(3) if photo.sound or photo.size is None]
    differing = {}
    for photo in known:
        try:
            decoded = decode_image(photo.content, Decoding()).size
        except InputRejected:
            picture_size(photo.content)  # raises nothing
            continue
        if photo.sound and picture_size(photo.content) != decoded:
            differing[photo.name] = (picture_size(photo.content), decoded)
    assert len(known) > 100
    assert differing == {}


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("form", [form for form in ENDINGS if form in ("JPEG", "PNG", "TIFF", "WEBP", "AVIF")])
def test_every_orientation_is_applied_once(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    file = io.BytesIO()
    picture(1, (48, 32)).save(file, form, exif=exif.tobytes())
    assert picture_size(file.getvalue()) == decode_image(file.getvalue(), Decoding()).size


def test_what_is_no_picture_has_no_size() -> None:
    assert picture_size(b"no picture") == (0, 0)
    assert picture_size(saved(picture(), "PNG")[:20]) == (0, 0)
