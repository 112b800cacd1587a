"""How much a sample counts and how often it comes, as rows and members say it: numbers, read warily."""

import re
from collections.abc import Collection, Mapping
from decimal import Decimal
from typing import Any

import pyarrow as pa

from kcache.errors import InputRejected
from kcache.plainly import shown
from kcache.sources.arrow_files import decode_captions, is_caption_type
from kcache.store.formats.records import Records

MOST_REPEATS = 1_000_000
"""More are a slip: such a sample would be all that is seen."""
_RANGES = {"weight": (0, 3.4e38), "repeats": (1, MOST_REPEATS)}
"""Of weights what float32 holds, about."""
_TYPES = {"weight": pa.float64(), "repeats": pa.int32()}
_EXPECTED = {"weight": "a number, 0 or more", "repeats": f"a whole number, 1 to {MOST_REPEATS:,}"}
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?")
_MOST_DIGITS = 400
"""Of a number in text: float64 has 309 before its point."""


def number_in(name: str, column: str, cell: object) -> float | int | None:
    """The "weight" or the "repeats" in a cell of a column: a number, or the text of one; None where there is none.

    Raises InputRejected for anything else, and for one that is out of range.
    """
    number = cell
    if isinstance(cell, str):
        found = _NUMBER.fullmatch(cell.strip()) if len(cell) <= _MOST_DIGITS else None
        number = float(found[0]) if found else cell
    if number is None or (isinstance(number, str) and not number.strip()):  # as a CSV cell without a value is
        return None
    least, most = _RANGES[name]
    # NaN is in no range.
    if isinstance(number, (int, float, Decimal)) and not isinstance(number, bool) and least <= number <= most:
        if name == "weight":
            return float(number)
        if number % 1 == 0:
            return int(number)
    raise InputRejected("source", f"{column} is {shown(cell)}; expected {_EXPECTED[name]}, for --{name}-column")


def numbers_in(columns: Mapping[str, str], row: Mapping[str, object]) -> dict[str, float | int]:
    """The numbers of a row, by name; those that `columns` asks for and that it holds. Raises InputRejected."""
    cells = {name: number_in(name, column, row.get(column)) for name, column in columns.items()}
    return {name: number for name, number in cells.items() if number is not None}


def number_fields(columns: Collection[str]) -> list[Any]:
    """The columns of records that have such numbers, None where there is none: only those that are asked for."""
    return [pa.field(name, _TYPES[name]) for name in columns]


def counts_at(samples: Records, columns: Collection[str], i: int) -> tuple[float, int]:
    """Weight and repeats of record `i`, of those that have `number_fields` of these columns."""
    weight, repeats = (samples.value(i, name) if name in columns else None for name in _TYPES)
    return 1.0 if weight is None else weight, 1 if repeats is None else repeats


def is_number_type(kind: Any) -> bool:
    """Whether a pyarrow type may hold numbers: integers, floats, decimals, or their text; null holds none."""
    types = pa.types
    if any(is_one(kind) for is_one in (types.is_integer, types.is_floating, types.is_decimal)):
        return True
    return is_caption_type(kind) and not types.is_nested(kind)


def decode_numbers(column: Any) -> list[object]:
    """The cells of a column of numbers; raises pa.ArrowInvalid when its offsets lead out of the data."""
    if is_caption_type(column.type):
        return list(decode_captions(column))
    column.validate()
    found: list[object] = column.to_pylist()
    return found
