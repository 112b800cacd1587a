"""Readers: nothing is removed from what someone reads, and who reads it is told."""

import errno
import fcntl
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from kcache.disk.durable import exclusive, shared
from kcache.disk.readers import Reading
from kcache.errors import CacheBusyError


def test_a_folder_that_is_read_is_nobodys_alone(tmp_path: Path) -> None:
    with Reading(tmp_path), Reading(tmp_path):
        with pytest.raises(CacheBusyError, match="in use by another process, or another part"), exclusive(tmp_path):
            pass
        with shared(tmp_path):  # as builders do
            pass
    with exclusive(tmp_path):
        pass


def test_who_has_it_alone_may_read_it(tmp_path: Path) -> None:
    with exclusive(tmp_path), Reading(tmp_path):
        pass


def test_a_reader_that_is_forgotten_lets_go(tmp_path: Path) -> None:
    reading = Reading(tmp_path)
    again = pickle.loads(pickle.dumps(reading))  # noqa: S301  # as it goes to another process
    del reading
    with pytest.raises(CacheBusyError), exclusive(tmp_path):
        pass
    del again
    with exclusive(tmp_path):
        pass


def test_the_other_process_is_named_by_its_command(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib; from kcache.disk.readers import Reading; "
        "held = Reading(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    named = f"in use by another process, {child.pid} \\("
    with pytest.raises(CacheBusyError, match=named), exclusive(tmp_path):
        pass
    child.communicate("")
    with exclusive(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF])
def test_where_there_are_no_holds_it_is_read_without(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with Reading(tmp_path):
        pass
    with Reading(tmp_path / "nothing"):
        pass


def test_a_folder_that_is_being_changed_is_not_read(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    with exclusive(tmp_path):
        child = context.Process(target=_read_elsewhere, args=(tmp_path,))
        child.start()
        child.join(30)
    assert child.exitcode == 7


def _read_elsewhere(folder: Path) -> None:
    import kcache.disk.readers

    kcache.disk.readers._alone.clear()  # what a process of its own knows
    with pytest.raises(CacheBusyError, match="is being changed by another process, "):
        Reading(folder)
    os._exit(7)
