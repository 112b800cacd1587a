"""The grid of pictures: every picture whole, every prompt in writing."""

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image, ImageFont

import kcache.report.grid
from kcache.errors import RunError
from kcache.report.grid import (
    CAPTION_LINES,
    _wrapped,
    captioned_grid,
    grids_of,
    open_picture,
    own_font,
    pictures_of,
    png_bytes,
    save_pictures,
    step_of,
    writable,
)

COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30), (200, 30, 200), (30, 200, 200)]


FONT = ImageFont.truetype(own_font(), 12)


def squares(count: int, side: int = 64) -> list[Image.Image]:
    return [Image.new("RGB", (side, side), colour) for colour in COLOURS[:count]]


def places(grid: Image.Image, count: int) -> list[tuple[int, int, int]]:
    """(top, left, pixels) of each of the coloured squares."""
    pixels = np.asarray(grid)
    masks = [(pixels == colour).all(-1) for colour in COLOURS[:count]]
    return [(int(mask.any(1).argmax()), int(mask.any(0).argmax()), int(mask.sum())) for mask in masks]


@pytest.mark.parametrize(("count", "rows"), [(1, [1]), (4, [4]), (5, [3, 2]), (6, [3, 3])])
def test_each_prompt_has_its_picture_and_its_words(count: int, rows: list[int]) -> None:
    grid = captioned_grid(squares(count), [f"prompt {i}" for i in range(count)])
    found = places(grid, count)
    assert {pixels for _, _, pixels in found} == {64 * 64}
    assert found == sorted(found)
    tops = [top for top, _, _ in found]
    assert [tops.count(top) for top in sorted(set(tops))] == rows
    for top, left, _ in found:
        below = np.asarray(grid)[top + 64 : top + 84, left : left + 64]
        assert (below < 128).any()


def test_pictures_of_one_prompt_share_a_row_and_a_caption() -> None:
    grid = captioned_grid(squares(6), ["a"] * 3 + ["b"] * 3)
    found = places(grid, 6)
    assert [top for top, _, _ in found] == [found[0][0]] * 3 + [found[3][0]] * 3
    assert found[3][0] > found[0][0] + 64
    # Only below the first of the three there is something to read.
    pixels = np.asarray(grid)[found[0][0] + 64 : found[3][0]]
    assert (pixels[:, : found[1][1]] < 128).any()
    assert not (pixels[:, found[1][1] :] < 128).any()


def test_pictures_of_several_shapes_are_whole_and_in_line() -> None:
    sizes = [(96, 64), (64, 64), (64, 96)]
    colours = [*zip(sizes * 2, COLOURS, strict=True)]
    grid = captioned_grid([Image.new("RGB", size, colour) for size, colour in colours], ["a"] * 3 + ["b"] * 3)
    found = places(grid, 6)
    assert [pixels for _, _, pixels in found] == [width * height for width, height in sizes * 2]
    middles = [top + size[1] / 2 for (top, _, _), size in zip(found, sizes * 2, strict=True)]
    assert middles == [middles[0]] * 3 + [middles[3]] * 3
    lefts = [left for _, left, _ in found]
    assert lefts[1] - lefts[0] > 96
    assert lefts[2] - lefts[1] > 64


@pytest.mark.parametrize(
    "text", ["one two three", "рыжая лиса на снегу", "x" * 200, "a " * 200, "word " * 3 + "y" * 90, "", "  a \n b "]
)
def test_captions_fit(text: str) -> None:
    font = FONT
    lines = _wrapped(text, font, 100)
    assert len(lines) <= CAPTION_LINES
    assert all(0 < font.getlength(line) <= 100 for line in lines)
    shown, whole = "".join(lines).replace(" ", ""), "".join(text.split())
    assert shown == whole or (len(lines) == CAPTION_LINES and shown[-1] == "…" and whole.startswith(shown[:-1]))


def test_lines_break_between_words() -> None:
    assert _wrapped("one two three four five six", FONT, 100) == ["one two three", "four five six"]


def make_font(path: Path, letters: str) -> None:
    """A font that has a triangle for each of the letters, and a box for all others."""
    pens = {name: TTGlyphPen(None) for name in (".notdef", *(f"u{ord(letter):05X}" for letter in letters))}
    for number, pen in enumerate(pens.values()):
        pen.moveTo((50, 0))
        pen.lineTo((450, 100 * number))
        pen.lineTo((450, 800))
        pen.closePath()
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(list(pens))
    font.setupCharacterMap({ord(letter): f"u{ord(letter):05X}" for letter in letters})
    font.setupGlyf({name: pen.glyph() for name, pen in pens.items()})
    font.setupHorizontalMetrics(dict.fromkeys(pens, (500, 0)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Triangles", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    path.parent.mkdir(parents=True, exist_ok=True)
    font.save(path)


@pytest.fixture
def fonts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine's folder of fonts: one for red foxes in Chinese, one broken."""
    make_font(tmp_path / "fonts" / "cjk" / "Triangles.ttf", "红狐, fox1step")
    (tmp_path / "fonts" / "Broken.ttf").write_bytes(b"no font")
    monkeypatch.setattr(kcache.report.grid, "FONT_FOLDERS", (str(tmp_path / "none"), str(tmp_path / "fonts")))
    for remembered in (kcache.report.grid._system_fonts, writable):
        remembered.cache_clear()
    yield tmp_path / "fonts" / "cjk" / "Triangles.ttf"
    for remembered in (kcache.report.grid._system_fonts, writable):
        remembered.cache_clear()


@pytest.mark.parametrize(
    ("text", "joined", "shown", "ours"),
    [
        ("a red fox", True, "a red fox", True),
        ("рыжая лиса, αλεπού", False, "рыжая лиса, αλεπού", True),
        ("cafe\u0301", False, "caf\u00e9", True),
        ("红狐", True, "红狐", False),
        ("红狐 fox", False, "红狐 fox", False),
        ("fox \U0001f98a", True, "fox [fox face]", True),
        ("fox \U0001f469\u200d\U0001f4bb\ufe0f", False, "fox [woman][personal computer]", True),
        ("zero\u200bwidth\u2028line", False, "zerowidth line", True),
        ("שועל אדום", True, "שועל אדום", True),
        ("ثعلب أحمر", True, "ثعلب أحمر", True),
        ("שועל אדום", False, "instead", True),
        ("ثعلب أحمر", False, "instead", True),
        ("लाल लोमड़ी", False, "instead", True),
        ("红色的狐狸", True, "instead", True),
        ("ສີ", True, "ສີ", True),
        ("\ue000", True, "instead", True),
    ],
)
def test_writing_is_drawn_with_a_font_that_has_it_or_not_at_all(
    fonts: Path, text: str, joined: bool, shown: str, ours: bool
) -> None:
    assert writable(text, "instead", joined=joined) == (shown, own_font() if ours else fonts)


def test_a_prompt_that_cannot_be_written_is_numbered(fonts: Path) -> None:
    prompts = ["a", "红狐", "红色的狐狸"]
    drawn = captioned_grid(squares(3, 256), prompts)
    said = captioned_grid(squares(3, 256), ["a", "红狐", "prompt 3, in letters that no font here has"])
    assert np.array_equal(np.asarray(drawn), np.asarray(said))
    assert not np.array_equal(np.asarray(drawn), np.asarray(captioned_grid(squares(3, 256), ["a", "狐红", "a"])))


def test_a_png_comes_back() -> None:
    grid = captioned_grid(squares(2), ["a", "b"])
    with Image.open(io.BytesIO(png_bytes(grid))) as read:
        assert read.format == "PNG"
        assert np.array_equal(np.asarray(read), np.asarray(grid))


def test_pictures_lie_singly_beside_their_grid(tmp_path: Path) -> None:
    drawn = squares(2, 32)
    path = save_pictures(tmp_path, 500, drawn, ["a", "b"])
    assert path == tmp_path / "pictures" / "step-000500.png"
    assert (grids_of(tmp_path), step_of(path)) == ([path], 500)
    assert [part.relative_to(path.parent).as_posix() for part in pictures_of(path)] == [
        "step-000500/00.png", "step-000500/01.png",
    ]  # fmt: skip
    assert [np.asarray(open_picture(part)).tolist() for part in pictures_of(path)] == [
        np.asarray(picture).tolist() for picture in drawn
    ]
    assert np.array_equal(np.asarray(open_picture(path)), np.asarray(captioned_grid(drawn, ["a", "b"])))
    assert save_pictures(tmp_path, 500, drawn[::-1], ["a", "b"]) == path
    assert open_picture(pictures_of(path)[0]).getpixel((0, 0)) == COLOURS[1]
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["step-000500", "step-000500.png"]


def test_grids_and_pictures_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for step in (1_000_000, 20, 999_999):
        grid = save_pictures(tmp_path, step, squares(1, 8) * 101, ["a"] * 101)
    assert [step_of(path) for path in grids_of(tmp_path)] == [20, 999_999, 1_000_000]
    assert [path.stem for path in pictures_of(grid)[-2:]] == ["99", "100"]
    shutil.rmtree(grid.with_suffix(""))
    assert pictures_of(grid) == []


@pytest.mark.parametrize("content", [b"", b"no picture", png_bytes(Image.new("RGB", (64, 64), "red"))[:60]])
def test_what_is_no_picture_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "00.png").write_bytes(content)
    with pytest.raises(RunError, match=r"/00\.png cannot be shown: "):
        open_picture(tmp_path / "00.png")
