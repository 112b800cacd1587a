"""From the bytes of an image file to an upright RGB picture: the one place where what people give is decoded.

All that looks into such a file does so here, behind one guard: what cannot be decoded is rejected by name, metadata
that cannot be read counts as absent.
"""

import ctypes
import io
import logging
import re
import threading
import warnings
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from kcache.encoders.color import ADOBE_RGB, check_color_management, to_srgb
from kcache.encoders.recipes import MAX_ASPECT_RATIO, MAX_PIXELS
from kcache.encoders.side_data import png_profile, without_side_data
from kcache.errors import InputRejected
from kcache.plainly import HEAD_BYTES, plainly
from kcache.store.recipe import Recipe

Image.init()
# Formats that hold pictures and decode within this process: EPS, for one, would start Ghostscript.
_FORMATS = tuple(
    name for name in ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP") if name in Image.OPEN
)

# Pillow warns and logs of odd metadata, and of sizes above its own limit, without a name of the file: what matters of
# that ends in a rejection, which has one. (warnings.catch_warnings around each call is not safe in threads.)
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


def _hush_libtiff() -> None:
    """Let the libtiff that comes with Pillow not print what is wrong with a file, either: Pillow raises it."""
    site = Path(Image.__file__).parent
    for library in (*site.parent.glob("pillow.libs/libtiff*"), *site.glob(".dylibs/libtiff*")):
        with suppress(OSError, AttributeError):
            ctypes.CDLL(str(library)).TIFFSetErrorHandler(None)


_hush_libtiff()

_ONE_LARGE = threading.Lock()
"""Held while a picture of more than MAX_PIXELS is worked on: one at a time, however many threads there are."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a picture upright, by its EXIF orientation; any other value turns nothing."""
_ON_ITS_SIDE = [_TURNS[orientation] for orientation in (5, 6, 7, 8)]
"""Those that make its height its width."""
_GREYS = ("1", "L", "LA", "La")
"""Pillow's modes of pictures without colours."""
_PNG_ORIENTED = (b"eXIf", b"Raw profile type", b"com.adobe.xmp")
"""What is in each PNG that says an orientation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """How pictures are decoded."""

    alpha: Literal["white", "black", "drop"] = "white"
    """What transparent pixels are laid on; with "drop" they show the colour stored under them."""
    color: Literal["srgb", "as-is"] = "as-is"
    """Whether colours are converted to sRGB by the picture's profile, or numbers taken as they are."""
    max_pixels: int | None = None
    """Larger pictures are rejected; None for those that a cache took before, whatever its limit was."""
    kept: Literal["RGB", "grey or RGB", "grey", "alpha"] = "RGB"
    """What is made of them: greys of files of greys alone, of all, or how opaque each pixel is."""

    def __post_init__(self) -> None:
        if self.color == "srgb":
            check_color_management()

    @classmethod
    def of(cls, recipe: Recipe, max_pixels: int | None = None) -> "Decoding":
        """What the recipe of a table of pictures says; raises ConfigError where this Pillow cannot do it."""
        told = recipe.preprocess
        return cls(alpha=told["alpha"], color=told.get("color", "as-is"), max_pixels=max_pixels)


def decode_image(content: bytes, how: Decoding) -> Image.Image:
    """The first frame of an image file as an RGB picture, or what else is `kept`, turned upright by its EXIF.

    Samples wider than 8 bits are scaled, not cut off: 16-bit ones by 1/257, 32-bit integers by 1/257 as long as no
    value is above 65535 and by 1/16843009 otherwise, floats by 255 if no value is above 1 and not at all otherwise.

    Raises InputRejected for what is no image, damaged or cut short, above `max_pixels` or MAX_ASPECT_RATIO, or has
    negative, non-finite or float values above 255. Safe to call from several threads.
    """
    try:
        return _decoded(content, how)
    except (InputRejected, MemoryError):
        raise
    # On damaged files Pillow's decoders raise nearly anything: OSError, SyntaxError, struct.error, IndexError, ...
    except Exception as error:  # noqa: BLE001  # raised below
        found = error
        for bare in without_side_data(content):
            try:
                return _decoded(bare, how, png_profile(content))
            except (InputRejected, MemoryError):
                raise
            except Exception as without:  # noqa: BLE001  # what is wrong when no metadata is left is wrong with the pixels
                found = without
        raise _rejection(content, found, how) from found


def picture_size(content: bytes) -> tuple[int, int]:
    """Width and height of the picture that `decode_image` makes of a file, by its header; (0, 0) where that is unknown.

    Of a picture whose pixels turn out to be damaged, too, and of a header that is wrong: only decoding shows. Safe to
    call from several threads.
    """
    for bare in chain([content], without_side_data(content)):
        try:
            image: Image.Image = Image.open(io.BytesIO(bare), formats=_FORMATS)
            width, height = image.size
            # A TIFF is turned when it is opened. For the orientation of a PNG all of it may have to be read.
            if image.format == "TIFF" or (image.format == "PNG" and not any(word in bare for word in _PNG_ORIENTED)):
                return width, height
            return (height, width) if _turn(image) in _ON_ITS_SIDE else (width, height)
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001, S112  # as in decode_image
            continue
    return 0, 0


def _decoded(content: bytes, how: Decoding, profile: bytes | None = None) -> Image.Image:
    """The picture; `profile` is its colour profile where `content` lacks it."""
    _raise_pillows_limit(how.max_pixels)
    image: Image.Image = Image.open(io.BytesIO(content), formats=_FORMATS)
    width, height = image.size
    if how.max_pixels is not None and width * height > how.max_pixels:
        raise InputRejected("decode", f"{width}×{height} is {_too_large(how.max_pixels)}")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise InputRejected("decode", f"{width}×{height} is longer than {MAX_ASPECT_RATIO} times its short side")
    with one_if_large(image):
        # verify() passes most files that were cut short: only decoding all of it shows that a file is whole.
        image.load()
        profile = image.info.get("icc_profile") or profile
        if how.color == "srgb" and profile is None and _is_marked_adobe_rgb(image):
            profile = ADOBE_RGB
        turn = _turn(image)
        return _to_rgb(image if turn is None else image.transpose(turn), how, profile)


def one_if_large(image: Image.Image) -> AbstractContextManager[Any]:
    """Where work on pictures of this one's size is done that takes several times its memory: one at a time if large."""
    return _ONE_LARGE if image.width * image.height > MAX_PIXELS else nullcontext()


def _raise_pillows_limit(max_pixels: int | None) -> None:
    """Let Pillow's own guard, which is the whole process's and off at twice its number, not be below ours."""
    if Image.MAX_IMAGE_PIXELS is not None and (max_pixels is None or max_pixels > Image.MAX_IMAGE_PIXELS):
        Image.MAX_IMAGE_PIXELS = max_pixels


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What turns a picture upright, if anything does."""
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  # metadata that cannot be read, for whatever reason, counts as absent
        return None


def _is_marked_adobe_rgb(image: Image.Image) -> bool:
    """Whether a camera marked its colours as Adobe RGB, in the way of DCF."""
    try:
        exif = image.getexif()
        is_srgb = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.ColorSpace) == 1
        return not is_srgb and exif.get_ifd(ExifTags.IFD.Interop).get(ExifTags.Interop.InteropIndex) == "R03"
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  # as above
        return False


def _to_rgb(image: Image.Image, how: Decoding, profile: Any) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_scaled_to_bytes(image))
    if how.kept == "alpha":
        opaque = Image.new("L", image.size, 255)
        return image.convert("RGBA").getchannel("A") if image.has_transparency_data else opaque
    is_grey = how.kept == "grey" or (how.kept == "grey or RGB" and image.mode in _GREYS)
    if how.color == "srgb":
        image = to_srgb(image, profile)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if how.alpha != "drop":
            image = Image.alpha_composite(Image.new("RGBA", image.size, how.alpha), image)
    return image.convert("L" if is_grey else "RGB")


def _scaled_to_bytes(image: Image.Image) -> np.ndarray:
    values = np.asarray(image)
    # Written so that NaN fails, too.
    if not (values.min() >= 0 and values.max() <= (255 if image.mode == "F" else 2**32)):
        raise InputRejected("decode", f"its values reach from {values.min()} to {values.max()}; expected a picture's")
    if image.mode == "F":
        scaled = values.astype(np.float64) * (255 if values.max() <= 1 else 1)
    else:
        scaled = values / (257 if values.max() <= 65535 else 16843009)
    return np.rint(scaled).astype(np.uint8)


def _too_large(limit: int) -> str:
    return f"more than {limit:,} pixels; --max-pixels raises the limit (with --retry-rejected)"


_TOO_LARGE = re.compile(r"(?:(\d+)×(\d+) is )?more than ([\d,]+) pixels")


def outgrown_limit(reason: str, max_pixels: int) -> int | None:
    """The limit for which a picture was rejected, by the reason on record, where `max_pixels` would let it in."""
    if (found := _TOO_LARGE.match(reason)) is None:
        return None
    width, height, limit = (int((part or "0").replace(",", "")) for part in found.groups())
    return limit if max(limit + 1, width * height) <= max_pixels else None


def _rejection(content: bytes, error: Exception, how: Decoding) -> InputRejected:
    """Why a file was rejected, said of what it plainly is."""
    if isinstance(error, Image.DecompressionBombError):
        return InputRejected("decode", _too_large(how.max_pixels or MAX_PIXELS))
    if isinstance(error, UnidentifiedImageError):
        plain = plainly(content[:HEAD_BYTES])
        if plain is None:
            return InputRejected("decode", f"not an image in a known format ({', '.join(_FORMATS)})")
        if plain.endswith("picture by its first bytes"):
            return InputRejected("decode", f"damaged or cut short: {plain}, whose header cannot be read")
        return InputRejected("decode", f"not an image in a known format: it is {plain}")
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputRejected("decode", f"damaged or cut short: {reason}")


installed = cache(version)
"""Version of a package; each commit tells some, and reading one takes milliseconds."""


def decoder_facts() -> dict[str, str]:
    """What decides which pictures can be decoded, as commit records have it in their provenance."""
    return {"kcache": installed("kcache"), "pillow": installed("pillow"), "formats": ",".join(_FORMATS)}
