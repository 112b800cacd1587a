"""A page of text, tables and pictures as one HTML file that needs nothing else: no network, no scripts, no fonts.

What is shown comes from captions and paths of strangers: everything is escaped, and the page forbids itself by a
content security policy (https://www.w3.org/TR/CSP3/) to load or run anything but its own pictures and styles.
"""

import base64
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from kcache.disk.durable import write_bytes

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """A paragraph of plain text; its line breaks are kept."""

    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows of plain text under column heads; columns of numbers are aligned to the right.

    Raises ValueError for a row that has not one cell per head.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.head):
                raise ValueError(f"a row of {len(row)} cells, {row!a}, under {len(self.head)} heads, {self.head!a}")

    @property
    def numbers(self) -> list[bool]:
        """Of each column, whether it holds nothing but numbers."""
        return [bool(self.rows) and all(_is_number(row[i]) for row in self.rows) for i in range(len(self.head))]


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A picture, as the bytes of a PNG file, with the text below it, which is also read out in its stead.

    Neighbouring figures stand side by side where there is room. Raises ValueError for a picture that is no PNG.
    """

    png: bytes
    caption: str
    density: int = 1
    """Pixels of the file per pixel of the page: 2 for what is drawn, so that it is sharp on fine screens and paper."""

    def __post_init__(self) -> None:
        if not self.png.startswith(PNG_SIGNATURE):
            raise ValueError(f"{self.caption!a} begins with {self.png[:8]!r}; expected the bytes of a PNG file")

    @property
    def data(self) -> str:
        """The file in base64."""
        return base64.b64encode(self.png).decode()

    @property
    def size(self) -> tuple[int, int]:
        """Width and height on the page, in its pixels."""
        # A PNG file says its size at a fixed place (https://www.w3.org/TR/png-3/#11IHDR).
        width, height = struct.unpack(">II", self.png[16:24])
        return width // self.density, height // self.density


Block = Text | Table | Figure

_MARK = b'<meta name="generator" content="kcache">'
"""What page.html says of itself near its beginning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A part of the page under a heading of its own, which the list at the top links to."""

    title: str
    blocks: Sequence[Block]

    @property
    def groups(self) -> list[tuple[str, list[Block]]]:
        """Neighbouring blocks of one class, beside its name."""
        return [(kind.__name__, list(blocks)) for kind, blocks in groupby(self.blocks, key=type)]


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Write the page to `path`, whole or not at all; its folder has to be there.

    Raises CacheWriteError when the system refuses.
    """
    # Everything that is shown goes through `_printable` and is escaped.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_printable,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    page = environment.get_template("page.html").render(title=title, sections=sections)
    write_bytes(path, page.encode())


def is_page(path: Path) -> bool:
    """Whether `write_page` wrote what is at `path`; raises OSError."""
    if not path.is_file():  # a device, of which a read may wait forever
        return False
    with path.open("rb") as file:
        return _MARK in file.read(1024)


def _is_number(cell: str) -> bool:
    """Whether a cell is a count, a share or a size: "1,797", "3.2 %", "25.1 MB"."""
    number, _, unit = cell.partition(" ")
    return number.lstrip("-−").replace(",", "").replace(".", "", 1).isdecimal() and len(unit) <= 8


_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def _printable(shown: Any) -> Any:
    """What is shown, with what cannot stand in a page, such as control characters, as �.

    The names of files may hold bytes that are no text: Python reads them as lone surrogates.
    """
    return _UNPRINTABLE.sub("�", shown) if isinstance(shown, str) else shown
