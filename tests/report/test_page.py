"""The page of a report: whole, readable by itself, and nothing that is shown can become a part of it."""

import errno
import io
import re
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kcache.errors import CacheWriteError
from kcache.report.page import Figure, Section, Table, Text, write_page

HOSTILE = "</p></td><script>alert('x')</script> \"quoted\" & <img src=https://evil.example/x onerror=alert(1)>"
CHROME = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def png(width: int = 4, height: int = 2, colour: str = "#0b6e69") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


class Parsed(HTMLParser):
    """Elements with their attributes, in order, and the text between the tags of each kind."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.elements[-1][0], data))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


def page(folder: Path, sections: Sequence[Section], title: str = "a run") -> str:
    write_page(folder / "report.html", title, sections)
    assert [path.name for path in folder.iterdir()] == ["report.html"]
    return (folder / "report.html").read_text(encoding="utf-8")


def test_all_parts_stand_in_their_order(tmp_path: Path) -> None:
    blocks = [
        Text(text="first\nsecond"),
        Table(head=["name", "count"], rows=[["a", "1,797"], ["b", "3"]]),
        Figure(png=png(), caption="a curve", density=2),
        Figure(png=png(), caption="another"),
    ]
    written = page(tmp_path, [Section(title="One", blocks=blocks), Section(title="Two", blocks=[Text(text="end")])])
    assert written.startswith("<!DOCTYPE html>")
    parsed = Parsed(written)
    assert parsed.text("title") == parsed.text("h1") == ["a run"]
    assert parsed.text("h2") == parsed.text("a") == ["One", "Two"]
    assert [link["href"] for link in parsed.of("a")] == [f"#{part['id']}" for part in parsed.of("section")]
    assert parsed.text("p") == ["first\nsecond", "end"]
    assert parsed.text("th") == ["name", "count"]
    assert parsed.text("td") == ["a", "1,797", "b", "3"]
    assert [cell.get("class") for cell in parsed.of("td")] == [None, "number"] * 2
    assert [(image["alt"], image["width"], image["height"]) for image in parsed.of("img")] == [
        ("a curve", "2", "1"),
        ("another", "4", "2"),
    ]
    assert len([part for part in parsed.of("div") if part["class"] == "figures"]) == 1


def test_what_is_shown_never_becomes_markup(tmp_path: Path) -> None:
    blocks = [
        Text(text=HOSTILE),
        Table(head=[HOSTILE], rows=[[HOSTILE]]),
        Figure(png=png(), caption=HOSTILE),
    ]
    parsed = Parsed(page(tmp_path, [Section(title=HOSTILE, blocks=blocks)] * 2, title=HOSTILE))
    assert not parsed.of("script")
    assert len(parsed.of("img")) == 2
    assert {image["alt"] for image in parsed.of("img")} == {HOSTILE}
    for tag in ("title", "h1", "h2", "a", "p", "th", "td", "figcaption"):
        assert set(parsed.text(tag)) == {HOSTILE}
    assert not [name for _, attributes in parsed.elements for name in attributes if name.startswith("on")]


def test_nothing_is_asked_of_a_network(tmp_path: Path) -> None:
    section = Section(title="a", blocks=[Text(text="see https://example.org"), Figure(png=png(), caption="b")])
    written = page(tmp_path, [section, section])
    parsed = Parsed(written)
    policy = next(meta for meta in parsed.of("meta") if "http-equiv" in meta)
    assert policy["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    asked = [attributes[name] for _, attributes in parsed.elements for name in ("src", "href") if name in attributes]
    assert {value.partition(",")[0].partition("-")[0] for value in asked if value} == {"#part", "data:image/png;base64"}
    assert not re.search(r"url\(|@import|<link|<iframe|<object", written)


def test_the_style_answers_to_dark_screens_phones_and_paper(tmp_path: Path) -> None:
    written = page(tmp_path, [])
    for condition in ("prefers-color-scheme: dark", "max-width: 40rem", "@media print", "color-scheme: light dark"):
        assert condition in written
    viewport = next(meta for meta in Parsed(written).of("meta") if meta.get("name") == "viewport")
    assert viewport["content"] == "width=device-width, initial-scale=1"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("tab\there", "tab\there"), ("nul\x00", "nul�"), ("\x1b[31mred\x07", "�[31mred�"), ("\udcff.png", "�.png"),
        ("ё €", "ё €"),
    ],
)  # fmt: skip
def test_what_cannot_stand_in_a_page_is_replaced(tmp_path: Path, given: str, shown: str) -> None:
    assert Parsed(page(tmp_path, [Section(title="a", blocks=[Text(text=given)])])).text("p") == [shown]


def test_rows_need_a_cell_per_head(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a row of 1 cells, \['x'\], under 2 heads"):
        write_page(tmp_path / "a.html", "t", [Section(title="s", blocks=[Table(head=["a", "b"], rows=[["x"]])])])
    assert not list(tmp_path.iterdir())


def test_pictures_need_to_be_pngs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'photo' begins with b'<svg onl'; expected the bytes of a PNG file"):
        write_page(
            tmp_path / "a.html", "t", [Section(title="s", blocks=[Figure(png=b"<svg onload=", caption="photo")])]
        )


def test_a_page_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = page(tmp_path, [Section(title="before", blocks=[])])

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("kcache.disk.durable.os.fsync", full)
    with pytest.raises(CacheWriteError, match=r"report\.html could not be written"):
        write_page(tmp_path / "report.html", "after", [])
    assert [path.read_text() for path in tmp_path.iterdir()] == [before]


@pytest.mark.skipif(CHROME is None, reason="there is no chromium or google-chrome on PATH to open the page with")
def test_a_browser_shows_all_of_it(tmp_path: Path) -> None:
    sections = [
        Section(title="First part", blocks=[Text(text=HOSTILE), Figure(png=png(200, 100, "#ff00ff"), caption="a")]),
        Section(title="Last part", blocks=[Figure(png=png(200, 100, "#00ff00"), caption="b", density=2)]),
    ]
    write_page(tmp_path / "report.html", "title", sections)
    shot, log = tmp_path / "shot.png", tmp_path / "net.json"
    command = [
        str(CHROME), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=400,900",
        f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", f"--screenshot={shot}",
        f"--log-net-log={log}", (tmp_path / "report.html").as_uri(),
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "CONSOLE" not in ran.stderr  # where a browser says what its policy has blocked
    assert "evil.example" not in log.read_text()
    with Image.open(shot) as screen:
        pixels = np.asarray(screen.convert("RGB"))
    # Both pictures are there, at their sizes on the page: all of the first, a quarter of the second's pixels.
    for colour, area in (((255, 0, 255), 200 * 100), ((0, 255, 0), 100 * 50)):
        assert (pixels == colour).all(-1).sum() == pytest.approx(area, rel=0.05)
