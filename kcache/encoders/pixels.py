"""From a picture to what the frozen networks see of it, and from an image that goes with it to a row.

Control images are turned, scaled and cropped as the picture behind the latents is; no network sees them here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil

from kcache.config.shapes import Shape, crop_box
from kcache.encoders.decoding import Decoding, decode_image, picture_size
from kcache.errors import InputRejected, ModelError
from kcache.foreign import told
from kcache.store.controls.given import ControlImage
from kcache.store.controls.packed import packed_row
from kcache.store.recipe import LOSS_MASKS, MASKS, Recipe, kind_of
from kcache.store.shards import OFFSETS

_TRIALS = (301, 280), (231, 457), (33, 31), (90, 7)
"""Sizes of pictures on trial, in pixels: lying, standing, larger and smaller than what is cut out of them."""
_EXPECTED = "expected those of CLIP's image processor; fetch or export the repository again"


class ClipProcessor:
    """CLIP's image processor with the settings of a recipe: what CLIP's image encoder sees of a picture.

    Always the Pillow one: what `CLIPImageProcessor` means depends on whether torchvision is installed, and torchvision
    resizes to other values.

    transformers copies the whole picture to and fro between Pillow and numpy, and computes each value anew, though
    there are only 256 in a channel. Here Pillow resizes the picture as it is, and values are looked up; but only where
    that gives the same bytes for pictures on trial, and so never other rows with another version of transformers.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Raises ModelError for settings that do not work."""
        self._settings = settings
        with told(ModelError, "image_processor/preprocessor_config.json gives settings that do not work", _EXPECTED):
            self._processor = CLIPImageProcessorPil(**settings)
            levels = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, 2))
            self._values = self._as_transformers(levels, do_resize=False, do_center_crop=False)[:, 0]
            # What is wrong in it is no picture's fault.
            if not np.isfinite(self._as_transformers(Image.new("RGB", (2, 2)))).all():
                raise ValueError(f"pixels come out as NaN or infinity (image_std is {self._processor.image_std})")
            usual = all(settings.get(name, True) for name in ("do_resize", "do_center_crop"))
            usual = usual and settings["size"].keys() == {"shortest_edge"}
            self._is_usual = usual and all(map(self._agrees, _TRIALS))

    def pixels(self, picture: Image.Image) -> np.ndarray:
        """(3, S, S) float32, normalised, of an RGB picture."""
        return self._looked_up(picture) if self._is_usual else self._as_transformers(picture)

    def _agrees(self, size: tuple[int, int]) -> bool:
        width, height = size
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
        return np.array_equal(self._looked_up(picture), self._as_transformers(picture))

    def _looked_up(self, picture: Image.Image) -> np.ndarray:
        edge, crop = self._settings["size"]["shortest_edge"], self._settings["crop_size"]
        width, height = (int(edge * side / min(picture.size)) for side in picture.size)
        resized = np.asarray(picture.resize((width, height), self._settings.get("resample", Image.Resampling.BICUBIC)))
        top, left = (height - crop["height"]) // 2, (width - crop["width"]) // 2
        cropped = resized[max(top, 0) :, max(left, 0) :][: crop["height"], : crop["width"]]
        pixels = np.empty((3, *cropped.shape[:2]), np.float32)
        for channel, into in enumerate(pixels):
            np.take(self._values[channel], cropped[..., channel], out=into, mode="clip")  # other modes would copy
        return pixels

    def _as_transformers(self, picture: Image.Image, **otherwise: bool) -> np.ndarray:
        pixels = self._processor(images=picture, return_tensors="np", **otherwise)["pixel_values"][0]
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


WHITE = 128
"""From this grey on a pixel of a mask is white."""
_ROWS_TOGETHER = 16


class ControlEncoder:
    """What makes the rows of a table of control images, as an `Encoder` of its own kind, without a network."""

    batch_size = _ROWS_TOGETHER

    def __init__(self, recipe: Recipe, max_pixels: int | None = None) -> None:
        self.recipe = recipe
        self.device = torch.device("cpu")
        self._kind = kind_of(recipe.table).name
        self._is_mask = self._kind in (MASKS, LOSS_MASKS)
        self._shape: Shape = recipe.preprocess["size"][0], recipe.preprocess["size"][1]
        self._cells: int = recipe.preprocess["cells"]
        kept: Literal["alpha", "grey", "grey or RGB"]
        kept = "alpha" if recipe.preprocess["from"] == "alpha" else "grey" if self._is_mask else "grey or RGB"
        self._how = replace(Decoding.of(recipe, max_pixels), kept=kept)
        [field] = recipe.fields
        self._field = field.name
        self._token_bytes = field.shape[0]

    def prepare(self, content: ControlImage) -> np.ndarray:
        """The row of a control image, (n, bytes of a token) uint8; raises InputRejected."""
        try:
            image = decode_image(content.content, self._how)
        except InputRejected as rejection:
            raise InputRejected(rejection.stage, f"its {self._kind}: {rejection.reason}") from rejection
        width, height = picture_size(content.picture)
        if min(width, height) and not _alike(image.size, (width, height)):
            raise InputRejected(
                "control",
                f"its {self._kind} is {image.width}×{image.height}, the picture {width}×{height}; expected the same "
                "proportions, as both are cropped alike; make it from this picture",
            )
        height, width = self._shape
        middle = image.crop(crop_box(*image.size, self._shape))
        fitted = middle.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=1)
        if content.mirrored:
            fitted = fitted.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return packed_row(self._reduced(fitted), self._token_bytes)

    def _reduced(self, image: Image.Image) -> Image.Image:
        """As it is kept: of hints as it is, of masks a pixel for each of the latents."""
        height, width = self._shape
        if not self._is_mask:
            return image
        blocks = np.asarray(image).reshape(height // self._cells, self._cells, width // self._cells, self._cells)
        if self._kind == MASKS:
            return Image.fromarray((blocks < WHITE).all((1, 3)))
        return Image.fromarray(np.rint(blocks.mean((1, 3))).astype(np.uint8))

    def reserved(self) -> np.ndarray | None:
        """The row of a picture without such a mask: all is kept, and all counts. None for hints."""
        if not self._is_mask:
            return None
        height, width = (side // self._cells for side in self._shape)
        return packed_row(Image.new("1" if self._kind == MASKS else "L", (width, height), 255), self._token_bytes)

    def batch_shape(self, prepared: np.ndarray) -> tuple[int, ...]:
        """One for all: rows are packed alone."""
        return (self.batch_size,)

    def encode(self, prepared: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """{the recipe's one field: (T, bytes of a token), "text_offsets": (k + 1,) int64} of k rows."""
        bounds = np.cumsum([0, *map(len, prepared)])
        return {self._field: torch.from_numpy(np.concatenate(prepared)), OFFSETS: torch.from_numpy(bounds)}


def _alike(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes (width, height) have the same proportions, as far as whole pixels of the smaller one allow."""
    small, large = sorted((one, other))
    return abs(small[0] - large[0] * small[1] / large[1]) <= 1 or abs(small[1] - large[1] * small[0] / large[0]) <= 1
