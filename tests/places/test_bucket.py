"""Paths in a bucket, read by pathlib's names; creating and swapping, alone and at once."""

import html
import os
import re
import secrets
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kcache.disk.durable import temporary_path
from kcache.errors import CacheBusyError, ConfigError, StoreError
from kcache.places import Place, effects, place_of
from kcache.places.bucket import BucketPath
from kcache.places.effects import (
    create_bytes,
    make_folder,
    publish,
    read_all,
    remove,
    swap_bytes,
    temporary_folder,
    write_bytes,
)


@pytest.fixture(params=["memory", "s3", "disk"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> "Path | BucketPath":
    if request.param == "disk":
        return tmp_path
    return place_of(
        f"memory://test/{tmp_path.name}" if request.param == "memory" else request.getfixturevalue("bucket")
    )


def test_a_url_is_a_place_in_a_bucket_and_a_path_one_of_this_machine() -> None:
    path = place_of("s3://pictures/some//key.tar/")
    assert isinstance(path, BucketPath)
    assert (str(path), path.name, path.stem, path.suffix) == ("s3://pictures/some/key.tar", "key.tar", "key", ".tar")
    assert (str(path.parent), str(path / "a/b")) == ("s3://pictures/some", "s3://pictures/some/key.tar/a/b")
    assert place_of("caches/photos") == Path("caches/photos")
    with pytest.raises(ConfigError, match="web"):
        place_of("https://example.org/cache")


def test_what_was_written_is_read_and_listed(folder: "Path | BucketPath") -> None:
    for name in ("b", "a", "c.json"):
        write_bytes(folder / name, name.encode())
    assert list(read_all([folder / "c.json", folder / "a"])) == [b"c.json", b"a"]
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b", "c.json"]
    assert [path.name for path in folder.glob("*.json")] == ["c.json"]
    found = [(path.is_file(), path.is_dir(), path.exists()) for path in (folder / "a", folder, folder / "d")]
    assert found == [(True, False, True), (False, True, True), (False, False, False)]
    with pytest.raises(FileNotFoundError):
        (folder / "d").read_bytes()
    remove(folder / "a")
    remove(folder / "a")
    assert sorted(path.name for path in folder.iterdir()) == ["b", "c.json"]


def test_of_many_who_create_a_file_one_does(folder: "Path | BucketPath") -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: create_bytes(folder / "record", str(i).encode()), range(8)))
    assert made.count(True) == 1
    assert (folder / "record").read_bytes() == str(made.index(True)).encode()


def test_a_file_is_swapped_from_what_was_read_only(folder: "Path | BucketPath") -> None:
    swap_bytes(folder / "manifest", b"1", None)
    swap_bytes(folder / "manifest", b"2", b"1")
    assert (folder / "manifest").read_bytes() == b"2"


def test_a_folder_is_published_whole(folder: "Path | BucketPath") -> None:
    with temporary_folder(folder) as temporary:
        (temporary / "data" / "inner").mkdir(parents=True)
        (temporary / "data" / "zarr.json").write_bytes(b"{}")
        (temporary / "data" / "inner" / "c").write_bytes(b"1234")
        publish(temporary / "data", folder / "data")
    assert (folder / "data" / "inner" / "c").read_bytes() == b"1234"
    assert sorted(path.name for path in (folder / "data").iterdir()) == ["inner", "zarr.json"]


NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="/\0", exclude_categories=["C"]), min_size=1, max_size=8
)
PARTS = (NAMES | st.sampled_from(["a", "b", "a.json", "b.tar.gz", ".hidden", "a.", "..a"])).filter(
    lambda name: name not in (".", "..")
)


@settings(max_examples=40)
@given(st.lists(st.lists(PARTS, min_size=1, max_size=3), min_size=1, max_size=6))
def test_a_bucket_is_read_by_pathlibs_names(files: list[list[str]]) -> None:
    bucket = place_of(f"memory://names/{secrets.token_hex(8)}")
    with tempfile.TemporaryDirectory() as disk:
        seen = {(Path(disk), bucket)}
        for number, parts in enumerate(files):
            on_disk, in_bucket = Path(disk, *parts), bucket.joinpath(*parts)
            try:
                on_disk.parent.mkdir(parents=True, exist_ok=True)
                on_disk.write_bytes(b"x" * number)
            except OSError:
                continue  # a file is where a folder is to be, or the other way round, which a bucket does not mind
            write_bytes(in_bucket, b"x" * number)
            seen |= {(on_disk, in_bucket), (on_disk.parent, in_bucket.parent), (on_disk / "no", in_bucket / "no")}
        for on_disk, in_bucket in seen:
            for ask in ASKED:
                assert ask(in_bucket) == ask(on_disk), (ask, in_bucket)


ASKED: list[Callable[[Any], Any]] = [
    lambda path: path.is_file(),
    lambda path: path.is_dir(),
    lambda path: path.exists(),
    lambda path: path.is_symlink(),
    lambda path: path.read_bytes() if path.is_file() else None,
    lambda path: sorted(entry.name for entry in path.iterdir()) if path.is_dir() else None,
    lambda path: sorted(entry.name for entry in path.glob("*.json")) if path.is_dir() else None,
    lambda path: (path / "x.y").suffix,
    lambda path: (path / "x.y").parent.exists(),
]


@given(PARTS)
def test_names_come_apart_as_pathlibs_do(name: str) -> None:
    path, expected = place_of("s3://bucket/folder").joinpath(name), PurePosixPath("/folder", name)
    assert (path.name, path.stem, path.suffix) == (expected.name, expected.stem, expected.suffix)
    assert (path.parent.name, (path / "a" / "b").parent.parent) == (expected.parent.name, path)


@pytest.mark.parametrize("start", [0, 2, 6, 7])
@pytest.mark.parametrize("length", [0, 3, 9])
def test_a_range_ends_where_the_file_does(folder: "Path | BucketPath", start: int, length: int) -> None:
    write_bytes(folder / "file", b"0123456")
    if isinstance(folder, BucketPath):
        assert bytes((folder / "file").read_range(start, length)) == b"0123456"[start : start + length]
        with pytest.raises(FileNotFoundError):
            (folder / "nothing").read_range(start, 3)


def test_odd_names_are_the_stores_own(s3: str) -> None:
    """As any other tool sees them: nothing is encoded."""
    names = ["a b", "a+b", "a%20b", "a#b?c", "ü", "[x]*~", "a&b=c"]
    folder = place_of(f"{s3}/!first")  # of a page of a thousand names, however many other tests leave
    for name in names:
        write_bytes(folder / name, name.encode())
    assert isinstance(folder, BucketPath)
    listing = bytes(BucketPath("s3://caches", "").store.get("").bytes()).decode()  # the server's own page
    keys = [html.unescape(key) for key in re.findall(r"<Key>(.*?)</Key>", listing)]
    assert sorted(key.partition("/")[2] for key in keys if key.startswith(folder.key)) == sorted(names)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {name: name.encode() for name in names}


def test_a_folder_goes_whole_and_nothing_beside_it(folder: "Path | BucketPath") -> None:
    make_folder(folder / "a" / "b")
    make_folder(folder / "ab")
    for name in ("a/1", "a/b/2", "ab/3"):
        write_bytes(folder / name, b"x")
    remove(folder / "a")
    remove(folder / "a")
    assert not (folder / "a").exists()
    assert (folder / "ab" / "3").read_bytes() == b"x"


def test_a_swap_that_a_twin_made_is_made(folder: "Path | BucketPath") -> None:
    write_bytes(folder / "manifest", b"2")
    swap_bytes(folder / "manifest", b"2", b"1")
    with pytest.raises(CacheBusyError, match="changed by another process"):
        swap_bytes(folder / "manifest", b"3", b"1")
    with pytest.raises(CacheBusyError):
        swap_bytes(folder / "manifest", b"3", None)
    assert (folder / "manifest").read_bytes() == b"2"


def test_what_the_killed_left_of_a_folder_goes_with_the_next(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as here:
        monkeypatch.setattr(tempfile, "tempdir", here)
        left = temporary_path(Path(here))
        gone = left.with_name(left.name.replace(f"-{os.getpid()}-", "-4194305-"))  # no process has such a number
        left.mkdir()
        gone.mkdir()
        with temporary_folder(place_of(bucket)) as folder:
            assert folder.parent == Path(here)
            assert folder.stat().st_mode & 0o077 == 0
            assert sorted(Path(here).iterdir()) == sorted([left, folder])
        assert list(Path(here).iterdir()) == [left]


def test_an_empty_file_that_a_tool_made_for_a_folder_is_none_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Store:
        entries: ClassVar = [{"path": "folder", "size": 0}, {"path": "folder/a", "size": 1}]

        def list(self, prefix: str, offset: str | None = None) -> Any:
            return iter([self.entries])

        def list_with_delimiter(self, prefix: str) -> Any:
            return {"common_prefixes": ["folder"], "objects": self.entries}

    monkeypatch.setattr("kcache.places.bucket.store_of", lambda bucket: Store())
    folder = BucketPath("s3://b", "folder")
    assert list(folder.below()) == [(folder / "a", 1)]
    assert list(folder.iterdir()) == [folder / "a"]


@pytest.mark.parametrize("requests", range(1, 8))
def test_a_removal_that_breaks_off_leaves_no_record_without_its_data(
    requests: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = place_of(f"memory://test/{tmp_path.name}")
    for number in ("00000", "00001"):
        for name in (f"{number}-ab/c/0", f"{number}-ab.rows.npy", f"{number}.json"):
            write_bytes(folder / name, b"")
    ask, count = effects.ask, 0

    def break_off(place: Place, request: Callable[[], Any]) -> Any:
        nonlocal count
        count += 1
        if count > requests:
            raise StoreError("no connection")
        return ask(place, request)

    monkeypatch.setattr(effects, "ask", break_off)
    monkeypatch.setattr(effects, "_DELETIONS", 1)
    with suppress(StoreError):
        remove(folder)
    left = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    assert len(left) == 7 - requests
    for record in [name for name in left if name.endswith(".json")]:
        assert {record.replace(".json", "-ab"), record.replace(".json", "-ab.rows.npy")} <= left
