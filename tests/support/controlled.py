"""A small source whose pictures have hints, masks and transparency, and the cache that is built of it."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
from small_builds import build

FLAGS: dict[str, Any] = {
    "hint_column": ("own=own", "edges=edges"),
    "mask_column": "hole",
    "loss_mask_alpha": True,
}
"""What a build of it is told."""
SHAPED: dict[str, Any] = {"aspect_ratio_buckets": "48,80;64,64;80,48", "flip": True}
SIZES = [(160, 100), (100, 160), (128, 128), (90, 90), (200, 128), (130, 128)]
HOLE = (20, 30, 60, 70)


def controlled_source(folder: Path, *, captions: bool = True) -> Path:
    """Pictures with their own selves as a hint, edges of another size, for every other one a hole, some transparent."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number, (width, height) in enumerate(SIZES):
        coarse = generator.integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        picture.save(folder / f"p{number}.own.png")
        picture.convert("L").filter(ImageFilter.FIND_EDGES).resize((2 * width, 2 * height)).save(
            folder / f"p{number}.edges.tif"
        )
        if number % 2:
            hole = Image.new("L", (width, height))
            hole.paste(255, HOLE)
            hole.save(folder / f"p{number}.hole.png")
        if number == 2:
            opaque = Image.new("L", picture.size, 255)
            opaque.paste(0, (0, 0, width // 2, height))
            picture.putalpha(opaque)
        picture.save(folder / f"p{number}.png")
        if captions:
            (folder / f"p{number}.txt").write_text(f"picture {number}")
    return folder


def build_controlled(source: Path, cache: Path, oracle: Path, **changes: Any) -> Any:
    return build(source, cache, oracle, **{"stage": "decoder", **FLAGS, **changes})
