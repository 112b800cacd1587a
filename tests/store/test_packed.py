"""Control images as rows: what comes out is what went in, and what claims to be one is not decoded unseen."""

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from kcache.errors import CacheCorruptError
from kcache.store.controls.packed import TOKEN_BYTES, packed_field, packed_row, unpacked_rows
from kcache.store.digests import NO_CONTROL, Keys, content_key, control_row_keys, mirrored_keys
from kcache.store.recipe import NO_MASK_KEY

RANDOM = np.random.default_rng(0)
GREYS = RANDOM.integers(0, 256, (48, 80), np.uint8)
COLOURS = RANDOM.integers(0, 256, (48, 80, 3), np.uint8)
HOLES = RANDOM.random((6, 10)) < 0.5


def rows(table: str, images: Sequence[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and bounds of rows of a table, as a cache holds them."""
    each = [packed_row(image, TOKEN_BYTES[table.startswith("hint")]) for image in images]
    return np.concatenate(each), np.cumsum([0, *map(len, each)])


def test_what_comes_out_is_what_went_in() -> None:
    greys, colours = Image.fromarray(GREYS), Image.fromarray(COLOURS)
    found = unpacked_rows("hint-depth-48x80", *rows("hint-depth-48x80", [greys, greys]))
    assert (found.dtype, found.shape) == (np.uint8, (2, 1, 48, 80))
    assert np.array_equal(found[1, 0], GREYS)
    found = unpacked_rows("hint-depth-48x80", *rows("hint-depth-48x80", [greys, colours]))
    assert np.array_equal(found, [np.broadcast_to(GREYS, (3, 48, 80)), COLOURS.transpose(2, 0, 1)])
    found = unpacked_rows("masks-48x80", *rows("masks-48x80", [Image.fromarray(HOLES)]))
    assert np.array_equal(found[0, 0], HOLES.astype(np.uint8))
    assert packed_field("hint-depth").shape == (4096,)
    assert (packed_field("loss_masks").name, packed_field("loss_masks").shape) == ("loss_masks", (64,))


def test_any_tool_reads_a_row_as_the_file_that_it_begins_with() -> None:
    tokens, _ = rows("hint-depth-48x80", [Image.fromarray(COLOURS)])
    content = tokens.tobytes()
    assert len(content) % 4096 == 0
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), COLOURS)
    assert content[content.index(b"IEND") + 8 :].strip(b"\0") == b""


def bomb() -> bytes:
    """A file of a few bytes that says it has 30,000 × 30,000 pixels."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0), b"IDAT" + zlib.compress(bytes(99)))
    packed = (struct.pack(">I", len(each) - 4) + each + struct.pack(">I", zlib.crc32(each)) for each in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def file_of(image: Image.Image, kind: str = "PNG") -> bytes:
    content = io.BytesIO()
    image.save(content, kind)
    return content.getvalue()


@pytest.mark.parametrize(
    ("table", "content", "said"),
    [
        ("hint-depth-48x80", bomb(), "exceeds limit"),
        ("hint-depth-80x48", file_of(Image.fromarray(GREYS)), "it is 48×80 of mode L; expected a part of 80×48"),
        ("hint-depth-48x80", file_of(Image.fromarray(GREYS).convert("RGBA")), "mode RGBA; expected .* of L or RGB"),
        ("masks-48x80", file_of(Image.fromarray(GREYS)), "mode L; expected .* of 1"),
        ("loss_masks-64", file_of(Image.new("L", (10, 6))), "it is 6×10 of mode L"),
        ("hint-depth-48x80", file_of(Image.fromarray(GREYS))[:900], "truncated"),
        ("hint-depth-48x80", file_of(Image.fromarray(GREYS), "BMP"), "it is no PNG file"),
        ("hint-depth-48x80", b"", "it is no PNG file"),
    ],
)  # fmt: skip
def test_what_is_no_such_row_is_one_message(table: str, content: bytes, said: str) -> None:
    tokens = np.frombuffer(content, np.uint8).reshape(-1, 1)
    with pytest.raises(CacheCorruptError, match=f"a row of {table} is no packed image .*{said}"):
        unpacked_rows(table, tokens, np.array([0, len(tokens)]))


def test_a_row_is_known_by_its_image_and_its_picture_together() -> None:
    pictures = Keys.of([content_key(bytes([i])) for i in range(3)])
    images = Keys.of([content_key(b"one"), NO_CONTROL, content_key(b"other")])
    keys = control_row_keys(pictures, images, NO_MASK_KEY)
    assert list(keys) == [content_key(pictures[0] + images[0]), NO_MASK_KEY, content_key(pictures[2] + images[2])]
    assert len({*keys, *mirrored_keys(keys), *pictures, *images}) == 12
    assert len(control_row_keys(Keys.of(()), Keys.of(()), None)) == 0
