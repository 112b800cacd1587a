"""Tars and parquet files in a bucket: they offer what they do on a disk, and each is read once for that."""

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from in_bucket import put

from kcache.disk.memo import DigestMemo
from kcache.errors import InputRejected, SourceError, StoreError
from kcache.places.bucket import BucketPath
from kcache.places.effects import write_bytes
from kcache.places.fetching import Windows
from kcache.sources import Source, open_source


def tar_of(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Tars of ten samples each, the last one with one that is refused."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for tar in range(3):
        members: dict[str, bytes] = {}
        for i in range(10):
            members |= {f"{i:03}.jpg": bytes([tar, i]) * 700, f"{i:03}.json": b'{"text": "a %d"}' % i}
        tar_of(folder / f"{tar:05}.tar", members if tar < 2 else {"no.jpg": b"1", **members})
    return folder


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """Parquet files of two row groups, in two splits; of the last file one row only names its picture."""
    folder = tmp_path / "tables"
    (folder / "data").mkdir(parents=True)
    for number, split in enumerate(("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001")):
        images = [{"bytes": bytes([number, i]) * 500, "path": None} for i in range(6)]
        if number == 1:
            images[5] = {"bytes": None, "path": "x.jpg"}
        table = pa.table({"image": images, "text": [f"{number} {i}" for i in range(6)], "more": list(range(6))})
        pq.write_table(table, folder / "data" / f"{split}.parquet", row_group_size=4)
    return folder


def said(source: Source) -> dict[str, object]:
    with DigestMemo() as memo:
        keys = [source.image_key(i, memo, rehash) for rehash in (False, True) for i in range(len(source))]
    return {
        "names": [source.name(i) for i in range(len(source))],
        "captions": [source.captions(i) for i in range(len(source))],
        "images": [source.image(i) for i in range(len(source))],
        "keys": keys,
        "refused": source.refused,
        "description": source.description,
    }


@pytest.mark.parametrize("ending", ["", "/", "/{00000..00002}.tar", "/00001.tar"])
def test_tars_offer_what_they_do_on_a_disk(ending: str, shards: Path, bucket: str) -> None:
    url = f"{put(shards, f'{bucket}/shards')}{ending}"
    assert said(open_source(url)) == said(open_source(f"{shards}{ending}"))


def test_tables_offer_what_they_do_on_a_disk(tables: Path, bucket: str) -> None:
    whole = pq.read_table(tables / "data/train-00001-of-00002.parquet").slice(0, 5)
    pq.write_table(whole, tables / "data/train-00001-of-00002.parquet", row_group_size=4)
    url = str(put(tables, f"{bucket}/tables"))
    assert said(open_source(url)) | {"refused": 0} == said(open_source(str(tables))) | {"refused": 0}
    one = "/data/train-00001-of-00002.parquet"
    assert said(open_source(url + one)) == said(open_source(f"{tables}{one}"))
    names = said(open_source(f"{url}/data/test-*.parquet"))["names"]
    assert names == [f"test-00000-of-00001.parquet row {i}" for i in range(6)]


def test_a_row_that_only_names_its_picture_is_refused(tables: Path, tmp_path: Path) -> None:
    source = open_source(str(put(tables, f"memory://sources/{tmp_path.name}")))
    with DigestMemo() as memo, pytest.raises(InputRejected, match="only names the picture"):
        source.image_key(11, memo, False)


def test_what_is_known_is_not_fetched_again_and_what_changed_is(
    shards: Path, tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KCACHE_HOME", str(tmp_path / "home"))
    there, fetched = put(tmp_path, f"memory://memo/{tmp_path.name}"), list[BucketPath]()
    read = BucketPath.read_range
    monkeypatch.setattr(BucketPath, "read_range", lambda path, *span: fetched.append(path) or read(path, *span))

    def keys(folder: str, count: int) -> list[bytes]:
        source = open_source(str(there / folder))
        with DigestMemo() as memo:
            return [source.image_key(i, memo, False) for i in range(count)]

    first = keys("shards", 30), keys("tables", 11)
    assert {path.suffix for path in fetched} == {".tar", ".parquet"}
    assert len([path for path in fetched if path.suffix == ".tar"]) == 3
    fetched.clear()
    open_source(str(there / "tables"))
    to_open = len(fetched)
    fetched.clear()
    assert (keys("shards", 30), keys("tables", 11)) == first
    assert len(fetched) == to_open
    fetched.clear()
    tar_of(tmp_path / "new.tar", {"000.jpg": b"new", "000.json": b'{"text": "a"}'})
    write_bytes(there / "shards" / "00000.tar", (tmp_path / "new.tar").read_bytes())
    assert keys("shards", 1) != first[0][:1]
    assert {path.name for path in fetched} == {"00000.tar"}


def test_pictures_of_a_tar_share_requests_and_come_as_they_were(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KCACHE_HOME", str(tmp_path / "home"))
    source, fetched = open_source(str(put(shards, f"memory://shared/{tmp_path.name}"))), list[int]()
    read = BucketPath.read_range

    def read_range(path: BucketPath, start: int, length: int) -> memoryview:
        fetched.append(start)
        content = bytearray(read(path, start, length))
        if len(fetched) <= 2:  # one bit changes on its way
            content[-1 if length < 10_000 else 600] ^= 1
        return memoryview(content)

    monkeypatch.setattr(BucketPath, "read_range", read_range)
    assert [source.image(i) for i in range(30)] == [bytes([i // 10, i % 10]) * 700 for i in range(30)]
    assert len(fetched) < 10
    (path,) = (path for label, path in source.tars if label == "00001.tar")  # type: ignore[attr-defined]
    write_bytes(path, bytes(path.size()))
    monkeypatch.setattr("kcache.places.fetching._WINDOWS", 0)
    with pytest.raises(InputRejected, match="something else there than when it was looked through"):
        replace(source, windows=Windows()).image(10)  # type: ignore[type-var]


def test_a_store_that_fails_costs_no_sample(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KCACHE_HOME", str(tmp_path / "home"))
    url = str(put(shards, f"memory://failing/{tmp_path.name}"))
    source = open_source(url)

    def fail(path: BucketPath, *_: int) -> memoryview:
        raise StoreError(f"{path}: no connection")

    monkeypatch.setattr(BucketPath, "read_range", fail)
    with pytest.raises(StoreError, match="no connection"):
        source.image(0)
    monkeypatch.setenv("KCACHE_HOME", str(tmp_path / "other"))
    with pytest.raises(StoreError, match="no connection"):
        open_source(url)


@pytest.mark.parametrize(
    ("names", "ending", "said"),
    [
        (["a.jpg", "a.txt"], "", r"holds 1 loose image, which are not read one by one .*; put|copy"),
        (["a.txt"], "", "holds no tars and no parquet files among its 1 files"),
        (["manifest.json", "index-0/x.npy"], "", "is a cache: its pictures are encoded already"),
        (["0.tar"], "/{0..1}.tar", "1 of the 2 tars .* are missing, such as 1.tar"),
        (["0.tar"], "/0.tar", "not a plain tar|damaged from the start"),
        (["0.parquet"], "/*.parquet", "0.parquet is no file of rows: it is text"),
        (["0.parquet", "0.tar"], "/0.*", "stands for 2 files; expected tars, or parquet files, and no others"),
        ([], "", "holds no tars"),
    ],
)
def test_what_cannot_be_read_is_told(names: list[str], ending: str, said: str, tmp_path: Path) -> None:
    place = BucketPath.of(f"memory://told/{tmp_path.name}")
    for name in names:
        write_bytes(place / name, b"text")
    with pytest.raises(SourceError, match=said):
        open_source(f"{place}{ending}")
