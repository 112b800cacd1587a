"""What was fetched of a bucket's records is not fetched again while it stays what it was, and never after."""

import secrets
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kcache.disk import fetched
from kcache.disk.fetched import read_listed
from kcache.places import Place, place_of
from kcache.places.effects import write_bytes

NAMES = [f"{i:05d}.json" for i in range(5)]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KCACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each name was fetched."""
    counts, read_all = Counter[str](), fetched.read_all

    def counted(paths: list[Place]) -> Any:
        counts.update(path.name for path in paths)
        return read_all(paths)

    monkeypatch.setattr(fetched, "read_all", counted)
    return counts


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(fetched, "_TOGETHER", 2)
    folder = place_of(f"memory://records/{secrets.token_hex(6)}")
    for name in NAMES:
        write_bytes(folder / name, name.encode())
    return folder


def test_what_is_as_it_was_is_fetched_once(folder: Place, asked: Counter[str]) -> None:
    expected = [name.encode() for name in NAMES]
    assert list(read_listed(folder, NAMES)) == list(read_listed(folder, NAMES)) == expected
    assert asked == Counter(NAMES)
    write_bytes(folder / "00005.json", b"new")
    assert list(read_listed(folder, [*NAMES, "00005.json"])) == [*expected, b"new"]
    assert asked == Counter([*NAMES, "00005.json"])


def test_what_was_written_anew_is_fetched_anew(folder: Place, asked: Counter[str]) -> None:
    list(read_listed(folder, NAMES))
    write_bytes(folder / NAMES[1], b"x" * len(NAMES[1]))
    assert list(read_listed(folder, NAMES))[1] == b"x" * len(NAMES[1])
    assert asked[NAMES[1]] == 2
    place_of(str(folder / NAMES[2])).store.delete((folder / NAMES[2]).key)  # type: ignore[union-attr]
    with pytest.raises(FileNotFoundError):
        list(read_listed(folder, NAMES))


def test_what_was_damaged_here_is_fetched_again(folder: Place, asked: Counter[str], home: Path) -> None:
    list(read_listed(folder, NAMES))
    with sqlite3.connect(home / "records.sqlite") as connection:
        connection.execute("UPDATE records SET content = 'damaged'")
    connection.close()
    assert list(read_listed(folder, NAMES)) == [name.encode() for name in NAMES]
    assert asked[NAMES[0]] == 2


def test_what_is_used_stays_longest(folder: Place, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    now = 1_000_000
    monkeypatch.setattr(fetched.time, "time", lambda: now)
    list(read_listed(folder, NAMES))
    now += 200_000
    list(read_listed(folder, NAMES[3:]))
    monkeypatch.setattr(fetched, "_MOST_BYTES", 4 * len(NAMES[0]) + 1)
    list(read_listed(folder, NAMES[4:]))
    with sqlite3.connect(home / "records.sqlite") as connection:
        left = connection.execute("SELECT path FROM records ORDER BY path").fetchall()
    connection.close()
    assert [path.rpartition("/")[2] for (path,) in left] == NAMES[3:]


def test_what_cannot_be_kept_is_fetched_each_time(
    folder: Place, asked: Counter[str], home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home.write_bytes(b"no folder")
    for _ in range(2):
        assert list(read_listed(folder, NAMES)) == [name.encode() for name in NAMES]
    assert asked == Counter(2 * NAMES)
    assert caplog.text.count("cannot be kept in") == 1


def test_nothing_is_kept_where_little_room_is_left(
    folder: Place, asked: Counter[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fetched, "free_bytes", lambda _: 1000)
    for _ in range(2):
        assert list(read_listed(folder, NAMES)) == [name.encode() for name in NAMES]
    assert asked == Counter(2 * NAMES)
    assert "1,000 bytes are free there" in caplog.text


def test_an_account_without_a_home_keeps_nothing(
    folder: Place, asked: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(_: type[Path]) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("KCACHE_HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", classmethod(none))
    for _ in range(2):
        assert list(read_listed(folder, NAMES)) == [name.encode() for name in NAMES]
    assert asked == Counter(2 * NAMES)


def test_files_of_a_disk_are_read(tmp_path: Path, asked: Counter[str], home: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"here")
    assert list(read_listed(tmp_path, ["a.json"])) == [b"here"]
    assert not home.exists()
