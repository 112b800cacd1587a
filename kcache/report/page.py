"""A page of text, tables and pictures as one HTML file that needs nothing else: no network, no scripts, no fonts.

What is shown comes from captions and paths of strangers: everything is escaped, and the page forbids itself by a
content security policy (https://www.w3.org/TR/CSP3/) to load or run anything but its own pictures and styles.
"""

import base64
import html
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from kcache.durable import write_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """A paragraph of plain text; its line breaks are kept."""

    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows of plain text under column heads; columns of numbers are aligned to the right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A picture, as the bytes of a PNG file, with the text below it, which is also read out in its stead.

    Neighbouring figures stand side by side where there is room.
    """

    png: bytes
    caption: str
    density: int = 1
    """Pixels of the file per pixel of the page: 2 for what is drawn, so that it is sharp on fine screens and paper."""


Block = Text | Table | Figure


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A part of the page under a heading of its own, which the list at the top links to."""

    title: str
    blocks: Sequence[Block]


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Write the page to `path`, whole or not at all; its folder has to be there.

    Raises CacheWriteError when the system refuses, ValueError for a row that has not one cell per head and for a
    picture that is no PNG.
    """
    write_bytes(path, _page(title, sections).encode())


PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --ink: #22262b; --faint: #646b74; --line: #dfe3e6; --paper: #ffffff;
  --raised: #f5f7f8; --accent: #0b6e69; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ea; --faint: #9aa3ad; --line: #343a41; --paper: #16191c; --raised: #1f2327; --accent: #5cc4bd; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 64rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif;
  overflow-wrap: anywhere; }
h1 { margin: 0 0 1rem; font-size: 1.75rem; line-height: 1.25; }
h2 { margin: 2.75rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); font-size: 1.25rem; }
a { color: var(--accent); text-decoration: none; }
a:hover, a:focus { text-decoration: underline; }
nav ul { display: flex; flex-wrap: wrap; gap: .35rem 1.25rem; margin: 0; padding: 0; list-style: none; }
p { margin: .75rem 0; max-width: 46rem; white-space: pre-line; }
.table { margin: 1rem 0; overflow-x: auto; }
table { width: max-content; max-width: max(100%, 42rem); border-collapse: collapse; font-size: .9rem;
  font-variant-numeric: tabular-nums; overflow-wrap: break-word; }
table.pairs { max-width: 100%; }
.pairs td { overflow-wrap: anywhere; }
th, td { padding: .35rem 1.5rem .35rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; min-width: 3.5rem; max-width: 36rem;
  white-space: pre-line; }
th { color: var(--faint); font-weight: 600; white-space: nowrap; }
th.number, td.number { text-align: right; white-space: nowrap; }
.figures { display: flex; flex-wrap: wrap; gap: 1.25rem 1rem; margin: 1rem 0; align-items: flex-start; }
figure { margin: 0; max-width: 100%; }
img { display: block; max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: 6px;
  background: #ffffff; }
figcaption { margin-top: .4rem; color: var(--faint); font-size: .9rem; line-height: 1.4; white-space: pre-line; }
@media (max-width: 40rem) {
  body { padding: 1.25rem 1rem 3rem; }
  h1 { font-size: 1.4rem; }
  th, td { padding-right: 1rem; }
}
@media print {
  :root { color-scheme: light; --ink: #000000; --faint: #444444; --line: #bbbbbb; --paper: #ffffff;
    --accent: #000000; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  .table { overflow: visible; }
  h2 { break-after: avoid; }
  figure, tr { break-inside: avoid; }
}
"""


def _page(title: str, sections: Sequence[Section]) -> str:
    links = [f'<li><a href="#part-{n}">{_safe(section.title)}</a></li>' for n, section in enumerate(sections, 1)]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="referrer" content="no-referrer">',
            f"<title>{_safe(title)}</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            f"<h1>{_safe(title)}</h1>",
            *(["<nav><ul>", *links, "</ul></nav>"] if len(sections) > 1 else []),
            "<main>",
            *(_section(n, section) for n, section in enumerate(sections, 1)),
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _section(number: int, section: Section) -> str:
    parts = [f'<section id="part-{number}">', f"<h2>{_safe(section.title)}</h2>"]
    for together, blocks in groupby(section.blocks, key=lambda block: isinstance(block, Figure)):
        shown = list(map(_block, blocks))
        parts += ['<div class="figures">', *shown, "</div>"] if together else shown
    return "\n".join([*parts, "</section>"])


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return f"<p>{_safe(block.text)}</p>"
    if isinstance(block, Table):
        return _table(block)
    return _figure(block)


def _figure(figure: Figure) -> str:
    if not figure.png.startswith(PNG_SIGNATURE):
        raise ValueError(f"{figure.caption!a} begins with {figure.png[:8]!r}; expected the bytes of a PNG file")
    data, caption = base64.b64encode(figure.png).decode(), _safe(figure.caption)
    # A PNG file says its size at a fixed place (https://www.w3.org/TR/png-3/#11IHDR).
    width, height = (side // figure.density for side in struct.unpack(">II", figure.png[16:24]))
    size = f'width="{width}" height="{height}"'
    picture = f'<img src="data:image/png;base64,{data}" alt="{caption}" {size}>'
    return f'<figure style="width:{width}px">{picture}<figcaption>{caption}</figcaption></figure>'


def _table(table: Table) -> str:
    for row in table.rows:
        if len(row) != len(table.head):
            raise ValueError(f"a row of {len(row)} cells, {row!a}, under {len(table.head)} heads, {table.head!a}")
    numbers = [bool(table.rows) and all(_is_number(row[i]) for row in table.rows) for i in range(len(table.head))]
    marks = [' class="number"' if number else "" for number in numbers]
    heads = [f'<th scope="col"{mark}>{_safe(text)}</th>' for mark, text in zip(marks, table.head, strict=True)]
    pairs = ' class="pairs"' if len(table.head) == 2 else ""  # broken anywhere rather than wider than a phone
    rows = [
        "<tr>" + "".join(f"<td{mark}>{_safe(cell)}</td>" for mark, cell in zip(marks, row, strict=True)) + "</tr>"
        for row in table.rows
    ]
    return "\n".join(
        [
            f'<div class="table"><table{pairs}>',
            f"<thead><tr>{''.join(heads)}</tr></thead>",
            "<tbody>",
            *rows,
            "</tbody></table></div>",
        ]
    )


def _is_number(cell: str) -> bool:
    """Whether a cell is a count, a share or a size: "1,797", "3.2 %", "25.1 MB"."""
    number, _, unit = cell.partition(" ")
    return number.lstrip("-−").replace(",", "").replace(".", "", 1).isdecimal() and len(unit) <= 8


def _safe(text: str) -> str:
    """`text` with what means something in HTML escaped; what cannot stand in a page, such as control characters, is �.

    The names of files may hold bytes that are no text: Python reads them as lone surrogates.
    """
    return html.escape("".join("�" if _forbidden(character) else character for character in text), quote=True)


def _forbidden(character: str) -> bool:
    code = ord(character)
    return (code < 32 and character not in "\t\n") or 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000
