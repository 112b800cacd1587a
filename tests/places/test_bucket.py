"""Paths in a bucket, read by pathlib's names; creating and swapping, alone and at once."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kcache.errors import ConfigError
from kcache.places import place_of
from kcache.places.bucket import BucketPath
from kcache.places.effects import create_bytes, publish, read_all, remove, swap_bytes, temporary_folder, write_bytes


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
