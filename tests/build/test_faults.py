"""Disks that are full, read-only or forbidden, and threads that fail: one message, nothing half-written."""

import errno
import io
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from small_builds import build, copy_pictures, digests, small_config

import kcache.build.encode
from kcache.encoders.frozen import PictureEncoder
from kcache.errors import CacheWriteError
from kcache_cli import app

pytestmark = pytest.mark.usefixtures("form")

CALLS = ("mkdir", "rename", "link", "unlink")


@pytest.fixture(scope="module")
def source(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_pictures(oracle, tmp_path_factory.mktemp("faults") / "pictures")


@pytest.fixture(scope="module")
def undisturbed(form: str, source: Path, oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of the files of a cache that nothing happened to."""
    cache = tmp_path_factory.mktemp(form) / "cache"
    build(source, cache, oracle, rows_per_shard=4)
    return digests(cache)


def refused_build(
    source: Path, cache: Path, oracle: Path, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str | None:
    """Run `kcache cache-build`; returns what it says when it is refused, None when it is done."""
    config = small_config(oracle, rows_per_shard=4)
    flags = {name: value for name, value in vars(config).items() if value not in (None, False, ())} | {"resolution": 64}
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    patch.setattr(sys, "argv", ["kcache", "cache-build", str(source), str(cache), *arguments])
    with pytest.raises(SystemExit) as end:
        app.main()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kcache: ")]
    if end.value.code in (None, 0):
        return None
    assert end.value.code == 1
    [message] = said
    return message


def assert_whole(cache: Path, undisturbed: dict[str, str]) -> None:
    """Whatever stands under a final name is as it would be without the fault; nothing else is left behind."""
    found = digests(cache) if cache.is_dir() else {}
    assert not [name for name in found if ".tmp-" in name or name == ".turn" or "/claims/" in name]
    assert {name: found[name] for name in found.keys() & undisturbed.keys()}.items() <= undisturbed.items()


@contextmanager
def limited(folder: Path, size: int) -> Iterator[None]:
    """No more than `size` bytes in `folder`: a small file system where that may be mounted, else a limit per file."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if is_mounted(folder):
        command = ["mount", "-o", f"remount,size={size}", str(folder)]
    if subprocess.run(command, check=False, capture_output=True).returncode == 0:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 16, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def is_mounted(folder: Path) -> bool:
    return folder.is_mount()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder that a test may mount something on."""
    folder = tmp_path / "disk"
    folder.mkdir()
    yield folder
    if is_mounted(folder):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_named_and_the_build_goes_on_when_there_is_room(
    source: Path,
    oracle: Path,
    disk: Path,
    undisturbed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache, size, messages = disk / "cache", 16_384, []
    while True:
        with limited(disk, size):
            message = refused_build(source, cache, oracle, monkeypatch, capsys)
        assert_whole(cache, undisturbed)
        if message is None:
            break
        messages.append(message)
        size += 65_536
    assert len(messages) >= 3
    for message in messages:
        assert str(cache) in message
        assert "No space left on device" in message or "File too large" in message
        assert " bytes are free in " in message
        assert "start again" in message
    assert digests(cache) == undisturbed


def refuse_writes(patch: pytest.MonkeyPatch, folder: Path, number: int, after: int = 0) -> None:
    """From the call `after` on, let every call that changes something in `folder` fail with the error `number`."""
    calls = iter(range(1 << 30))

    def refusing(call: Callable[..., Any], writes: Callable[..., bool]) -> Callable[..., Any]:
        def refused(path: Any, *arguments: Any, **named: Any) -> Any:
            inside = isinstance(path, str | Path) and Path(path).is_relative_to(folder)
            if inside and writes(*arguments) and next(calls) >= after:
                raise OSError(number, os.strerror(number), str(path))
            return call(path, *arguments, **named)

        return refused

    for name in CALLS:
        patch.setattr(os, name, refusing(getattr(os, name), lambda *_: True))
    patch.setattr(io, "open", refusing(io.open, lambda mode="r", *_: "r" not in mode))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_a_refused_write_is_named_and_the_build_goes_on_when_it_is_permitted(
    source: Path,
    oracle: Path,
    tmp_path: Path,
    undisturbed: dict[str, str],
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache = tmp_path / "cache"
    for after in (0, 40):
        with monkeypatch.context() as patch:
            refuse_writes(patch, cache, number, after)
            message = refused_build(source, cache, oracle, patch, capsys)
        assert message is not None
        assert str(cache) in message
        assert f"could not be written ({os.strerror(number)})" in message
        assert (" bytes are free in " in message) == (number in (errno.ENOSPC, errno.EDQUOT))
    assert refused_build(source, cache, oracle, monkeypatch, capsys) is None
    assert digests(cache) == undisturbed


def test_a_read_only_folder_is_named(
    source: Path, oracle: Path, disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(disk)], check=False, capture_output=True)
    with monkeypatch.context() as patch:
        if mount.returncode and os.geteuid():
            disk.chmod(0o555)
        elif mount.returncode:
            refuse_writes(patch, disk, errno.EROFS)
        message = refused_build(source, disk / "cache", oracle, patch, capsys)
    assert message is not None
    assert message.startswith(f"kcache: {disk / 'cache'} could not be written (")
    assert "give another place" in message
    assert list(disk.iterdir()) == []


def _threads() -> list[str]:
    """Ours, but for the one that tells who waits for a store, which stays."""
    return [t.name for t in threading.enumerate() if t.name.startswith("kcache-") and t.name != "kcache-watch"]


def test_a_failing_writer_ends_the_build_at_the_next_batch(
    source: Path, oracle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = PictureEncoder.encode

    def count(self: PictureEncoder, prepared: Any) -> Any:
        encoded.append(len(prepared))
        return encode(self, prepared)

    def fail(*_: Any, **__: Any) -> None:
        raise CacheWriteError("the disk is gone")

    monkeypatch.setattr(PictureEncoder, "encode", count)
    monkeypatch.setattr(kcache.build.encode, "commit_shard", fail)
    with pytest.raises(CacheWriteError, match="the disk is gone"):
        build(source, tmp_path / "cache", oracle, stage="prior", batch_size=1, rows_per_shard=3)
    assert len(encoded) < 7  # the shard that failed and a part of the one after it, of 7 rows
    assert _threads() == []


def test_a_source_that_fails_ends_the_build(
    source: Path, oracle: Path, tmp_path: Path, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: PictureEncoder, content: bytes) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "picture.png")

    with monkeypatch.context() as patch:
        patch.setattr(PictureEncoder, "picture", fail)
        with pytest.raises(OSError, match=r"Input/output error: 'picture.png'"):
            build(source, tmp_path / "cache", oracle, rows_per_shard=4)
    assert _threads() == []
    assert_whole(tmp_path / "cache", undisturbed)
    build(source, tmp_path / "cache", oracle, rows_per_shard=4)
    assert digests(tmp_path / "cache") == undisturbed
