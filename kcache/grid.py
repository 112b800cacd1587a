"""Pictures side by side in one, each prompt in writing below its pictures."""

import io
import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

__all__ = ["captioned_grid", "png_bytes"]

COLUMNS = 4
"""Pictures beside each other, where a prompt does not have more."""
CAPTION_LINES = 3
INK, PAPER = "#22262b", "white"


def captioned_grid(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Image.Image:
    """One picture of all `pictures` (one or more, of equal size), none of them scaled.

    `prompts` has one for each picture; neighbours with the same prompt stand in one row, with the prompt once below.
    """
    groups = [
        (prompt, [picture for _, picture in group])
        for prompt, group in groupby(zip(prompts, pictures, strict=True), key=lambda pair: pair[0])
    ]
    width, height = pictures[0].size
    most = max(len(members) for _, members in groups)
    font = _font(max(11, width // 24))
    gap = max(4, width // 32)
    line = sum(font.getmetrics())
    captions = [_wrapped(prompt, font, most * (width + gap) - gap) for prompt, _ in groups]

    block = (most * (width + gap), height + max(map(len, captions)) * line + 2 * gap)
    down = math.ceil(len(groups) / max(1, COLUMNS // most))
    across = math.ceil(len(groups) / down)  # so that the last row is about as full as the others
    grid = Image.new("RGB", (across * block[0] + gap, down * block[1] + gap), PAPER)
    draw = ImageDraw.Draw(grid)
    for number, ((_, members), caption) in enumerate(zip(groups, captions, strict=True)):
        left, top = gap + number % across * block[0], gap + number // across * block[1]
        for i, picture in enumerate(members):
            grid.paste(picture, (left + i * (width + gap), top))
        for i, text in enumerate(caption):
            draw.text((left, top + height + gap // 2 + i * line), text, INK, font)
    return grid


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
