"""What a run drew on the way, as its report shows it: the newest grid, and each picture over the steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kcache.errors import RunError
from kcache.report import figures
from kcache.report.drawn.sizes import shown_shapes, trained_shapes
from kcache.report.grid import HELD_OUT, PROMPTED, beside, grids_of, open_picture, pictures_of, step_of
from kcache.report.page import Block, Text

PICTURES_OF_EACH = 3
"""Of a held-out sample: as it is, its hole or its hint, and how it was drawn."""
STEPS, SIDE = 6, 152
"""Steps of which pictures are shown beside each other, and their side in pixels."""
NEWEST_BYTES, STRIPS_BYTES = 1_200_000, 1_800_000
"""Of the newest grid and of all strips together, at most."""


def drawn_prompts(told: Mapping[str, Any]) -> list[str]:
    """The prompt of each picture of a grid, as config.json has the run's settings and shapes."""
    config = told.get("config", {})
    each = int(config.get("num_validation_images") or 1) * max(1, len(shown_shapes(trained_shapes(told))))
    return [str(prompt) for prompt in config.get("validation_prompts", ()) for _ in range(each)]


def drawn_blocks(run_dir: Path, told: Mapping[str, Any]) -> list[Block]:
    """The newest grid, unless its pictures are small, and a strip of pictures over the steps for each of them.

    Of held-out pictures only how they were drawn differs over the steps. Where a grid has not beside it each
    picture that config.json has prompts of, grids are shown as they are.
    """
    config, prompts, each = told.get("config", {}), drawn_prompts(told), 1
    begin = _of_held_out(config)
    grids = grids_of(run_dir, PROMPTED if begin is None else HELD_OUT)
    if not grids:
        flag, asked = "--validation-prompts", bool(prompts)
        if begin is not None:
            flag = "--num-validation-images" if config.get("num_validation_images") == 0 else "--val-fraction"
            asked = flag == "--val-fraction" and bool(config["val_fraction"])
        reason = "has not come to drawing any yet" if asked else f"was not asked for any ({flag})"
        return [Text(text=f"No pictures: the run {reason}.")]
    shown = spread(grids, STEPS)
    if begin is not None:
        each = PICTURES_OF_EACH
        prompts = [f"Held-out picture {n + 1}" for n in range(len(pictures_of(grids[-1])) // each)]
    if not prompts or any(len(pictures_of(grid)) != each * len(prompts) for grid in shown):
        return [_whole(grid, (NEWEST_BYTES + STRIPS_BYTES) // len(shown)) for grid in reversed(shown)]
    blocks: list[Block] = []
    parts: dict[Path, list[Image.Image]] = {}
    for grid in shown:
        try:
            parts[grid] = [open_picture(path) for path in pictures_of(grid)]
        except RunError as error:
            blocks.append(Text(text=f"{error}."))
    if not parts:
        return blocks
    newest, pictures = list(parts.items())[-1]
    if max(pictures[0].size) > SIDE:
        blocks.append(_whole(newest, NEWEST_BYTES))
    return [*blocks, *_strips(parts, prompts, len(grids), begin)]


def _of_held_out(config: Mapping[str, Any]) -> str | None:
    """What is shown of each held-out picture; None where prompts are drawn."""
    if config.get("inpaint"):
        return "As it is, its hole, and that filled"
    return None if config.get("hint") is None else "As it is, its hint, and what is drawn by it"


def _whole(grid: Path, most_bytes: int) -> Block:
    try:
        return figures.picture(open_picture(grid), f"After step {step_of(grid):,}.", most_bytes)
    except RunError as error:
        return Text(text=f"{error}.")


def _strips(
    parts: Mapping[Path, Sequence[Image.Image]], prompts: Sequence[str], drawn: int, begin: str | None
) -> list[Block]:
    """A strip for each prompt: its picture over the steps, and before it those of a held-out one that stay."""
    steps = ", ".join(f"{step_of(grid):,}" for grid in parts)
    left_out = f" (of {drawn:,} times that pictures were drawn)" if len(parts) < drawn else ""
    each = 1 if begin is None else PICTURES_OF_EACH
    strips: list[Block] = []
    for last, prompt in zip(range(each - 1, each * len(prompts), each), prompts, strict=True):
        staying = [*parts.values()][-1][last + 1 - each : last]
        row = beside([*staying, *(pictures[last] for pictures in parts.values())], SIDE)
        strips.append(figures.picture(row, prompt, STRIPS_BYTES // len(prompts)))
    return [Text(text=f"{begin or 'From left to right'} after step {steps}{left_out}."), *strips]


def spread(entries: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of `entries`, evenly spread: the first and the last are among them."""
    places = np.unique(np.linspace(0, len(entries) - 1, min(count, len(entries))).round().astype(int))
    return [entries[place] for place in places]
