"""What a run drew: its newest pictures at their size, and how each prompt's came to be over the steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kcache.grid import cut_grid
from kcache.report.figures import beside, picture
from kcache.report.page import Block, Text

__all__ = ["drawn_blocks", "drawn_prompts", "grids_of", "open_grid", "spread"]

STEPS, SIDE = 6, 152
"""Steps of which pictures are shown beside each other, and their side in pixels."""
NEWEST_BYTES, STRIPS_BYTES = 1_200_000, 1_800_000


def grids_of(run_dir: Path) -> list[Path]:
    """The grids of pictures in a run directory, in the order of their steps."""
    return sorted(run_dir.glob("pictures/step-*.png"), key=lambda path: (len(path.name), path.name))


def drawn_prompts(config: Mapping[str, Any]) -> list[str]:
    """The prompt of each picture of a grid, as the run's settings have them."""
    each = int(config.get("num_validation_images", 1))
    return [str(prompt) for prompt in config.get("validation_prompts", ()) for _ in range(each)]


def open_grid(path: Path) -> Image.Image | str:
    """The grid of pictures at `path`; or why it cannot be shown, in a sentence."""
    try:
        with Image.open(path, formats=["PNG"]) as grid:
            return grid.convert("RGB")
    # What Pillow raises for files that are cut short, damaged or beyond reason.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"{path.name} cannot be shown: {error}."


def drawn_blocks(run_dir: Path, config: Mapping[str, Any]) -> list[Block]:
    """The newest grid, unless its pictures are small, and a strip of pictures over the steps for each of them.

    Where a grid was not drawn from the prompts of `config`, grids are shown as they are.
    """
    paths, prompts = grids_of(run_dir), drawn_prompts(config)
    if not paths:
        reason = "has not come to drawing any yet" if prompts else "was not asked for any (--validation-prompts)"
        return [Text(text=f"No pictures: the run {reason}.")]
    shown = spread(paths, STEPS)
    opened = {_step(path): open_grid(path) for path in shown}
    blocks: list[Block] = [Text(text=found) for found in opened.values() if isinstance(found, str)]
    grids = {step: found for step, found in opened.items() if not isinstance(found, str)}
    cut = {step: cut_grid(grid, prompts) if prompts else None for step, grid in grids.items()}
    parts = {step: pictures for step, pictures in cut.items() if pictures is not None}
    if len(parts) < len(grids):
        share = (NEWEST_BYTES + STRIPS_BYTES) // len(grids)
        return [*blocks, *(picture(grid, f"After step {step:,}.", share) for step, grid in reversed(grids.items()))]
    if parts and next(reversed(parts.values()))[0].width > SIDE:
        step, grid = next(reversed(grids.items()))
        blocks.append(picture(grid, f"After step {step:,}.", NEWEST_BYTES))
    return [*blocks, *_strips(parts, prompts, len(paths))]


def spread(entries: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of `entries`, evenly spread: the first and the last are among them."""
    places = np.unique(np.linspace(0, len(entries) - 1, min(count, len(entries))).round().astype(int))
    return [entries[place] for place in places]


def _strips(parts: Mapping[int, Sequence[Image.Image]], prompts: Sequence[str], drawn: int) -> list[Block]:
    if not parts:
        return []
    steps = ", ".join(f"{step:,}" for step in parts)
    left_out = f" (of {drawn:,} times that pictures were drawn)" if len(parts) < drawn else ""
    strips = [
        picture(beside([pictures[number] for pictures in parts.values()], SIDE), prompt, STRIPS_BYTES // len(prompts))
        for number, prompt in enumerate(prompts)
    ]
    return [Text(text=f"From left to right after step {steps}{left_out}."), *strips]


def _step(path: Path) -> int:
    digits = path.stem.removeprefix("step-")
    return int(digits) if digits.isdecimal() else 0
