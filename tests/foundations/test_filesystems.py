"""What a file system cannot is gone without, what fails is told with the advice of that failure."""

import errno
import fcntl
import logging
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError
from small_builds import build, copy_pictures

from kcache import Cache
from kcache.disk.durable import exclusive, read_npy, shared, sync_folder, write_bytes, writing
from kcache.disk.filesystems import free_bytes, mapped
from kcache.errors import CacheWriteError

LACKING = [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.ENOLCK, errno.ENODEV]


def answering(number: int) -> Callable[..., Any]:
    def answer(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return answer


@pytest.mark.parametrize("number", LACKING, ids=errno.errorcode.get)
def test_what_a_file_system_cannot_is_gone_without(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    np.save(tmp_path / "array.npy", np.arange(5))
    content = (tmp_path / "array.npy").read_bytes()
    for module, name in ((os, "fsync"), (fcntl, "flock")):
        monkeypatch.setattr(module, name, answering(number))
    real = mmap.mmap
    monkeypatch.setattr(mmap, "mmap", lambda file, *a, **k: real(file, *a, **k) if file == -1 else answering(number)())
    write_bytes(tmp_path / "file", b"content")
    sync_folder(tmp_path)
    for hold in (exclusive, shared, exclusive):
        with hold(tmp_path):
            assert (tmp_path / "file").read_bytes() == b"content"
    assert bytes(mapped(tmp_path / "array.npy")) == content
    assert read_npy(tmp_path / "array.npy", mapped=True).tolist() == [0, 1, 2, 3, 4]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path} cannot be locked there ({os.strerror(number)}), and nothing keeps two commands from changing it "
        "at once: make sure that only one is at work in it"
    ]


def test_a_build_needs_none_of_it(
    oracle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = copy_pictures(oracle, tmp_path / "pictures", 2)
    caplog.set_level(logging.ERROR)
    for module, name in ((os, "fsync"), (os, "link"), (fcntl, "flock")):
        monkeypatch.setattr(module, name, answering(errno.ENOSYS))
    build(source, tmp_path / "cache", oracle)
    assert len(Cache.open(tmp_path / "cache")) == 2


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC], ids=errno.errorcode.get)
def test_a_disk_that_fails_is_not_taken_for_one_that_cannot(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", answering(number))
    with pytest.raises(CacheWriteError):
        write_bytes(tmp_path / "file", b"content")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "x"), r"\(No space left on device\): it takes 7 bytes, [\d,]+ bytes are .*; make room"),
        (OSError(errno.EDQUOT, "x"), r"\(Disk quota exceeded\): it takes 7 bytes, .*; the quota there is used up"),
        (OSError(errno.EFBIG, "x"), r"\(File too large\): it takes .*`ulimit -f`"),
        (SafetensorError("I/O error: File too large (os error 27)"), r"\(File too large\): it takes .*`ulimit -f`"),
        (OSError(errno.EROFS, "x"), r"\(Read-only file system\); nothing can be written there: give another place"),
        (OSError(errno.EACCES, "x"), r"\(Permission denied\); permit writing there, or give another place"),
        (OSError(errno.EINVAL, "x"), r"\(Invalid argument\); the file system there does not take such a name"),
        (OSError(errno.ENAMETOOLONG, "x"), r"\(File name too long\); the path is too long for that file system"),
        (OSError(errno.EIO, "x"), r"\(Input/output error\); the disk or the network file system fails"),
        (OSError(errno.EMFILE, "x"), r"\(Too many open files\); too many files are open: raise `ulimit -n`"),
        (OSError("no number"), r"\(no number\): it takes 7 bytes, .*; make room or permit writing there"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_the_advice_is_that_of_the_failure(error: Exception, said: str, tmp_path: Path) -> None:
    with (
        pytest.raises(CacheWriteError, match=rf"^{tmp_path}/file could not be written {said}.*start again"),
        writing(tmp_path / "file", 7),
    ):
        raise error


def test_errors_that_are_not_the_systems_are_left_alone(tmp_path: Path) -> None:
    for error in (ValueError("a mistake"), SafetensorError("a mistake"), MemoryError()):
        with pytest.raises(type(error)), writing(tmp_path / "file"):
            raise error


def test_room_that_is_not_told_is_not_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_bytes(tmp_path / "new" / "folder") == free_bytes(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", answering(errno.ESTALE))
    assert free_bytes(tmp_path) is None
    with (
        pytest.raises(CacheWriteError, match=r"\(No space left on device\); make room there, and"),
        writing(tmp_path / "file", 7),
    ):
        raise OSError(errno.ENOSPC, "x")
