"""Where a command's words cannot go any more, its work goes on."""

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kcache_cli import app
from kcache_cli.progress import Report, note
from kcache_cli.streams import telling


class _Gone(io.TextIOWrapper):
    """A stream that nobody reads any more, or a disk that is full."""

    def __init__(self, error: Exception) -> None:
        super().__init__(io.BytesIO())
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        if not self.closed:
            raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device")])
def test_progress_notes_and_logs_cost_themselves(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    gone = _Gone(error)
    monkeypatch.setattr(sys, "stderr", gone)
    with telling():
        with Report() as report:
            report.show("prior", 1, 1, "loss 0.5")
            report.note("a remark")
        note("another")
        logging.StreamHandler().emit(logging.makeLogRecord({"msg": "a warning"}))
    assert sys.stderr is gone


def test_a_result_that_cannot_be_printed_is_said_and_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", _Gone(OSError(28, "No space left on device")))
    monkeypatch.setattr(app, "app", lambda **_: sys.exit(0))
    with pytest.raises(SystemExit) as end:
        app.main()
    assert end.value.code == 1
    assert "the output could not be written ([Errno 28] No space left on device)" in capsys.readouterr().err


CLOSED = """
import os, sys
from kcache_cli.streams import telling
with telling():
    print("a note", file=sys.stderr)
    with open(sys.argv[1], "w") as file:
        assert file.fileno() > 2
        os.write(2, b"for nobody")
"""


def test_nothing_is_opened_in_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    data = tmp_path / "data"
    command = f'"{sys.executable}" -c "$1" "$2" 2>&- >&-'
    ended = subprocess.run(["sh", "-c", command, "sh", CLOSED, str(data)], check=False, env=dict(os.environ))
    assert (ended.returncode, data.read_bytes()) == (0, b"")


def test_what_a_full_disk_did_not_take_is_not_asked_for_again_when_the_interpreter_ends() -> None:
    code = (
        "import sys\nfrom kcache_cli.streams import telling\nwith telling(): print('a note', file=sys.stderr, end='')"
    )
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run([sys.executable, "-c", code], check=False, stderr=full, env=environment)
    assert ended.returncode == 0
