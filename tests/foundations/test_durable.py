"""Writing: whole under the final name or not there, also when the writer fails in the middle."""

import errno
import multiprocessing
import os
import stat
import time
from pathlib import Path

import numpy as np
import pytest

import kcache.disk.durable
from kcache.disk.durable import (
    create_bytes,
    exclusive,
    remove,
    remove_temporary,
    shared,
    temporary_path,
    write_bytes,
    write_json,
    write_npy,
)
from kcache.errors import CacheBusyError, CacheWriteError


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_bytes(tmp_path / "file", b"first")
    write_bytes(tmp_path / "file", b"second")
    assert (tmp_path / "file").read_bytes() == b"second"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    write_npy(tmp_path / "array.npy", np.arange(3))
    with pytest.raises(ValueError, match="allow_pickle"):
        write_npy(tmp_path / "array.npy", np.array([object()]))
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "array.npy", float("nan"))
    assert (np.load(tmp_path / "array.npy") == np.arange(3)).all()
    assert [entry.name for entry in tmp_path.iterdir()] == ["array.npy"]


def test_the_file_is_synced_before_it_gets_its_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, rename = os.fsync, Path.rename
    kinds = {False: "sync file", True: "sync folder"}

    def spy_fsync(descriptor: int) -> None:
        calls.append(kinds[os.path.isdir(f"/proc/self/fd/{descriptor}")])  # noqa: PTH112  # a descriptor, no path
        fsync(descriptor)

    def spy_rename(self: Path, target: Path) -> Path:
        calls.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "rename", spy_rename)
    write_bytes(tmp_path / "file", b"content")
    assert calls == ["sync file", "rename", "sync folder"]


def _leave(folder: Path) -> None:
    temporary_path(folder).mkdir()
    temporary_path(folder).write_text("half")


def test_leftovers_of_the_dead_go_and_everything_else_stays(tmp_path: Path) -> None:
    writer = multiprocessing.get_context("spawn").Process(target=_leave, args=(tmp_path,))
    writer.start()
    writer.join()
    assert len(list(tmp_path.iterdir())) == 2
    mine = temporary_path(tmp_path)
    mine.write_text("being written")
    (tmp_path / ".tmp-of-somebody-else").write_text("")
    (tmp_path / "kept").write_text("whole")
    remove_temporary(tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} == {"kept", mine.name, ".tmp-of-somebody-else"}


@pytest.mark.parametrize("links", [True, False])
def test_a_file_is_created_once(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    assert create_bytes(tmp_path / "file", b"first")
    assert not create_bytes(tmp_path / "file", b"second")
    assert (tmp_path / "file").read_bytes() == b"first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_is_created_whole_or_not_at_all(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is given to it when all of it is on disk, and is on disk then itself."""
    sync, synced = kcache.disk.durable.sync, list[tuple[bool, bool]]()

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    def noted(descriptor: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), (tmp_path / "file").exists()))
        sync(descriptor)

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr("kcache.disk.durable.sync", noted)
    assert create_bytes(tmp_path / "file", b"content")
    assert synced == [(False, False), (True, True)]


def test_a_folder_that_takes_no_file_is_said_to_be_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("kcache.disk.durable.new_file", refuse)
    with pytest.raises(CacheWriteError, match="Permission denied"):
        create_bytes(tmp_path / "claim", b"x")


def test_several_may_share_what_one_may_not_hold_alone(tmp_path: Path) -> None:
    with shared(tmp_path), shared(tmp_path), pytest.raises(CacheBusyError, match="its only user"), exclusive(tmp_path):
        pass
    with exclusive(tmp_path), pytest.raises(CacheBusyError, match="no one to hold it alone"), shared(tmp_path):
        pass


def test_a_refused_write_names_the_path_and_what_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(CacheWriteError, match=r"folder could not be written \(Is a directory\); a folder is where"):
        write_bytes(tmp_path / "folder", b"content")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_removing_a_link_leaves_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    remove(tmp_path / "link")
    remove(tmp_path / "nothing")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def _hold(folder: Path, held: "multiprocessing.synchronize.Event") -> None:
    with exclusive(folder):
        held.set()
        time.sleep(60)


def test_a_dead_holder_holds_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path, held))
    holder.start()
    assert held.wait(60)
    with pytest.raises(CacheBusyError, match="in use by another process"), exclusive(tmp_path):
        pass
    holder.kill()
    holder.join()
    with exclusive(tmp_path):
        pass
