"""Names found inside a source, turned into paths that stay inside it."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from kcache.errors import InputRejected

__all__ = ["MAX_IMAGE_BYTES", "MAX_TEXT_BYTES", "locate", "read_file", "readable"]

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
