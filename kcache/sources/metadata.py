"""Metadata files of a folder: which picture a row is about, and what it says; JSON lines, JSON, CSV and parquet."""

import csv
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from kcache.errors import InputRejected, SourceError
from kcache.plainly import plainly_at, shown
from kcache.sources.arrow_files import ParquetFile, decode_captions, is_caption_type
from kcache.sources.further.numbers import decode_numbers, is_number_type, numbers_in
from kcache.sources.listing import FolderListing
from kcache.sources.protocol import Request
from kcache.sources.reading import LINE_ENDS, caption_tuple, decode_text

FILE_COLUMN = "file_name"
_DELIMITERS = (",", ";", "\t", "|")
_MOST_LINES = 1000
"""Lines of one CSV row: a quote that is not closed within so many is a stray one."""
_Fits = Mapping[str, Callable[[Any], bool]]
"""Columns, and whether such a one of a pyarrow type may hold what is meant."""
_Value = TypeVar("_Value", str, float | int)
_NO_ROW = "not a row: expected a JSON object on one line, or as many CSV cells as columns (quote commas)"


@dataclass(slots=True, kw_only=True)
class Said:
    """What the metadata files of a folder say."""

    captions: dict[str, list[str]] = field(default_factory=dict)
    """Of each picture that a row names, by path: in the order of the rows, each once; [] where none has any."""
    controls: dict[str, dict[str, str]] = field(default_factory=dict)
    """The control images of each picture, by the name of their kind, as far as rows name any: their paths."""
    counts: dict[str, dict[str, float | int]] = field(default_factory=dict)
    """The numbers of each picture, by name, as far as rows hold any."""
    unfit: dict[str, str] = field(default_factory=dict)
    """Pictures whose rows name no such image, or hold no such number, or several: and why."""
    wrong: dict[str, dict[str, str]] = field(default_factory=dict)
    """By picture, its rows whose caption cannot be one, and why."""
    refused: dict[str, str] = field(default_factory=dict)
    """Rows and files that say nothing, and why."""
    files: list[str] = field(default_factory=list)
    """The metadata files that were read."""
    columns: set[str] = field(default_factory=set)
    """Names of all their columns."""

    def numbers(self, picture: str, names: Collection[str]) -> list[float | int | None]:
        """The numbers of a picture that are called so; None for what no row holds."""
        held = self.counts.get(picture, {})
        return [held.get(name) for name in names]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    columns: Sequence[str] | None
    """None where each row has its own."""
    rows: Iterator[tuple[str, object]]
    """Where each row stands, and what it is: by column, why it cannot be read, or anything else where it is no row."""


def read_metadata(listing: FolderListing, request: Request) -> Said:
    """Read all metadata files of a folder; a file or a row that cannot be used costs itself only, and is named."""
    said = Said()
    for path in listing.metadata:
        if path not in listing.left_out:
            try:
                _read_file(path, listing, request, said)
            except InputRejected as rejection:
                said.refused[path] = rejection.reason
    for path, captions in said.captions.items():
        said.captions[path] = list(dict.fromkeys(captions))
    return said


def _read_file(path: str, listing: FolderListing, request: Request, said: Said) -> None:
    """Add what one file says; raises InputRejected for one that is no metadata."""
    column = request.config.image_column or FILE_COLUMN
    config = request.config
    others = {request.caption_column: is_caption_type} | dict.fromkeys(
        filter(None, config.controls.values()), is_caption_type
    )
    others |= dict.fromkeys(config.counts.values(), is_number_type)
    table = _open(listing.folder / path, column, others)
    for name in (column, *others):
        if (times := list(table.columns or ()).count(name)) > 1:
            raise InputRejected("source", f"has {times} columns {name!r}; expected one; give each a name of its own")
    columns = set(table.columns or ())
    rows, folder = 0, path[: path.rfind("/") + 1]
    reasons: dict[str, str] = {}
    for place, value in table.rows:
        rows += 1
        name = f"{path} {place}"
        try:
            if isinstance(value, InputRejected):
                raise value
            if not isinstance(value, dict):
                raise InputRejected("source", _NO_ROW)
            columns.update(value)
            _read_row(value, column, folder, name, listing, request, said)
        except InputRejected as rejection:
            reasons[name] = rejection.reason
    if not rows:
        raise InputRejected("source", f"holds no rows{_unlike_text(listing.folder / path)}")
    if column not in columns:
        if not columns:
            raise InputRejected("source", f"{_NO_ROW}; none of its {rows:,} lines is{_plain(listing.folder / path)}")
        raise InputRejected("source", _without(column, sorted(columns)))
    said.refused |= reasons
    said.columns |= columns
    said.files.append(path)


def _read_row(
    row: dict[str, object],
    column: str,
    folder: str,
    name: str,
    listing: FolderListing,
    request: Request,
    said: Said,
) -> None:
    file = row.get(column)
    if not isinstance(file, str):
        raise InputRejected("source", f"{column} is {shown(file)}; expected a path relative to the metadata file")
    try:
        path = listing.find(file, folder)
    except InputRejected as rejection:
        raise InputRejected("source", f"{column} {file!a}: {rejection.reason}") from None
    if path in listing.left_out:
        return
    captions = said.captions.setdefault(path, [])
    try:
        captions.extend(caption_tuple(row.get(request.caption_column), needed=False))
    except InputRejected as rejection:
        said.wrong.setdefault(path, {})[name] = rejection.reason
    try:
        _join(said.counts, path, numbers_in(request.config.counts, row))
        _join(said.controls, path, _controls(row, folder, listing, request))
    except InputRejected as rejection:
        said.unfit.setdefault(path, f"{name}: {rejection.reason}")


def _controls(row: dict[str, object], folder: str, listing: FolderListing, request: Request) -> dict[str, str]:
    """The control images that a row names, by kind: their paths; raises InputRejected."""
    paths = {}
    for kind, column in request.config.controls.items():
        file = None if column is None else row.get(column)
        if file is None or (isinstance(file, str) and not file.strip()):  # as a CSV cell without a value is
            continue
        if not isinstance(file, str):
            raise InputRejected("source", f"{column} is {shown(file)}; expected a path relative to the metadata file")
        try:
            paths[kind] = listing.find(file, folder)
        except InputRejected as rejection:
            raise InputRejected("source", f"{column} {file!a}: {rejection.reason}") from None
    return paths


def _join(told: dict[str, dict[str, _Value]], path: str, found: Mapping[str, _Value]) -> None:
    """Add what one more row says of a picture; raises InputRejected where another said otherwise."""
    before = told.setdefault(path, {}) if found else {}
    for name, value in found.items():
        if before.setdefault(name, value) != value:
            raise InputRejected("source", f"{name} is {value!a}, and in another row {before[name]!a}; expected one")


def _open(path: Path, column: str, others: _Fits) -> _Table:
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            return _parquet(path, column, others)
        # surrogateescape: a byte that is not UTF-8 costs the caption it stands in, not the whole file.
        text = decode_text(path.read_bytes(), "surrogateescape")
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}; expected a readable metadata file") from error
    except UnicodeDecodeError as error:
        raise InputRejected("source", f"cannot be read as text: {error}{_plain(path)}") from error
    if suffix in (".csv", ".tsv"):
        return _csv(path, text, column)
    return _Table(columns=None, rows=_json(text, whole=suffix == ".json"))


def _plain(path: Path) -> str:
    found = plainly_at(path)
    return f"; it is {found}" if found else ""


def _without(column: str, found: Sequence[str]) -> str:
    names = ", ".join(shown(name) for name in found[:20]) or "nothing"
    return f"has no column {column!r}; found {names}; add it, or name the one that holds the paths with --image-column"


def _json(text: str, *, whole: bool) -> Iterator[tuple[str, object]]:
    """The rows of JSON lines; else of one list, or of objects over several lines, such as tools print for people."""
    rows = [
        (f"line {number}", _parsed(line))
        for number, line in enumerate(re.split(LINE_ENDS, text), start=1)
        if line.strip()
    ]
    first = rows[0][1] if rows else None
    if whole or first is None or (isinstance(first, list) and len(rows) == 1):
        objects = _objects(text)
        if len(objects) == 1 and isinstance(objects[0], list):
            return iter([(f"row {number}", value) for number, value in enumerate(objects[0])])
        if objects:
            return iter([(f"row {number}", value) for number, value in enumerate(objects)])
    return iter(rows)


def _parsed(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _objects(text: str) -> list[object]:
    """All JSON values that follow each other in a text; [] if it holds anything else."""
    decoder, at, found = json.JSONDecoder(), 0, list[object]()
    while match := re.compile(r"[\s,]*(?=\S)").match(text, at):
        try:
            value, at = decoder.raw_decode(text, match.end())
        except (ValueError, RecursionError):
            return []
        found.append(value)
    return found


def _csv(path: Path, text: str, column: str) -> _Table:
    lines = re.findall(rf"(?:[^\r\n]+(?:{LINE_ENDS})?|{LINE_ENDS})", text)
    first = next((i for i, line in enumerate(lines) if line.strip()), len(lines))
    if first < len(lines) and re.fullmatch(r"sep=.\s*", lines[first]):  # as Excel marks its own files
        first += 1
    own = "\t" if path.suffix.lower() == ".tsv" else ","
    heads = {each: _cells(lines, first, each, spaced=True)[0] or [] for each in _DELIMITERS}
    fitting = [each for each in _DELIMITERS if column in map(str.strip, heads[each])]
    delimiter = own if own in fitting or not fitting else fitting[0]
    if not fitting or (delimiter != own and len(fitting) > 1):
        likely = max(_DELIMITERS, key=lambda each: (len(heads[each]), each == own))
        raise InputRejected("source", _without(column, [name.strip() for name in heads[likely]]) + _unlike_text(path))
    columns = [name.strip() for name in heads[delimiter]]
    spaced = re.search(rf"{re.escape(delimiter)} ", lines[first]) is not None
    return _Table(columns=columns, rows=_csv_rows(lines, first, delimiter, columns, spaced=spaced))


def _unlike_text(path: Path) -> str:
    """What a file plainly is, unless that is text."""
    found = _plain(path)
    return "" if found.startswith("; it is text that begins") else found


def _csv_rows(
    lines: Sequence[str], head: int, delimiter: str, columns: Sequence[str], *, spaced: bool
) -> Iterator[tuple[str, object]]:
    at = head + _cells(lines, head, delimiter, spaced=spaced)[1]
    while at < len(lines):
        cells, used = _cells(lines, at, delimiter, spaced=spaced)
        whole = cells is not None and len(cells) == len(columns)
        if cells is None or any(cell.strip() for cell in cells):
            yield f"line {at + 1}", dict(zip(columns, cells, strict=True)) if cells is not None and whole else None
        # A row with a stray quote may have swallowed those behind it: it costs its own line only.
        at += used if whole or not cells else 1


def _cells(lines: Sequence[str], at: int, delimiter: str, *, spaced: bool) -> tuple[list[str] | None, int]:
    """The cells of the CSV row that begins at a line, and how many lines it has; None where they are no row."""
    following = (lines[i] for i in range(at, min(at + _MOST_LINES, len(lines))))
    reader = csv.reader(following, delimiter=delimiter, skipinitialspace=spaced, strict=True)
    try:
        return next(reader), reader.line_num
    except (csv.Error, StopIteration):
        return None, 1


def _parquet(path: Path, column: str, others: _Fits) -> _Table:
    try:
        file = ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise InputRejected("source", f"cannot be read as parquet: {shown(str(error), 200)}{_plain(path)}") from error
    names = file.schema.names
    if column not in names:
        raise InputRejected("source", _without(column, names))
    wanted = {name: fits for name, fits in {column: is_caption_type, **others}.items() if name in names}
    for name, fits in wanted.items():
        kind = file.schema.field(name).type
        if not fits(kind):
            expected = "strings or lists of strings" if fits is is_caption_type else "numbers"
            raise InputRejected("source", f"column {name!r} holds {kind}; expected {expected}")

    return _Table(columns=names, rows=_parquet_rows(file, wanted))


def _parquet_rows(file: ParquetFile, columns: _Fits) -> Iterator[tuple[str, object]]:
    number = 0
    try:
        for values in zip(*(_cells_of(file, name, fits) for name, fits in columns.items()), strict=True):
            yield f"row {number}", dict(zip(columns, values, strict=True))
            number += 1
    except (pa.ArrowException, OSError, ValueError) as error:
        yield f"row {number} and what follows", InputRejected("source", f"cannot be read: {shown(str(error), 200)}")


def _cells_of(file: ParquetFile, column: str, fits: Callable[[Any], bool]) -> Iterator[object]:
    for chunk in range(len(file.starts) - 1):
        for piece in file.pieces(chunk, column):
            yield from decode_numbers(piece) if fits is is_number_type else decode_captions(piece)
