"""From the bytes of an image file to what the frozen networks see: decoding, CLIP's and MoVQ's preprocessing."""

import io
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import CLIPImageProcessorPil

from kcache.encoders.recipes import MAX_ASPECT_RATIO, MAX_PIXELS
from kcache.errors import InputRejected

Image.init()
# Formats that hold pictures and decode within this process: EPS, for one, would start Ghostscript.
_FORMATS = tuple(
    name for name in ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP") if name in Image.OPEN
)

# Pillow warns above 89 Mpx and goes on; MAX_PIXELS is below that and rejects with a reason. (warnings.catch_warnings
# around each call would not do: it is not safe in threads.)
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def decode_image(content: bytes, alpha: Literal["white", "black", "drop"]) -> Image.Image:
    """The first frame of an image file as an RGB picture, turned upright by its EXIF orientation.

    Transparent pixels are laid on white or black, or with "drop" show the colour stored under them. Samples wider
    than 8 bits are scaled, not cut off: 16-bit ones by 1/257, 32-bit integers by 1/257 as long as no value is above
    65535 and by 1/16843009 otherwise, floats by 255 if no value is above 1 and not at all otherwise.

    Raises InputRejected for what is no image, damaged or cut short, above MAX_PIXELS or MAX_ASPECT_RATIO, or has
    negative, non-finite or float values above 255. Safe to call from several threads.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
        _check_size(*image.size)
        # verify() passes most files that were cut short: only decoding all of it shows that a file is whole.
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image, alpha)
    except (InputRejected, MemoryError):
        raise
    except UnidentifiedImageError as error:
        found = "the file is empty" if not content else f"not an image in a known format ({', '.join(_FORMATS)})"
        raise InputRejected("decode", found) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputRejected("decode", f"more than {MAX_PIXELS:,} pixels") from error
    # On damaged files Pillow's decoders raise nearly anything: OSError, SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputRejected("decode", f"damaged or cut short: {reason}") from error


def clip_processor(settings: Mapping[str, Any]) -> CLIPImageProcessorPil:
    """CLIP's image processor with the settings of a recipe.

    Always the Pillow one: what `CLIPImageProcessor` means depends on whether torchvision is installed, and torchvision
    resizes to other values.
    """
    return CLIPImageProcessorPil(**settings)


def clip_pixels(image: Image.Image, processor: CLIPImageProcessorPil) -> np.ndarray:
    """What CLIP's image encoder sees of an RGB picture: (3, S, S) float32, normalised."""
    pixels = processor(images=image, return_tensors="np")["pixel_values"][0]
    return np.ascontiguousarray(pixels, dtype=np.float32)


def movq_pixels(image: Image.Image, resolution: int) -> np.ndarray:
    """What MoVQ sees of an RGB picture: its central square as (3, resolution, resolution) float32 in -1..1.

    As in diffusers' Kandinsky 2.2 training scripts, halves of pixels in the crop box are left to Pillow to round.
    """
    width, height = image.size
    side = min(width, height)
    square = image.crop(((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2))
    resized = square.resize((resolution, resolution), Image.Resampling.BICUBIC, reducing_gap=1)
    pixels = np.asarray(resized, dtype=np.float32) / 127.5 - 1
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise InputRejected("decode", f"{width}×{height} is more than {MAX_PIXELS:,} pixels")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise InputRejected("decode", f"{width}×{height} is longer than {MAX_ASPECT_RATIO} times its short side")


def _to_rgb(image: Image.Image, alpha: Literal["white", "black", "drop"]) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_scaled_to_bytes(image)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    if alpha != "drop":
        image = Image.alpha_composite(Image.new("RGBA", image.size, alpha), image)
    return image.convert("RGB")


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
