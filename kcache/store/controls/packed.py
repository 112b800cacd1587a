"""Control images as rows: the bytes of a PNG file each, filled up with zeros to tokens of a fixed length.

A row is a run of tokens, as that of a caption is, so that each is read by itself however small it was packed; and any
tool decodes it, as what follows the end of a PNG file is passed over.
"""

import io
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from kcache.config.shapes import Shape
from kcache.errors import CacheCorruptError
from kcache.store.recipe import HINT, LOSS_MASKS, MASKS, Field, kind_of, shape_of

if TYPE_CHECKING:
    from PIL import Image

TOKEN_BYTES = {True: 4096, False: 64}
"""Bytes of a token, of hints and of what is as small as latents."""
_MODES = {MASKS: ("1",), LOSS_MASKS: ("L",)}
"""Pillow's modes of the images in rows; hints are greys or have colours."""


def packed_field(kind: str) -> Field:
    """The field of a table of control images of a kind, by its name."""
    return Field(name=kind.replace("-", "_"), shape=(TOKEN_BYTES[kind.startswith(HINT)],), ragged=True)


def packed_row(image: "Image.Image", token_bytes: int) -> np.ndarray:
    """An image of 1 bit, greys or RGB as a row: (n, token_bytes) uint8."""
    content = io.BytesIO()
    image.save(content, "PNG", compress_level=6)
    tokens = -(-content.tell() // token_bytes)
    return np.frombuffer(content.getvalue().ljust(tokens * token_bytes, b"\0"), np.uint8).reshape(tokens, token_bytes)


def unpacked_rows(
    table: str, tokens: np.ndarray, bounds: np.ndarray | None, empty: Callable[..., np.ndarray] = np.empty
) -> np.ndarray:
    """The images in rows of a table, tokens bounds[i] to bounds[i + 1] of (T, n) being row i: (B, C, H, W) uint8.

    Three channels if any of them has; masks are 0 where the hole is, and 1. Raises CacheCorruptError for what is no
    such row.
    """
    images = [
        _unpacked(table, tokens[first:last]) for first, last in pairwise([] if bounds is None else bounds.tolist())
    ]
    shapes = {image.shape[:2] for image in images}
    if len(shapes) > 1:
        raise CacheCorruptError(f"rows of {table} are images of {sorted(shapes)}; expected one size; build again")
    channels = max((image.shape[2] for image in images), default=1)
    height, width = shapes.pop() if shapes else (0, 0)
    out = empty((len(images), channels, height, width), np.dtype(np.uint8))
    for row, image in zip(out, images, strict=True):
        row[:] = image.transpose(2, 0, 1)  # greys are all channels alike
    return out


def _unpacked(table: str, tokens: np.ndarray) -> np.ndarray:
    """(H, W, C) uint8."""
    from PIL import Image, UnidentifiedImageError  # not at the top: whoever opens a cache may have no need of it

    kind = kind_of(table).name
    try:
        with Image.open(io.BytesIO(tokens.tobytes()), formats=("PNG",)) as image:
            # Before it is decoded: a file of a few bytes may say that it has any size.
            _check(image, kind, shape_of(table) or (0, 0))
            pixels = np.asarray(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        why = "it is no PNG file" if isinstance(error, UnidentifiedImageError) else error
        raise CacheCorruptError(
            f"a row of {table} is no packed image ({why}); build the cache again with its source"
        ) from error
    pixels = pixels.astype(np.uint8) if kind == MASKS else pixels
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _check(image: "Image.Image", kind: str, shape: Shape) -> None:
    """Raise ValueError for what no table of a kind and of pictures of this shape holds."""
    modes = _MODES.get(kind, ("L", "RGB"))
    cells = 1 if kind.startswith(HINT) else shape[1] // image.width
    if image.mode not in modes or (image.height * cells, image.width * cells) != shape:
        raise ValueError(
            f"it is {image.height}×{image.width} of mode {image.mode}; expected a part of {shape[0]}×{shape[1]} of "
            f"{' or '.join(modes)}"
        )
