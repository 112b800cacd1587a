"""The pictures that a run draws on the way, as files: each by itself, and side by side in one with their prompts."""

import io
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.ImageFont import FreeTypeFont

from kcache.decoration import drawing
from kcache.durable import write_bytes
from kcache.errors import RunError
from kcache.store.run_directory import PICTURES_FOLDER

COLUMNS = 4
"""Pictures beside each other, where a prompt does not have more."""
CAPTION_LINES = 3
GAP = 4
"""Pixels between pictures of a strip."""
INK, PAPER = "#22262b", "white"


def save_pictures(run_dir: Path, step: int, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Path:
    """Write pictures into the run directory: each by itself, e.g. pictures/step-000500/00.png, and all in one grid.

    `prompts` has one for each picture, in writing below it in the grid, e.g. pictures/step-000500.png, whose path is
    returned. Raises CacheWriteError when they cannot be written.
    """
    grid = run_dir / PICTURES_FOLDER / f"step-{step:06d}.png"
    folder = grid.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        write_bytes(folder / f"{number:02d}.png", png_bytes(picture))
    write_bytes(grid, png_bytes(captioned_grid(pictures, prompts)))
    return grid


def grids_of(run_dir: Path) -> list[Path]:
    """The grids of pictures in a run directory, in the order of their steps."""
    return _in_order((run_dir / PICTURES_FOLDER).glob("step-*.png"))


def pictures_of(grid: Path) -> list[Path]:
    """The pictures of a grid, each by itself, in the order of their prompts; none where only the grid was saved."""
    return _in_order(grid.with_suffix("").glob("*.png"))


def step_of(grid: Path) -> int:
    """The optimizer step after which the pictures of a grid were drawn; 0 for a file of another name."""
    digits = grid.stem.removeprefix("step-")
    return int(digits) if digits.isdecimal() else 0


def _in_order(paths: Iterable[Path]) -> list[Path]:
    """By the numbers that the names end in, which may have outgrown their zeros."""
    return sorted(paths, key=lambda path: (len(path.name), path.name))


def open_picture(path: Path) -> Image.Image:
    """The picture in a PNG file, in RGB; raises RunError when it cannot be shown."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return picture.convert("RGB")
    # What Pillow raises for files that are cut short, damaged or beyond reason.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RunError(f"{path.parent.name}/{path.name} cannot be shown: {error}") from error


def png_bytes(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def captioned_grid(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Image.Image:
    """One picture of all `pictures` (one or more, of equal size), none of them scaled.

    `prompts` has one for each picture; neighbours with the same prompt stand in one row, with the prompt once below.
    """
    width, height = pictures[0].size
    groups = [(prompt, len(list(group))) for prompt, group in groupby(prompts)]
    most = max(count for _, count in groups)
    down = math.ceil(len(groups) / max(1, COLUMNS // most))
    across = math.ceil(len(groups) / down)  # so that the last row is about as full as the others
    font, gap = _font(max(11, width // 24)), max(4, width // 32)
    line = sum(font.getmetrics())
    captions = [_wrapped(prompt, font, most * (width + gap) - gap) for prompt, _ in groups]

    block = (most * (width + gap), height + max(map(len, captions)) * line + 2 * gap)
    grid = Image.new("RGB", (across * block[0] + gap, down * block[1] + gap), PAPER)
    draw = ImageDraw.Draw(grid)
    waiting = iter(pictures)
    for number, ((_, count), caption) in enumerate(zip(groups, captions, strict=True)):
        left, top = gap + number % across * block[0], gap + number // across * block[1]
        for i in range(count):
            grid.paste(next(waiting), (left + i * (width + gap), top))
        for i, text in enumerate(caption):
            draw.text((left, top + height + gap // 2 + i * line), text, INK, font)
    return grid


def beside(images: Sequence[Image.Image], side: int) -> Image.Image:
    """Square pictures (one or more) beside each other, each `side` × `side` pixels."""
    strip = Image.new("RGB", (len(images) * (side + GAP) - GAP, side), "white")
    for number, image in enumerate(images):
        strip.paste(_square(image, side), (number * (side + GAP), 0))
    return strip


def _square(image: Image.Image, side: int) -> Image.Image:
    """A square picture at `side` × `side` pixels: small ones enlarged by whole pixels, as far as they go."""
    times = side // image.width
    if times > 1:
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    return image if image.width == side else image.resize((side, side), Image.Resampling.LANCZOS)


def _wrapped(text: str, font: FreeTypeFont, width: int) -> list[str]:
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


def _cut(text: str, font: FreeTypeFont, width: float) -> str:
    """As much of the beginning of `text` as fits into `width` pixels, but at least one character."""
    end = next((end for end in range(2, len(text) + 1) if font.getlength(text[:end]) > width), len(text) + 1)
    return text[: end - 1]


@lru_cache
def _font(size: int) -> FreeTypeFont:
    """The font that comes with matplotlib, `size` pixels high: it has Cyrillic and Greek, which Pillow's own lacks."""
    return ImageFont.truetype(Path(drawing().get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
