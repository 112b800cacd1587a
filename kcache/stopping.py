"""Stopping on a signal where nothing is half done.

An exception thrown by a signal handler may strike anywhere: between making a folder and noting that it must go again,
or inside a library that takes it for a failure of its own. Work that writes therefore only takes note of the first
signal, and ends where it says so itself.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_asked: list[int] = []
"""The signals that came; of the process, like the handlers."""


@contextmanager
def stopped_when_safe() -> Iterator[list[int]]:
    """In the block, the first SIGINT or SIGTERM only goes into the list given; a second of its kind acts as ever.

    `stop_here` acts on it. Ignored signals stay ignored, and outside the main thread, where handlers cannot be set,
    all stay what they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield []
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    previous = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}

    def note(number: int, frame: FrameType | None) -> None:
        _asked.append(number)
        signal.signal(number, previous[signal.Signals(number)])  # its own only: launchers answer Ctrl-C with SIGTERM
        # Not by logging or print: the signal may have come in the middle of either.
        with suppress(OSError):  # nobody may be listening
            os.write(2, b"\nstopping as soon as nothing is half done; a second signal stops at once\n")

    for number in previous:
        signal.signal(number, note)
    try:
        yield _asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _asked.clear()


def stop_here() -> None:
    """Raise KeyboardInterrupt, or SystemExit(143) for SIGTERM, when a signal came in `stopped_when_safe`."""
    if _asked:
        raise KeyboardInterrupt if signal.SIGINT in _asked else SystemExit(128 + signal.SIGTERM)
