"""What is fetched together, at once, whole or not at all."""

import hashlib
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from in_bucket import put

from kcache.places.bucket import BucketPath
from kcache.places.fetching import _MOST_BYTES, _NEAR_BYTES, Windows, at_once, missing, near, opened_if, reading


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1 << 26), st.integers(1, 1 << 17)), max_size=60))
def test_near_spans_share_a_request_and_each_is_in_one(spans: "list[tuple[int, int, int]]") -> None:
    files, starts, lengths = (
        np.array(column, np.int64) for column in (zip(*spans, strict=True) if spans else [()] * 3)
    )
    requests = near(files, starts, starts + lengths)
    assert sorted(np.concatenate([np.empty(0, int), *requests]).tolist()) == list(range(len(spans)))
    for rows in requests:
        assert len(set(files[rows].tolist())) == 1
        assert (np.diff(starts[rows]) >= 0).all()
        assert (starts[rows][1:] - (starts + lengths)[rows][:-1] <= _NEAR_BYTES).all()
        assert starts[rows][-1] - starts[rows][0] < _MOST_BYTES


def test_rows_of_one_file_that_touch_are_one_request() -> None:
    starts = np.array([200, 0, 100, _NEAR_BYTES + 301, _NEAR_BYTES + 401])
    requests = near(np.zeros(5, np.int64), starts, starts + 100)
    assert [rows.tolist() for rows in requests] == [[1, 2, 0], [3, 4]]


def test_a_long_run_of_rows_is_several_requests() -> None:
    starts = np.arange(0, 3 * _MOST_BYTES, 100_000)
    requests = near(np.zeros(len(starts), np.int64), starts, starts + 100_000)
    assert [len(rows) for rows in requests] == [84, 84, 84]
    assert all(starts[rows][-1] - starts[rows][0] < _MOST_BYTES for rows in requests)


def test_many_are_at_work_and_the_first_error_is_told() -> None:
    together = threading.Barrier(4, timeout=60)
    at_once(lambda _: together.wait(), range(4))

    def fail(number: int) -> None:
        if number % 2:
            raise ValueError(str(number))

    with pytest.raises(ValueError, match="1"):
        at_once(fail, range(6))


@pytest.fixture(params=["memory", "disk"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> "Path | BucketPath":
    (tmp_path / "f").mkdir()
    for name in ("a", "b"):
        (tmp_path / "f" / name).write_bytes(name.encode() * 1000)
    return tmp_path / "f" if request.param == "disk" else put(tmp_path / "f", f"memory://fetching/{tmp_path.name}/f")


def test_missing_files_are_found_by_one_listing(folder: "Path | BucketPath", monkeypatch: pytest.MonkeyPatch) -> None:
    listed, listing = [], BucketPath.iterdir
    monkeypatch.setattr(BucketPath, "iterdir", lambda path: listed.append(path) or listing(path))
    assert missing(folder / name for name in "abcd") == [folder / "c", folder / "d"]
    assert len(listed) == isinstance(folder, BucketPath)


def test_who_comes_next_finds_his_part_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(bytes(range(256)) * 40)
    far, asked, read = put(tmp_path / "x", f"memory://windows/{tmp_path.name}"), list[int](), BucketPath.read_range
    monkeypatch.setattr(BucketPath, "read_range", lambda path, *span: asked.append(span[0]) or read(path, *span))
    monkeypatch.setattr("kcache.places.fetching._WINDOW_BYTES", 1000)
    windows, content = Windows(), (tmp_path / "x").read_bytes()
    spans = [(i, n) for i in (0, 3, 990, 1000, 2999, 10200, 10240, 20000) for n in (0, 1, 20, 999, 1000, 5000)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda span: windows.read(far, *span), spans)) == [content[i:][:n] for i, n in spans]
    parts = {at for i, n in spans if n <= 1000 for at in range(i // 1000, max(i, i + n - 1) // 1000 + 1)}
    assert len(asked) == len(parts) + sum(n > 1000 for _, n in spans)  # what is longer is asked for by itself

    def fail(path: BucketPath, *_: int) -> memoryview:
        raise FileNotFoundError

    monkeypatch.setattr(BucketPath, "read_range", fail)
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            windows.read(far, 5000, 10)
    monkeypatch.setattr(BucketPath, "read_range", read)
    assert windows.read(far, 5000, 10) == content[5000:5010]


def test_a_file_is_read_from_front_to_back(folder: "Path | BucketPath") -> None:
    buffer = memoryview(bytearray(600))
    with reading(folder / "a") as file:
        assert [file.readinto(buffer) for _ in range(3)] == [600, 400, 0]


def test_what_is_copied_to_be_checked_has_no_name_here(
    folder: "Path | BucketPath", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "here"))
    told: list[str] = []
    with opened_if(folder / "a", told.append) as file:
        assert not list((tmp_path / "here").iterdir())
        assert file.read() == b"a" * 1000
    assert told == [hashlib.sha256(b"a" * 1000).hexdigest()]
