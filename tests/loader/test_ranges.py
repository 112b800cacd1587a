"""Ranges of files: what lies there, asked for once more where an answer is late, and nothing after the end."""

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from in_bucket import put

from kcache.errors import StoreError
from kcache.loader.streaming.ranges import Ranges
from kcache.places import Place
from kcache.places.bucket import BucketPath

CONTENT = bytes(range(256)) * 40


@pytest.fixture(params=["disk", "memory", "bucket"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    local = tmp_path / "file"
    local.write_bytes(CONTENT)
    if request.param == "disk":
        return local
    root = "memory://ranges" if request.param == "memory" else request.getfixturevalue("bucket")
    return put(local, f"{root}/file")


def test_ranges_are_what_lies_there(file: Place) -> None:
    ranges = Ranges()
    spans = [(0, 10), (100, 1), (5000, 5240), (0, len(CONTENT))] * 10
    asked = [ranges.fetch(file, *span) for span in spans]
    for (start, length), future in zip(spans, asked, strict=True):
        assert bytes(future.result()) == CONTENT[start : start + length]
    assert bytes(ranges.fetch(file, len(CONTENT) - 3, 10).result()) == CONTENT[-3:]
    assert ranges.requests == 41
    with pytest.raises(FileNotFoundError):
        ranges.fetch(file.parent / "other", 0, 1).result()
    ranges.close()
    ranges.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kcache-ranges")]
    with pytest.raises(StoreError, match="after reading had ended"):
        ranges.fetch(file, 0, 1)


class Store:
    """Answers at once, but not those requests, by their number, that are in `late`; some of them fail."""

    def __init__(self, late: set[int], broken: set[int]) -> None:
        self.late, self.broken, self.made = late, broken, 0

    async def get_range_async(self, key: str, *, start: int, length: int) -> bytes:
        number, self.made = self.made, self.made + 1
        if number in self.late:
            await asyncio.Event().wait()
        if number in self.broken:
            raise ValueError("no")
        return CONTENT[start : start + length]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store(set(), set())
    monkeypatch.setattr("kcache.places.bucket.store_of", lambda bucket: store)
    return store


def test_a_late_answer_is_asked_for_a_second_time(store: Store) -> None:
    store.late = {16}
    ranges, path = Ranges(), BucketPath("s3://stub", "file")
    for _ in range(17):
        assert bytes(ranges.fetch(path, 3, 5).result(timeout=60)) == CONTENT[3:8]
    assert (ranges.requests, ranges.hedged) == (18, 1)
    ranges.close()


def test_what_takes_some_milliseconds_is_not_late(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    patience = []

    async def wait(tasks: Any, *, timeout: float | None = None, real: Any = asyncio.wait, **how: Any) -> Any:
        patience.append(timeout)
        return await real(tasks, timeout=timeout, **how)

    monkeypatch.setattr(asyncio, "wait", wait)
    monkeypatch.setattr("kcache.loader.streaming.ranges._LEAST_PATIENCE", 1000.0)
    ranges, path = Ranges(), BucketPath("s3://stub", "file")
    for _ in range(18):
        ranges.fetch(path, 3, 5).result()
    assert patience == [None] * 16 + [1000.0] * 2
    ranges.close()


def test_of_two_answers_the_good_one_counts(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second request of one that is late is broken; the first, which comes at last, is what counts."""
    come = asyncio.Event()

    async def answer(key: str, *, start: int, length: int) -> bytes:
        number, store.made = store.made, store.made + 1
        if number == 16:
            await come.wait()
        if number == 17:
            come.set()
            raise ValueError("no")
        return CONTENT[start : start + length]

    monkeypatch.setattr(store, "get_range_async", answer)
    ranges, path = Ranges(), BucketPath("s3://stub", "file")
    for _ in range(17):
        assert bytes(ranges.fetch(path, 3, 5).result(timeout=60)) == CONTENT[3:8]
    assert ranges.hedged == 1
    ranges.close()


def test_a_request_that_fails_is_told(store: Store) -> None:
    store.broken = {0}
    ranges = Ranges()
    with pytest.raises(StoreError, match=r"s3://stub/file: the object store failed"):
        ranges.fetch(BucketPath("s3://stub", "file"), 3, 5).result()
    ranges.close()


def test_what_is_under_way_is_given_up_at_the_end(store: Store) -> None:
    store.late = {0}
    ranges = Ranges()
    asked = ranges.fetch(BucketPath("s3://stub", "file"), 3, 5)
    ranges.close()
    assert asked.cancelled()


def test_nothing_survives_a_fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    ranges, process = Ranges(), os.getpid()
    ranges.fetch(tmp_path / "file", 0, 1).result()
    monkeypatch.setattr(os, "getpid", lambda: process + 1)
    with pytest.raises(StoreError, match="a process forked from the one that reads"):
        ranges.fetch(tmp_path / "file", 0, 1)
    ranges.close()  # nothing of the other process's is ended
    monkeypatch.setattr(os, "getpid", lambda: process)
    assert bytes(ranges.fetch(tmp_path / "file", 0, 2).result()) == CONTENT[:2]
    ranges.close()
