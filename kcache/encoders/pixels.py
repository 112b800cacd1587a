"""From an RGB picture to what the frozen networks see: CLIP's and MoVQ's preprocessing."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from transformers import CLIPImageProcessorPil

from kcache.config.shapes import Shape, crop_box
from kcache.errors import ModelError
from kcache.foreign import told

_EXPECTED = "expected those of CLIP's image processor; fetch or export the repository again"


def clip_processor(settings: Mapping[str, Any]) -> CLIPImageProcessorPil:
    """CLIP's image processor with the settings of a recipe.

    Always the Pillow one: what `CLIPImageProcessor` means depends on whether torchvision is installed, and torchvision
    resizes to other values.
    """
    with told(ModelError, "image_processor/preprocessor_config.json gives settings that do not work", _EXPECTED):
        processor = CLIPImageProcessorPil(**settings)
        # What is wrong in it is no picture's fault.
        if not np.isfinite(clip_pixels(Image.new("RGB", (2, 2)), processor)).all():
            raise ValueError(f"pixels come out as NaN or infinity (image_std is {processor.image_std})")
    return processor


def clip_pixels(image: Image.Image, processor: CLIPImageProcessorPil) -> np.ndarray:
    """What CLIP's image encoder sees of an RGB picture: (3, S, S) float32, normalised."""
    pixels = processor(images=image, return_tensors="np")["pixel_values"][0]
    return np.ascontiguousarray(pixels, dtype=np.float32)


def movq_pixels(image: Image.Image, shape: Shape) -> np.ndarray:
    """What MoVQ sees of an RGB picture: its middle in the proportions of `shape`, (3, *shape) float32 in -1..1.

    Of a square as in diffusers' Kandinsky 2.2 training scripts: halves of pixels in the crop box are left to Pillow to
    round.
    """
    height, width = shape
    middle = image.crop(crop_box(*image.size, shape))
    resized = middle.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=1)
    pixels = np.asarray(resized, dtype=np.float32) / 127.5 - 1
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))
