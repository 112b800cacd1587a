"""The pictures that a run draws on the way, as files: each by itself, and side by side in one with their prompts."""

import io
import math
import os
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features
from PIL.ImageFont import FreeTypeFont

from kcache.decoration import drawing
from kcache.disk.durable import write_bytes
from kcache.errors import RunError
from kcache.store.run_directory import PICTURES_FOLDER

PROMPTED, HELD_OUT = "step", "held-out"
"""What the files of pictures are called before their number: those from prompts, and held-out ones drawn anew, which
are somebody's own and stay in the run directory."""
COLUMNS = 4
"""Pictures beside each other, where a prompt does not have more."""
CAPTION_LINES = 3
GAP = 4
"""Pixels between pictures of a strip."""
INK, PAPER = "#22262b", "white"
FONT_FOLDERS = (
    "~/.local/share/fonts", "~/.fonts", "~/Library/Fonts", "/usr/local/share/fonts", "/usr/share/fonts",
    "/usr/share/texmf/fonts", "/Library/Fonts", "/System/Library/Fonts",
)  # fmt: skip
"""Where systems keep their fonts."""


def save_pictures(
    run_dir: Path, step: int, pictures: Sequence[Image.Image], prompts: Sequence[str], files: str = PROMPTED
) -> Path:
    """Write pictures into the run directory: each by itself, e.g. pictures/step-000500/00.png, and all in one grid.

    `prompts` has one for each picture, in writing below it in the grid, e.g. pictures/step-000500.png, whose path is
    returned; or under the name `files` in place of step. Raises CacheWriteError when they cannot be written.
    """
    grid = run_dir / PICTURES_FOLDER / f"{files}-{step:06d}.png"
    folder = grid.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        write_bytes(folder / f"{number:02d}.png", png_bytes(picture))
    write_bytes(grid, png_bytes(captioned_grid(pictures, prompts)))
    return grid


def grids_of(run_dir: Path, files: str = PROMPTED) -> list[Path]:
    """The grids of pictures in a run directory, in the order of their steps."""
    return _in_order((run_dir / PICTURES_FOLDER).glob(f"{files}-*.png"))


def pictures_of(grid: Path) -> list[Path]:
    """The pictures of a grid, each by itself, in the order of their prompts; none where only the grid was saved."""
    return _in_order(grid.with_suffix("").glob("*.png"))


def step_of(grid: Path) -> int:
    """The optimizer step after which the pictures of a grid were drawn; 0 for a file of another name."""
    digits = grid.stem.rpartition("-")[2]
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
    """One picture of all `pictures` (one or more), none of them scaled.

    `prompts` has one for each picture; neighbours with the same prompt stand in one row, with the prompt once below.
    Where they differ in height their middles are in line.
    """
    numbers = [list(group) for _, group in groupby(range(len(pictures)), lambda number: prompts[number])]
    groups = [[pictures[number] for number in group] for group in numbers]
    width, height = (max(picture.size[axis] for picture in pictures) for axis in (0, 1))
    size, gap = max(11, width // 24), max(4, width // 32)
    widest = max(sum(picture.width + gap for picture in group) for group in groups)
    down = math.ceil(len(groups) / max(1, COLUMNS * (width + gap) // widest))
    across = math.ceil(len(groups) / down)  # so that the last row is about as full as the others
    written = [
        writable(prompts[group[0]], f"prompt {number}, in letters that no font here has")
        for number, group in enumerate(numbers, 1)
    ]
    fonts = [ImageFont.truetype(file, size) for _, file in written]
    line = max(sum(font.getmetrics()) for font in fonts)
    captions = [_wrapped(text, font, widest - gap) for (text, _), font in zip(written, fonts, strict=True)]

    block = (widest, height + max(map(len, captions)) * line + 2 * gap)
    grid = Image.new("RGB", (across * block[0] + gap, down * block[1] + gap), PAPER)
    draw = ImageDraw.Draw(grid)
    for number, (group, caption, font) in enumerate(zip(groups, captions, fonts, strict=True)):
        left, top = gap + number % across * block[0], gap + number // across * block[1]
        for i, text in enumerate(caption):
            draw.text((left, top + height + gap // 2 + i * line), text, INK, font)
        for picture in group:
            grid.paste(picture, (left, top + (height - picture.height) // 2))
            left += picture.width + gap
    return grid


def beside(images: Sequence[Image.Image], side: int) -> Image.Image:
    """Pictures (one or more) beside each other, each `side` pixels high."""
    scaled = [_as_high(image, side) for image in images]
    strip = Image.new("RGB", (sum(image.width + GAP for image in scaled) - GAP, side), "white")
    left = 0
    for image in scaled:
        strip.paste(image, (left, 0))
        left += image.width + GAP
    return strip


def _as_high(image: Image.Image, height: int) -> Image.Image:
    """A picture at `height` pixels: small ones enlarged by whole pixels, as far as they go."""
    times = height // image.height
    if times > 1:
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    if image.height == height:
        return image
    return image.resize((max(1, round(image.width * height / image.height)), height), Image.Resampling.LANCZOS)


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
def writable(text: str, instead: str, *, joined: bool | None = None) -> tuple[str, Path]:
    """`text` in one line as it can be drawn here, and the font file that has all of its letters.

    That is the font which comes with matplotlib, else the first of the system's. Signs that no font has are spelt by
    their names, as in "a [fox face]"; with letters that no font has, or that what draws cannot join or set from right
    to left, it is `instead`. `joined` says whether it can; None asks Pillow, which needs raqm for it.
    """
    can_join = features.check("raqm") if joined is None else joined
    plain = " ".join(unicodedata.normalize("NFC", text).split())
    if not can_join:
        plain = "".join(character for character in plain if not _is_mark(character))
        if any(_must_be_joined(character) for character in plain):
            return instead, own_font()
    spelt = "".join(_spelt(character) for character in plain)
    for shown in dict.fromkeys((plain, spelt)):
        letters = frozenset(character for character in shown if not _is_mark(character))
        for font in (own_font(), *_system_fonts()):
            if _has(font, letters):
                return shown, font
    return instead, own_font()


def _is_mark(character: str) -> bool:
    """Whether a character is none to be seen: one that joins, parts or chooses among those beside it, or a control."""
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") or "\ufe00" <= character <= "\ufe0f"


def _must_be_joined(character: str) -> bool:
    """Whether a letter is written from right to left, or changes beside others: Arabic, Hebrew, scripts of India, …."""
    return (
        unicodedata.bidirectional(character) in ("R", "AL")
        or unicodedata.category(character) == "Mc"
        or "\u0900" <= character <= "\u109f"
        or "\u1780" <= character <= "\u18af"
    )


def _spelt(character: str) -> str:
    """A sign that the font may lack, such as an emoji, by its name; anything else as it is, and what is no sign not."""
    if _is_mark(character) or unicodedata.category(character) == "Sk":
        return ""
    is_sign = unicodedata.category(character) == "So" and not _has(own_font(), frozenset(character))
    return f"[{unicodedata.name(character, 'sign').lower()}]" if is_sign else character


def _has(file: Path, letters: frozenset[str]) -> bool:
    """Whether a font file has a shape for each of the letters: another one than for what it has not."""
    try:
        font = ImageFont.truetype(file, 16, layout_engine=ImageFont.Layout.BASIC)
        lacking = _shape(font, "\U0010ffff")
        shapes = [_shape(font, letter) for letter in letters if unicodedata.category(letter) != "Zs"]
    # Fonts of one size only, such as pictures of emoji, and broken ones.
    except (OSError, ValueError):
        return False
    return all(shape != lacking and any(shape[1]) for shape in shapes)


def _shape(font: FreeTypeFont, letter: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)


@lru_cache
def own_font() -> Path:
    """The font that comes with matplotlib: it has Cyrillic and Greek, which Pillow's own lacks."""
    return Path(drawing().get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@lru_cache
def _system_fonts() -> tuple[Path, ...]:
    """The fonts in the usual folders, in the order of their paths: upright ones first."""
    found: list[Path] = []
    for folder in FONT_FOLDERS:
        for parent, _, names in os.walk(Path(folder).expanduser()):
            found += [Path(parent, name) for name in names if name.lower().endswith((".ttf", ".otf", ".ttc"))]
    slanted = ("bold", "italic", "oblique", "light", "black", "thin", "mono")
    return tuple(sorted(found, key=lambda path: (any(word in path.name.lower() for word in slanted), path)))
