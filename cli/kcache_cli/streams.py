"""Where a command's words go, which may end before it does: a killed tee, a full disk, a closed terminal."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from kcache_cli.progress import note


class _Unfailing:
    """A text stream whose failures cost what was to be written, and nothing else."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write what can be written."""
        with _suppressed():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        with _suppressed():
            self._stream.flush()


@contextmanager
def _suppressed() -> Iterator[None]:
    try:
        yield
    except OSError:
        pass
    except ValueError as error:  # of a stream that is closed
        if isinstance(error, UnicodeError):
            raise


@contextmanager
def telling() -> Iterator[None]:
    """For a command's whole run, let progress, notes, warnings and logs fail without ending the work they tell of.

    They all go through sys.stderr. What a command prints on stdout is its result: where that cannot be written the
    command exits with 1 when it would have with 0, and says so.
    """
    _open_standard_streams()
    told = sys.stderr
    nobody: TextIO = told or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - until the command ends
    sys.stderr = _Unfailing(nobody)
    try:
        yield
        _flush(0)
    except SystemExit as end:
        _flush(end.code)
        raise
    finally:
        sys.stderr = told
        _let_go(told)


def _open_standard_streams() -> None:
    """Lead descriptors 0 to 2 to nothing where they are closed: else the next file opened would be one of them."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError as error:
            if error.errno == errno.EBADF:
                os.open(os.devnull, os.O_RDWR)


def _let_go(stream: TextIO | None) -> None:
    """Flush a stream, and have what cannot be written go nowhere: the interpreter would exit with 120 for it."""
    if stream is None:
        return
    try:
        stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _flush(code: Any) -> None:
    """Flush stdout, in place of the interpreter, whose own words for a failure are no one's."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        with suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        note(f"kcache: the output could not be written ({error}); the work itself is done")
        if code in (0, None):
            raise SystemExit(1) from None
