"""Names found inside a source, turned into paths that stay inside it."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from kcache.errors import InputRejected

__all__ = ["locate", "readable"]


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


def readable(path: str) -> str:
    """A path as valid UTF-8 text: a byte NN that is not UTF-8 is written \\udcNN."""
    return path.encode("utf-8", "backslashreplace").decode()
