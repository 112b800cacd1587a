"""Pictures side by side in one, each prompt in writing below its pictures."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

COLUMNS = 4
"""Pictures beside each other, where a prompt does not have more."""
CAPTION_LINES = 3
INK, PAPER = "#22262b", "white"


def captioned_grid(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Image.Image:
    """One picture of all `pictures` (one or more, of equal size), none of them scaled.

    `prompts` has one for each picture; neighbours with the same prompt stand in one row, with the prompt once below.
    """
    plan = _plan(pictures[0].size, prompts)
    grid = Image.new("RGB", plan.size, PAPER)
    draw = ImageDraw.Draw(grid)
    for picture, place in zip(pictures, plan.places, strict=True):
        grid.paste(picture, place)
    for text, place in plan.lines:
        draw.text(place, text, INK, plan.font)
    return grid


def cut_grid(grid: Image.Image, prompts: Sequence[str]) -> list[Image.Image] | None:
    """The square pictures that `captioned_grid` made `grid` of; None when it was not made with these `prompts`."""
    groups = [(prompt, len(list(group))) for prompt, group in groupby(prompts)]
    most, across, _ = _shape(groups)
    for side in range(8, min(grid.size) + 1, 8):  # the networks draw multiples of it
        if across * most * (side + _gap(side)) + _gap(side) != grid.width:
            continue
        plan = _plan((side, side), prompts)
        if plan.size == grid.size:
            return [grid.crop((left, top, left + side, top + side)) for left, top in plan.places]
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """Where everything stands in a grid, in pixels."""

    size: tuple[int, int]
    places: list[tuple[int, int]]
    """Left upper corner of each picture."""
    lines: list[tuple[str, tuple[int, int]]]
    """Text and left upper corner of each line of the captions."""
    font: "FreeTypeFont"


def _plan(size: tuple[int, int], prompts: Sequence[str]) -> _Plan:
    width, height = size
    groups = [(prompt, len(list(group))) for prompt, group in groupby(prompts)]
    most, across, down = _shape(groups)
    font, gap = _font(max(11, width // 24)), _gap(width)
    line = sum(font.getmetrics())
    captions = [_wrapped(prompt, font, most * (width + gap) - gap) for prompt, _ in groups]

    block = (most * (width + gap), height + max(map(len, captions)) * line + 2 * gap)
    places: list[tuple[int, int]] = []
    lines: list[tuple[str, tuple[int, int]]] = []
    for number, ((_, count), caption) in enumerate(zip(groups, captions, strict=True)):
        left, top = gap + number % across * block[0], gap + number // across * block[1]
        places += [(left + i * (width + gap), top) for i in range(count)]
        lines += [(text, (left, top + height + gap // 2 + i * line)) for i, text in enumerate(caption)]
    return _Plan(size=(across * block[0] + gap, down * block[1] + gap), places=places, lines=lines, font=font)


def _shape(groups: Sequence[tuple[str, int]]) -> tuple[int, int, int]:
    """Pictures of the largest group, groups beside each other, and rows of groups."""
    most = max(count for _, count in groups)
    down = math.ceil(len(groups) / max(1, COLUMNS // most))
    return most, math.ceil(len(groups) / down), down  # so that the last row is about as full as the others


def _gap(width: int) -> int:
    return max(4, width // 32)


def png_bytes(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _wrapped(text: str, font: "FreeTypeFont", width: int) -> list[str]:
    """`text` in at most `CAPTION_LINES` lines of `width` pixels, with … where the rest is left out."""
    lines: list[str] = []
    rest = " ".join(text.split())
    while rest:
        if len(lines) == CAPTION_LINES - 1 and font.getlength(rest) > width:
            return [*lines, _cut(rest, font, width - font.getlength("…")).rstrip() + "…"]
        part = _cut(rest, font, width)
        # Between words, unless one word alone is too long.
        if part != rest and rest[len(part)] != " " and " " in part:
            part = part[: part.rindex(" ")]
        lines.append(part)
        rest = rest[len(part) :].lstrip()
    return lines


def _cut(text: str, font: "FreeTypeFont", width: float) -> str:
    """As much of the beginning of `text` as fits into `width` pixels, but at least one character."""
    end = next((end for end in range(2, len(text) + 1) if font.getlength(text[:end]) > width), len(text) + 1)
    return text[: end - 1]


@lru_cache
def _font(size: int) -> "FreeTypeFont":
    """The font that comes with matplotlib, `size` pixels high: it has Cyrillic and Greek, which Pillow's own lacks."""
    import matplotlib as mpl

    return ImageFont.truetype(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
