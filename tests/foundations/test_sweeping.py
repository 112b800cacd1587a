"""Of what is kept to save time, what nobody uses and was not used for longest goes first."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kcache.disk import sweeping
from kcache.disk.sweeping import hold, sweep

HOLDER = """
import sys
from pathlib import Path
from kcache.disk.sweeping import hold
hold(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """Four folders of a megabyte each, "0" not used for longest."""
    for i in range(4):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "part.npy").write_bytes(b"x" * (1 << 20))
        os.utime(tmp_path / str(i), (1000 + i, 1000 + i))
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_not_used_for_longest_goes_first(kept: Path) -> None:
    sweep(kept, 5 << 20)
    assert names(kept) == ["0", "1", "2", "3"]
    sweep(kept, 5 << 19)
    assert names(kept) == ["2", "3"]


def test_what_a_process_uses_stays(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "_held", {})
    hold(kept / "1")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, kept / "0"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        sweep(kept, 0)
        assert names(kept) == ["0", "1"]
        other.communicate()
    sweep(kept, 0)
    assert names(kept) == ["1"]
    hold(kept / "4")
    assert names(kept) == ["1", "4"]


def test_what_was_put_in_its_place_is_held(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "_held", {})
    hold(kept / "1")
    (kept / "1").rename(kept / "4")
    (kept / "1").mkdir()
    hold(kept / "1")
    sweep(kept, -1)
    assert names(kept) == ["1"]


def test_what_only_may_be_read_is_held(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "not the owner")

    monkeypatch.setattr(sweeping, "_held", {})
    monkeypatch.setattr(os, "utime", refuse)
    hold(kept / "1")
    sweep(kept, 0)
    assert names(kept) == ["1"]
