"""A small source of pictures of many shapes, and what builds it into a cache of five shapes, two resolutions, flips."""

from pathlib import Path
from typing import Any

from photos import picture, saved

SIZES = (
    (96, 64), (64, 96), (80, 80), (150, 60), (60, 150), (128, 85), (85, 128), (64, 64), (97, 64), (100, 75), (75, 100),
    (66, 65),
)  # fmt: skip
"""Widths and heights of its pictures: several of each shape, none of them too small at either resolution."""
SHAPES = "32,96;48,80;64,64;80,48;96,32"
"""At 64 pixels, heights before widths; at 32 there are squares."""
BUCKETED: dict[str, Any] = {
    "resolution": (64,), "aspect_ratio_buckets": SHAPES, "max_upscale": 2.0, "flip": True, "rows_per_shard": 4,
}  # fmt: skip
"""Settings of a build, beside those of `small_config`."""


def bucketed_source(folder: Path, sizes: tuple[tuple[int, int], ...] = SIZES) -> Path:
    """A new folder of pictures of these sizes, with a caption each."""
    folder.mkdir(parents=True)
    for number, size in enumerate(sizes):
        (folder / f"{number:02d}.png").write_bytes(saved(picture(number, size), "PNG"))
        (folder / f"{number:02d}.txt").write_text(f"picture {number}, {size[0]} by {size[1]}")
    return folder


def build_bucketed(source: Path, cache: Path, oracle: Path, **changes: Any) -> None:
    """Build `source` into squares of 32 pixels, then beside them five shapes at 64, and mirror images of all."""
    from small_builds import build

    build(source, cache, oracle, resolution=(32,), rows_per_shard=4, **changes)
    build(source, cache, oracle, **(BUCKETED | changes))
