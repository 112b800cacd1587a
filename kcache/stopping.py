"""Stopping on a signal where nothing is half done.

An exception thrown by a signal handler may strike anywhere: between making a folder and noting that it must go again,
or inside a library that takes it for a failure of its own. Work that writes therefore only takes note of signals, and
ends where it says so itself. And whoever stops waits for nobody that hangs in a request.
"""

import atexit
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any, NoReturn, ParamSpec, TypeVar

STOP_SIGNALS = (
    signal.SIGINT,  # Ctrl-C; LSF's bkill
    signal.SIGTERM,  # kill, Slurm, PBS, HTCondor, systemd, Kubernetes, launchers
    signal.SIGHUP,  # a terminal or a connection that was closed
    signal.SIGQUIT,  # Ctrl-\; containers and HTCondor jobs that are set up so
    signal.SIGUSR1,  # Slurm's --signal by custom; Grid Engine's -notify and soft limits
    signal.SIGUSR2,  # LSF's run limit, Grid Engine's -notify
    signal.SIGXCPU,  # a soft limit of processor time
    signal.SIGALRM,  # an alarm that was set before the command was begun, and nothing here sets
)
"""What terminals, launchers and batch systems end a process with that may still clear up."""
SAME_REQUEST_SECONDS = 5.0
"""Time within which Ctrl-C again is the same wish: launchers pass on what the whole group has got already."""

LAST_WORD_SECONDS = 1.0
"""For which threads that are to end are waited for; what hangs longer is left behind."""

_SECONDS_BEFORE = 30
"""Of processor time, before a limit of it: what a step and a checkpoint take, at least."""

_Arguments = ParamSpec("_Arguments")
_Answer = TypeVar("_Answer")

_asked: list[int] = []
"""The signals that came; of the process, like the handlers."""
_since = 0.0
"""When the first came."""
_shields = 0
_at_once = False
"""Whether someone has lost patience while a shield was up."""


def end_on_signals() -> list[int]:
    """From now on, let each of `STOP_SIGNALS` end this process by an exception; returns a list of those that came.

    SIGINT raises KeyboardInterrupt, any other SystemExit(128 + its number). Ignored ones stay ignored, as they are in
    the background of a script or under nohup. A hard limit of processor time, which kills, is told of before it is
    reached, by SIGXCPU. For the main thread of a command.
    """
    came: list[int] = []

    def end(number: int, frame: FrameType | None) -> NoReturn:
        came.append(number)
        raise _end_of(number)

    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)
            _ours.add(end)
    soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if hard != resource.RLIM_INFINITY:
        before = hard - min(hard // 2, max(hard // 10, _SECONDS_BEFORE))
        if soft == resource.RLIM_INFINITY or soft > before:
            resource.setrlimit(resource.RLIMIT_CPU, (before, hard))
    return came


_ours: set[Callable[..., Any]] = set()


@contextmanager
def stopped_when_safe() -> Iterator[list[int]]:
    """In the block, `STOP_SIGNALS` only go into the list given, upon which `stop_here` acts.

    Ctrl-C once more, some seconds after the first, acts at once where no shield is up: nothing else does, as machines
    repeat themselves. Ignored signals stay ignored, signals but SIGINT and SIGTERM for which a program has handlers
    are left to it, and outside the main thread, where handlers cannot be set, all stay what they are.
    """
    global _at_once
    if threading.current_thread() is not threading.main_thread():
        yield []
        return
    previous = {number: handler for number in STOP_SIGNALS if _is_to_take(number, handler := signal.getsignal(number))}

    def note(number: int, frame: FrameType | None) -> None:
        global _since, _at_once
        first = not _asked
        if first:
            _since = time.monotonic()
        _asked.append(number)
        if number == signal.SIGINT and not first and time.monotonic() - _since >= SAME_REQUEST_SECONDS:
            if not _shields:
                raise KeyboardInterrupt
            _at_once = True
        if first:
            # Not by logging or print: the signal may have come in the middle of either.
            with suppress(OSError):  # nobody may be listening
                os.write(
                    2, b"\nstopping as soon as nothing is half done; Ctrl-C once more, in a while, stops at once\n"
                )

    for number in previous:
        signal.signal(number, note)
    try:
        yield _asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _asked.clear()
        _at_once = False


def _is_to_take(number: int, handler: Any) -> bool:
    if handler is signal.SIG_IGN or handler is None:  # None: set by what is not Python
        return False
    return number in (signal.SIGINT, signal.SIGTERM) or handler is signal.SIG_DFL or handler in _ours


@contextmanager
def shielded() -> Iterator[None]:
    """Within `stopped_when_safe`, no signal interrupts the block; one that would have ends the work after it."""
    global _shields
    _shields += 1
    try:
        yield
    finally:
        _shields -= 1
    if _at_once and not _shields:
        stop_here()


def signal_asked() -> int | None:
    """The signal that `stop_here` would act on, if any: Ctrl-C's before others, as launchers answer it with SIGTERM."""
    return None if not _asked else signal.SIGINT if signal.SIGINT in _asked else _asked[0]


def stop_here() -> None:
    """When a signal came in `stopped_when_safe`, raise KeyboardInterrupt for SIGINT, SystemExit(128 + number) else."""
    number = signal_asked()
    if number is not None:
        raise _end_of(number)


def _end_of(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


class Crew:
    """Threads that make calls in the order in which they are given, and may be left behind in the middle of one.

    Those of `ThreadPoolExecutor` are waited for at the end of the program at the latest, however long a disk or a store
    is silent.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=_work, args=(self._calls,), name=f"{name}_{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)  # a program that ends has no modules any more for those that still work

    def submit(
        self, function: Callable[_Arguments, _Answer], *arguments: _Arguments.args, **named: _Arguments.kwargs
    ) -> Future[_Answer]:
        """What `function` will have given, or raised."""
        future: Future[_Answer] = Future()
        self._calls.put((future, partial(function, *arguments, **named)))
        return future

    def close(self) -> None:
        """Cancel the calls that were not begun, and wait `LAST_WORD_SECONDS` for the others; again, nothing."""
        atexit.unregister(self.close)
        with suppress(Empty):
            while True:
                if (call := self._calls.get_nowait()) is not None:
                    call[0].cancel()
        for _ in self._threads:
            self._calls.put(None)
        end = time.monotonic() + LAST_WORD_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        self._threads = [thread for thread in self._threads if thread.is_alive()]


def _work(calls: "SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]") -> None:
    while (call := calls.get()) is not None:
        _make(*call)
        del call  # what it gave is the caller's alone


def _make(future: "Future[Any]", call: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(call())
    except BaseException as error:  # noqa: BLE001  # it is raised where the answer is waited for
        future.set_exception(error)
    finally:
        del future  # the error's traceback leads here
