"""The memo of what files hold is never wrong and never in the way."""

import logging
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from kcache.disk.memo import DigestMemo
from kcache.places.bucket import BucketPath
from kcache.places.effects import write_bytes
from kcache.store.digests import content_key

LONG_AGO = 1_000_000_000


class Reader:
    """Digests files, and counts how often it had to."""

    def __init__(self) -> None:
        self.count = 0

    def of(self, path: Path) -> Callable[[], bytes]:
        def compute() -> bytes:
            self.count += 1
            return content_key(path.read_bytes())

        return compute


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files written by the test count as settled."""
    monkeypatch.setattr("kcache.disk.memo._RACY_NS", -10_000_000_000)


@pytest.mark.usefixtures("later")
def test_unchanged_file_is_read_once_across_runs(tmp_path: Path) -> None:
    file, reader = tmp_path / "a.png", Reader()
    file.write_bytes(b"a")
    for _ in range(3):
        with DigestMemo(tmp_path / "memo" / "digests.sqlite") as memo:
            assert memo.digest(file, "key", reader.of(file)) == content_key(b"a")
    assert reader.count == 1


@pytest.mark.usefixtures("later")
def test_same_size_edit_with_restored_mtime_is_seen(tmp_path: Path) -> None:
    file, reader = tmp_path / "a.png", Reader()
    file.write_bytes(b"a")
    os.utime(file, ns=(LONG_AGO, LONG_AGO))
    with DigestMemo(tmp_path / "m") as memo:
        memo.digest(file, "key", reader.of(file))
        file.write_bytes(b"b")
        os.utime(file, ns=(LONG_AGO, LONG_AGO))
        assert memo.digest(file, "key", reader.of(file)) == content_key(b"b")


@pytest.mark.usefixtures("later")
def test_file_put_in_place_of_another_is_seen(tmp_path: Path) -> None:
    file, other, reader = tmp_path / "a.png", tmp_path / "b.png", Reader()
    file.write_bytes(b"a")
    other.write_bytes(b"b")
    with DigestMemo(tmp_path / "m") as memo:
        memo.digest(file, "key", reader.of(file))
        other.rename(file)
        assert memo.digest(file, "key", reader.of(file)) == content_key(b"b")


@pytest.mark.usefixtures("later")
def test_parts_of_one_file_are_separate(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    file.write_bytes(b"rows")
    with DigestMemo(tmp_path / "m") as memo:
        assert memo.digest(file, "chunk 0", lambda: b"zero") == b"zero"
        assert memo.digest(file, "chunk 1", lambda: b"one") == b"one"
        assert memo.digest(file, "chunk 0", lambda: b"computed again") == b"zero"


@pytest.mark.usefixtures("later")
def test_rehash_replaces_what_was_remembered(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"a")
    with DigestMemo(tmp_path / "m") as memo:
        memo.digest(file, "key", lambda: b"stale")
        assert memo.digest(file, "key", lambda: b"fresh", rehash=True) == b"fresh"
    with DigestMemo(tmp_path / "m") as memo:
        assert memo.digest(file, "key", lambda: b"computed again") == b"fresh"


def test_file_changed_just_now_is_not_remembered(tmp_path: Path) -> None:
    file, reader = tmp_path / "a.png", Reader()
    file.write_bytes(b"a")
    with DigestMemo(tmp_path / "m") as memo:
        memo.digest(file, "key", reader.of(file))
        memo.digest(file, "key", reader.of(file))
    assert reader.count == 2


@pytest.mark.usefixtures("later")
def test_names_need_not_be_utf8(tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"caf\xe9.png")
    file.write_bytes(b"a")
    with DigestMemo(tmp_path / "m") as memo:
        memo.digest(file, "key", lambda: b"first")
    with DigestMemo(tmp_path / "m") as memo:
        assert memo.digest(file, "key", lambda: b"computed again") == b"first"


@pytest.mark.parametrize("damage", ["not sqlite", "other table", "a folder", "below a file", "locked"])
@pytest.mark.usefixtures("later")
def test_unusable_memo_costs_one_warning_and_no_answer(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, holder = tmp_path / "digests.sqlite", None
    if damage == "not sqlite":
        path.write_bytes(b"garbage " * 1000)
    elif damage == "other table":
        with sqlite3.connect(path) as holder:
            holder.execute("CREATE TABLE digests (other TEXT)")
    elif damage == "a folder":
        path.mkdir()
    elif damage == "below a file":
        path.write_bytes(b"")
        path = path / "digests.sqlite"
    else:
        monkeypatch.setattr("kcache.disk.memo._LOCK_SECONDS", 0)
        DigestMemo(path).close()
        holder = sqlite3.connect(path)
        holder.execute("BEGIN EXCLUSIVE")
    with caplog.at_level(logging.WARNING), DigestMemo(path) as memo:
        for name in ("a.png", "b.png"):
            (tmp_path / name).write_bytes(name.encode())
            reader = Reader()
            assert memo.digest(tmp_path / name, "key", reader.of(tmp_path / name)) == content_key(name.encode())
            memo.flush()
    assert len(caplog.records) == 1
    assert str(path) in caplog.text
    if holder is not None:
        holder.close()


def test_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with DigestMemo(tmp_path / "m") as memo, pytest.raises(FileNotFoundError):
        memo.digest(tmp_path / "none.png", "key", lambda: b"")


def test_default_place_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KCACHE_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    with DigestMemo() as memo:
        assert memo.path == tmp_path / "xdg" / "kcache" / "digests.sqlite"
    monkeypatch.setenv("KCACHE_HOME", str(tmp_path / "home"))
    with DigestMemo() as memo:
        assert memo.path == tmp_path / "home" / "digests.sqlite"


def test_what_another_process_learns_of_a_later_content_is_not_taken_for_this_one(tmp_path: Path) -> None:
    path, long = BucketPath.of(f"memory://memo/{tmp_path.name}/a.tar"), bytes(1000)
    write_bytes(path, b"a")
    with DigestMemo(tmp_path / "m") as memo, DigestMemo(tmp_path / "m") as other:
        assert memo.digest(path, "all", lambda: long) == long
        memo.flush()
        write_bytes(path, b"changed")
        other.digest(path, "all", lambda: b"of what it is now" * 100)
        other.flush()
        assert memo.digest(path, "all", lambda: long) == long


@pytest.mark.usefixtures("later")
def test_what_is_long_is_read_from_the_file_when_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"a")
    for _ in range(2):
        with DigestMemo(tmp_path / "m") as memo:
            for _ in range(2):
                assert memo.digest(tmp_path / "a.tar", "all", lambda: bytes(10**6)) == bytes(10**6)
            assert sum(len(digest or b"") for _, digest in memo._folders[str(tmp_path)].values()) == 0
