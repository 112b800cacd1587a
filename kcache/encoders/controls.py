"""From an image that goes with a picture to its row: turned, scaled and cropped as the picture behind the latents is.

No network is in it: "encoding" is packing.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kcache.config.shapes import Shape, crop_box
from kcache.encoders.decoding import Decoding, decode_image, picture_size
from kcache.errors import InputRejected
from kcache.store.controls.given import ControlImage
from kcache.store.controls.packed import packed_row
from kcache.store.recipe import LOSS_MASKS, MASKS, Recipe, kind_of
from kcache.store.shards import OFFSETS

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
        image = decode_image(content.content, self._how)
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
