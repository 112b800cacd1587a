"""Captions, names and files found inside a source, read warily: they may be anything."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from kcache.errors import InputRejected


def caption_tuple(cell: object, *, needed: bool) -> tuple[str, ...]:
    """The captions in one cell of metadata: a string is one caption, a list of strings several.

    An empty string is a caption, the unconditional one. No caption at all is () unless `needed`. Raises InputRejected.
    """
    if cell is None or cell == []:
        if needed:
            raise InputRejected("source", "no caption; give a string, a list of strings, or remove the image")
        return ()
    captions = cell if isinstance(cell, list) else [cell]
    for caption in captions:
        _check_caption(caption)
    return tuple(captions)


def caption_file(path: Path) -> tuple[str, ...]:
    """The captions in a text file, as `caption_lines` takes them; raises InputRejected."""
    try:
        content = read_file(path, MAX_TEXT_BYTES)
    except InputRejected as rejection:
        raise InputRejected("source", f"caption file {path.name!a}: {rejection.reason}") from rejection
    return caption_lines(content, path.name)


def caption_lines(content: bytes, name: str) -> tuple[str, ...]:
    """The captions in text called `name`: each line that is not blank is one; blank text is one empty caption.

    Raises InputRejected.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputRejected("source", f"caption file {name!a} is not UTF-8 text: {error}") from error
    # Not str.splitlines: it also cuts at characters that stand inside captions, such as U+2028.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    captions = [line.strip() for line in lines if line.strip()]
    return caption_tuple(captions or "", needed=True)


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
            f"not UTF-8, at character {error.start}); correct its encoding",
        ) from None


def _short(value: object) -> str:
    # ascii, so that the reason can be printed and written whatever the value holds.
    text = ascii(value)
    return text if len(text) <= 60 else text[:59] + "…"


MAX_IMAGE_BYTES = 1 << 29
"""Largest image file, undecoded: what the decoder's limit on pixels leaves room for, 8 bytes each, uncompressed."""
MAX_TEXT_BYTES = 1 << 20
"""Largest file of captions of one image; text encoders read a few hundred bytes of it."""


def locate(name: str, folder: Path, roots: Sequence[Path]) -> Path:
    """The regular file that `name`, found in the data, means in `folder`; it must lie in one of the `roots`.

    The roots are real, absolute paths. Raises InputRejected for whatever is not a regular file there; a name is data,
    so neither an absolute one, nor "..", nor a link may lead out of the roots.
    """
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:
        encoded = b""
    if not encoded or b"\0" in encoded:
        raise InputRejected("source", f"{name!a} is not a file name")
    path = folder / name
    if ".." in path.parts or not any(path.is_relative_to(root) for root in roots):
        raise InputRejected("source", f"path {name!a} leads out of the source; use a path relative to {folder}")
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except OSError as error:
        raise InputRejected("source", f"there is no readable file {name!a}: {error.strerror}") from None
    except RuntimeError:
        # How Path.resolve reports a loop before Python 3.13.
        raise InputRejected("source", f"the link {name!a} leads back to itself") from None
    if not any(real.is_relative_to(root) for root in roots):
        raise InputRejected("source", f"link to {os.fspath(real)!a}, outside the source; put a copy of the file there")
    if stat.S_ISDIR(mode):
        raise InputRejected("source", "a folder, not a file")
    if not stat.S_ISREG(mode):
        raise InputRejected("source", "not a regular file")
    return path


def read_file(path: Path, limit: int) -> bytes:
    """All bytes of a file; raises InputRejected when it cannot be read or has more than `limit` bytes."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise InputRejected("source", f"it has {size:,} bytes, more than {limit:,}")
            return file.read()
    except OSError as error:
        raise InputRejected("source", f"cannot be read: {error.strerror}") from error


def readable(path: str) -> str:
    """A path as valid UTF-8 text: a byte NN that is not UTF-8 is written \\udcNN."""
    return path.encode("utf-8", "backslashreplace").decode()
