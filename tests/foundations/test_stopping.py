"""Stopping on a signal: noted first, acted on where nothing is half done."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from kcache.stopping import stop_here, stopped_when_safe

SIGNALS = [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]


@pytest.mark.parametrize(("number", "error"), SIGNALS)
def test_a_signal_is_acted_on_where_the_work_says_so(number: signal.Signals, error: type[BaseException]) -> None:
    before = signal.getsignal(number)
    with stopped_when_safe() as asked:
        stop_here()
        os.kill(os.getpid(), number)
        assert asked == [number]
        with pytest.raises(error) as caught:
            stop_here()
    assert error is KeyboardInterrupt or caught.value.code == 143  # type: ignore[attr-defined]
    assert signal.getsignal(number) is before
    stop_here()  # it is forgotten


def test_the_second_of_a_kind_acts_at_once_and_another_kind_does_not() -> None:
    with stopped_when_safe() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # what launchers answer Ctrl-C with
        assert asked == [signal.SIGINT, signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stopped_when_safe() as asked:
            os.kill(os.getpid(), signal.SIGINT)
            assert asked == []
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_signals_stay_what_they_are() -> None:
    before, found = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with stopped_when_safe():
            found.append(signal.getsignal(signal.SIGINT))
            stop_here()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


SWALLOWED = """
import os, signal
from kcache.errors import KcacheError
from kcache_cli import app

def work(**_):
    try:
        os.kill(os.getpid(), signal.{name})
    except BaseException as error:  # as numpy does where it asks what it was given
        raise KcacheError("no such array") from error

app.app = work
app.main()
"""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_what_a_library_makes_of_a_signal_is_not_reported(name: str, code: int) -> None:
    run = subprocess.run([sys.executable, "-c", SWALLOWED.format(name=name)], check=False, capture_output=True)
    assert (run.returncode, run.stdout, run.stderr) == (code, b"", b"")
