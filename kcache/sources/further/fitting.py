"""Whether a file of rows has the columns that are asked for, and what to do where it has not."""

import re
from typing import Any

import pyarrow as pa

from kcache.config.source import flag_of
from kcache.sources.arrow_files import RowFile, is_caption_type, is_image_type
from kcache.sources.further.asked import may_lack
from kcache.sources.further.numbers import is_number_type
from kcache.sources.protocol import Request
from kcache.sources.reading import readable

_IMAGES = "image bytes, or datasets' struct of them"


def misfit(file: RowFile, request: Request) -> str | None:
    """Why no sample can come from a file, and what to do: words to follow its name; None where it may give some."""
    wanted = [(request.image_column, is_image_type, "--image-column", _IMAGES)]
    for name, column in request.config.controls.items():
        if column is not None:
            wanted.append((column, _may_be_null if may_lack(name) else is_image_type, flag_of(name), _IMAGES))
    if request.need_captions or request.config.caption_column is not None:
        wanted.append((request.caption_column, is_caption_type, "--caption-column", "strings or lists of strings"))
    for name, column in request.config.counts.items():
        wanted.append((column, is_number_type, f"--{name}-column", "numbers"))
    for column, fits, flag, needed in wanted:
        if (times := file.schema.names.count(column)) > 1:
            return f"has {times} columns {column!r}; expected one; write it again with names of their own"
        if not times:
            found = readable(", ".join(file.schema.names))
            return f"has no column {column!r}; found {found}; name the right one with {flag}"
        kind = file.schema.field(file.schema.names.index(column)).type
        if not fits(kind):
            advice = f"name the right one with {flag}{_about(kind, flag)}"
            return f"has a column {column!r} that holds {str(kind)[:200]}; expected {needed}; {advice}"
    return None


def _may_be_null(kind: Any) -> bool:
    return is_image_type(kind) or pa.types.is_null(kind)


def _about(kind: object, flag: str) -> str:
    """What to do about a column that is what was meant, but of another kind."""
    if flag.endswith(("caption-column", "weight-column", "repeats-column")):
        return ""
    if is_caption_type(kind) and not str(kind).endswith("null"):
        return ", or store the pictures themselves: files and URLs that text names are not fetched"
    if re.search(r"list<[^<>]*int\d+>", str(kind)):
        return ", or store each picture's bytes as binary, not as a list of numbers"
    return ", or give each picture a row" if "list" in str(kind) else ""
