"""Stopping on a signal: noted first, acted on where nothing is half done."""

import os
import resource
import signal
import subprocess
import sys
import threading

import pytest

import kcache.stopping
from kcache.stopping import STOP_SIGNALS, Crew, end_on_signals, shielded, stop_here, stopped_when_safe

SIGNALS = [
    (number, KeyboardInterrupt if number == signal.SIGINT else SystemExit)
    for number in STOP_SIGNALS
    if number != signal.SIGALRM  # by which pytest ends tests that hang: a program's own are left to it
]


@pytest.mark.parametrize(("number", "error"), SIGNALS)
def test_a_signal_is_acted_on_where_the_work_says_so(number: signal.Signals, error: type[BaseException]) -> None:
    before = signal.getsignal(number)
    with stopped_when_safe() as asked:
        stop_here()
        os.kill(os.getpid(), number)
        assert asked == [number]
        with pytest.raises(error) as caught:
            stop_here()
    assert error is KeyboardInterrupt or caught.value.code == 128 + number  # type: ignore[attr-defined]
    assert signal.getsignal(number) is before
    stop_here()  # it is forgotten


def test_what_launchers_repeat_changes_nothing_and_ctrl_c_once_more_in_a_while_acts_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with stopped_when_safe() as asked:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGTERM, signal.SIGXCPU, signal.SIGXCPU):
            os.kill(os.getpid(), number)
        assert len(asked) == 6
        monkeypatch.setattr(kcache.stopping, "SAME_REQUEST_SECONDS", 0.0)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_behind_a_shield_even_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kcache.stopping, "SAME_REQUEST_SECONDS", 0.0)
    done = []

    def work() -> None:
        with stopped_when_safe():
            with shielded():
                os.kill(os.getpid(), signal.SIGINT)
                with shielded():
                    os.kill(os.getpid(), signal.SIGINT)
                done.append("shielded")
            done.append("more")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["shielded"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])  # under nohup
def test_ignored_signals_stay_ignored(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with stopped_when_safe() as asked:
            os.kill(os.getpid(), number)
            assert asked == []
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_programs_own_signals_are_left_to_it() -> None:
    came = []
    before = signal.signal(signal.SIGUSR2, lambda *_: came.append("its own"))
    try:
        with stopped_when_safe() as asked:
            os.kill(os.getpid(), signal.SIGUSR2)
        assert (asked, came) == ([], ["its own"])
    finally:
        signal.signal(signal.SIGUSR2, before)


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


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGUSR1", 138)])
def test_what_a_library_makes_of_a_signal_is_not_reported(name: str, code: int) -> None:
    run = subprocess.run([sys.executable, "-c", SWALLOWED.format(name=name)], check=False, capture_output=True)
    assert (run.returncode, run.stdout, run.stderr) == (code, b"", b"")


@pytest.mark.parametrize(
    ("limits", "soft"),
    [((-1, 25), 13), ((25, 25), 13), ((-1, 3600), 3240), ((60, 3600), None), ((-1, -1), None)],
)
def test_a_limit_of_processor_time_is_told_of_before_it_kills(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], soft: int | None
) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: told.append(both))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    end_on_signals()
    assert told == ([] if soft is None else [(soft, limits[1])])


def test_a_crew_makes_calls_in_their_order_and_cancels_what_it_has_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kcache.stopping.LAST_WORD_SECONDS", 0.01)
    crew, silence, begun, made = Crew(1, "crew"), threading.Event(), threading.Event(), list[int]()
    calls = [crew.submit(made.append, number) for number in range(5)]
    failing = crew.submit(int, "x")
    with pytest.raises(ValueError, match="invalid literal"):
        failing.result()
    assert made == [0, 1, 2, 3, 4]
    assert all(call.result() is None for call in calls)
    crew.submit(lambda: begun.set() or silence.wait())
    begun.wait()
    late = crew.submit(made.append, 5)
    crew.close()  # and waits for nobody
    assert late.cancelled()
    silence.set()
    crew.close()


@pytest.mark.timeout(60)
def test_a_program_ends_while_a_crew_hangs() -> None:
    code = "import threading; from kcache.stopping import Crew; Crew(1, 'crew').submit(threading.Event().wait)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
