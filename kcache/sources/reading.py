"""Captions, names and files found inside a source, read warily: they may be anything."""

import codecs
import io
import os
import re
import shlex
import stat
from collections.abc import Sequence
from errno import ENAMETOOLONG
from pathlib import Path
from typing import Any

from kcache.errors import InputRejected
from kcache.plainly import no_words, plainly, printable

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_FIRST_OF_MARKS = {mark[:1] for mark, _ in _MARKS}
_HUB_BLOB = re.compile(r"/(datasets|models|spaces)--[^/]+/blobs(/|$)")


def caption_tuple(cell: object, *, needed: bool) -> tuple[str, ...]:
    """The captions in one cell of metadata: a string is one caption, a list of strings several.

    An empty string is a caption, the unconditional one; null is none, also in a list. No caption at all is () unless
    `needed`. Raises InputRejected.
    """
    captions: list[Any] = [each for each in (cell if isinstance(cell, list) else [cell]) if each is not None]
    if not captions:
        if needed:
            raise InputRejected("source", "no caption; give a string, a list of strings, or remove the image")
        return ()
    for caption in captions:
        _check_caption(caption)
    return tuple(captions)


def caption_file(path: str) -> tuple[str, ...]:
    """The captions in a text file, as `caption_lines` takes them; raises InputRejected."""
    name = path.rpartition("/")[2]
    try:
        content = read_file(path, MAX_TEXT_BYTES)
    except InputRejected as rejection:
        raise InputRejected("source", f"caption file {name!a}: {rejection.reason}") from rejection
    return caption_lines(content, name)


def caption_lines(content: bytes, name: str) -> tuple[str, ...]:
    """The captions in text called `name`: each line that is not blank is one; blank text is one empty caption.

    Raises InputRejected.
    """
    try:
        text = decode_text(content)
    except UnicodeDecodeError as error:
        found = plainly(content)
        reason = f"it is {found}" if found else str(error)
        raise InputRejected("source", f"caption file {name!a} is not UTF-8 text: {reason}") from error
    if found := plainly(content) if "\0" in text else no_words(content):
        raise InputRejected("source", f"caption file {name!a} is {found}")
    # Not str.splitlines: it also cuts at characters that stand inside captions, such as U+2028.
    captions = [line.strip() for line in _LINE_END.split(text) if line.strip()]
    return caption_tuple(captions or "", needed=True)


LINE_ENDS = "\r\n|\r|\n"
"""What ends a line, as a regular expression."""
_LINE_END = re.compile(LINE_ENDS)


def decode_text(content: bytes, errors: str = "strict") -> str:
    """Text in the encoding that its byte order mark says, else UTF-8, for which `errors` is as in bytes.decode.

    Raises UnicodeDecodeError.
    """
    if content[:1] in _FIRST_OF_MARKS:
        for mark, encoding in _MARKS:
            if content.startswith(mark):
                return content.decode(encoding)
    return content.decode("utf-8-sig", errors)


def _check_caption(caption: object) -> None:
    if not isinstance(caption, str):
        raise InputRejected(
            "source", f"caption is {_short(caption)}, of type {type(caption).__name__}; expected a string"
        )
    if "\0" in caption:
        raise InputRejected("source", f"caption {_short(caption)} contains a NUL character; remove it")
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise InputRejected(
            "source",
            f"caption {_short(caption)} is not valid Unicode text (a lone surrogate or a byte that is "
            f"not UTF-8, at character {error.start}); correct its encoding, e.g. iconv -f WINDOWS-1252 -t UTF-8",
        ) from None


def _short(value: object) -> str:
    # ascii, so that the reason can be printed and written whatever the value holds.
    text = ascii(value)
    return text if len(text) <= 60 else text[:59] + "…"


MAX_IMAGE_BYTES = 1 << 29
"""Largest image file, undecoded: what the decoder's limit on pixels leaves room for, 8 bytes each, uncompressed."""
MAX_TEXT_BYTES = 1 << 20
"""Largest file of captions of one image; text encoders read a few hundred bytes of it."""


def locate(name: str, folder: Path, roots: Sequence[Path], links: Sequence[Path] = ()) -> Path:
    """The regular file that `name`, found in the data, means in `folder`; it must lie in one of the `roots`.

    The roots are real, absolute paths, and so are `links`: where a link in the roots may lead, besides. Raises
    InputRejected for whatever is not a regular file there; a name is data, so neither an absolute one, nor "..", nor a
    link may lead out of them.
    """
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:
        encoded = b""
    if not encoded or b"\0" in encoded:
        raise InputRejected("source", f"{name!a} is not a file name")
    path = Path(os.path.normpath(folder / name))
    if not any(path.is_relative_to(root) for root in roots):
        raise InputRejected("source", f"path {name!a} leads out of the source; use a path relative to {folder}")
    real = follow(path, [*roots, *links])
    try:
        mode = real.stat().st_mode
    except OSError as error:
        raise InputRejected("source", f"there is no readable file {name!a}: {error.strerror}") from None
    if stat.S_ISDIR(mode):
        raise InputRejected("source", "a folder, not a file")
    if not stat.S_ISREG(mode):
        raise InputRejected("source", "not a regular file")
    return path


def follow(path: Path, roots: Sequence[Path]) -> Path:
    """Where `path` really lies, all links followed; raises InputRejected unless something is there and in the roots."""
    try:
        real = path.resolve(strict=True)
    except OSError as error:
        if error.errno != ENAMETOOLONG and path.is_symlink() and (target := _end_of(path)) is not None:
            raise InputRejected("source", _dangling(os.fspath(path.readlink()), target)) from None
        raise InputRejected("source", f"there is no readable file {_short(path.name)}: {error.strerror}") from None
    except RuntimeError:
        # How Path.resolve reports a loop before Python 3.13.
        raise InputRejected("source", f"the link {path.name!a} leads back to itself") from None
    if not any(real.is_relative_to(root) for root in roots):
        raise InputRejected("source", _outside(real))
    return real


def _end_of(link: Path) -> Path | None:
    """The path at the end of a chain of links, where nothing is; None for a loop."""
    try:
        target = link.resolve()
    except (OSError, RuntimeError):
        return None
    return None if target.is_symlink() or os.path.lexists(target) else target


def _dangling(written: str, target: Path) -> str:
    place, found = os.fspath(target), f"a dangling link: {written!a} is not there"
    if "/annex/objects/" in place:
        return f"{found}, as it has not been fetched; run: git annex get"
    if "/.dvc/cache/" in place:
        return f"{found}, as it has not been fetched; run: dvc pull"
    if _HUB_BLOB.search(place):
        return f"{found}; fetch the files anew: hf download … --local-dir FOLDER"
    return f"{found}; restore that, or remove the link"


def _outside(real: Path) -> str:
    place = printable(shlex.quote(os.fspath(real if real.is_dir() else real.parent)))
    other = "; or fetch files without links: hf download … --local-dir FOLDER" if _HUB_BLOB.search(f"{real}") else ""
    return f"link to {os.fspath(real)!a}, outside the source; to follow it: --follow-links {place}{other}"


def read_file(path: str | Path, limit: int) -> bytes:
    """All bytes of a file; raises InputRejected when it cannot be read or has more than `limit` bytes."""
    try:
        with io.FileIO(path) as file:  # a buffer for all that is read at once is one too many
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise InputRejected("source", f"it has {size:,} bytes, more than {limit:,}")
            return file.readall()
    except OSError as error:
        raise InputRejected("source", f"cannot be read: {error.strerror}") from error


def readable(path: str) -> str:
    """A path as text that is safe to store and to show: `printable`; most paths stay as they are."""
    return printable(path)


def stem_of(path: str) -> str:
    """A path without the suffix of its file."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + (name.rpartition(".")[0] or name)
