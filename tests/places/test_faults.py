"""A store that fails as stores do: what is written is there, once, and what is read is what was written."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faulty_s3 import Faults, Kind

from kcache.errors import CacheCorruptError, StoreError
from kcache.places import place_of
from kcache.places.bucket import BucketPath
from kcache.places.conditional import check_store, create, forget_checks, read_version, swap
from kcache.places.effects import create_bytes, publish, read_all, read_checked, remove, take_all, write_bytes

SURVIVED: list[Kind] = ["slow_down", "conflict", "landed_500", "lost_answer", "lost_request", "stall", "cut"]
COUNT = 5


def place(faulty: Faults) -> BucketPath:
    folder = place_of(faulty.url)
    assert isinstance(folder, BucketPath)
    return folder


@pytest.mark.parametrize("kind", SURVIVED)
def test_what_stores_do_now_and_then_changes_nothing(faulty: Faults, kind: Kind, tmp_path: Path) -> None:
    folder = place(faulty)
    faulty.rates, faulty.stall_seconds = {kind: 0.25}, 0.05
    contents = [str(number).encode() * 100 for number in range(COUNT)]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: create_bytes(folder / f"created-{i}", contents[i]), range(COUNT)))
    assert made == [True] * COUNT
    for number, content in enumerate(contents):
        write_bytes(folder / f"written-{number}", content)
        found = read_version(folder / f"written-{number}")
        assert found is not None
        assert swap(folder / f"written-{number}", content + b"!", found[1])
        assert not swap(folder / f"written-{number}", b"of a zombie", found[1])
    names = [*(f"created-{number}" for number in range(COUNT)), *(f"written-{number}" for number in range(COUNT))]
    assert list(read_all([folder / name for name in names])) == contents + [content + b"!" for content in contents]
    assert sorted(path.name for path, _ in folder.below()) == sorted(names)
    (tmp_path / "large").write_bytes(bytes(range(256)) * (80 << 10))  # 20 MiB, in parts
    publish(tmp_path / "large", folder / "large")
    assert (folder / "large").read_bytes() == bytes(range(256)) * (80 << 10)
    remove(folder)
    assert list(folder.below()) == []
    assert faulty.happened[kind] > 0


@pytest.mark.parametrize("kind", ["conflict", "landed_500", "lost_answer"])
def test_a_lost_race_is_told_from_an_answer_that_was_lost(faulty: Faults, kind: Kind) -> None:
    path = place(faulty) / "record"
    faulty.rates = {kind: 0.5}
    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(lambda i: create(path, str(i).encode()), range(6)))
    assert made.count(True) == 1
    assert path.read_bytes() == str(made.index(True)).encode()
    assert create(path, path.read_bytes())  # a twin's


def test_bytes_that_are_changed_on_their_way_are_fetched_again(faulty: Faults) -> None:
    path = place(faulty) / "record"
    assert create(path, b"content")
    faulty.rates = {"wrong_bytes": 0.4}
    assert [path.read_bytes() for _ in range(20)] == [b"content"] * 20
    assert faulty.happened["wrong_bytes"] > 0
    faulty.rates = {"wrong_bytes": 1}
    with pytest.raises(StoreError, match="another one each time it is read"):
        path.read_bytes()


def test_a_tag_that_is_no_digest_costs_a_second_request(faulty: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    path = place(faulty) / "record"
    assert create(path, b"content")
    monkeypatch.setattr("kcache.places.bucket.hashlib.md5", lambda *_, **__: hashlib.sha256())
    faulty.requests.clear()
    assert path.read_bytes() == b"content"
    assert faulty.requests == {"GET": 2}


def test_what_is_not_right_is_fetched_again_from_a_bucket_only(faulty: Faults, tmp_path: Path) -> None:
    for path, times in ((place(faulty) / "record", 3), (tmp_path / "record", 1)):
        write_bytes(path, b"content")
        taken: list[bytes] = []

        def take(content: bytes, taken: list[bytes] = taken, times: int = times) -> int:
            taken.append(content)
            if len(taken) <= times:
                raise CacheCorruptError(f"damaged {len(taken)}")
            return len(taken)

        with pytest.raises(CacheCorruptError, match=f"damaged {times}"):
            read_checked(path, take)
        assert taken == [b"content"] * times
        assert list(take_all([path], take)) == [times + 1]


@pytest.mark.parametrize("url", ["s3", "memory"])
def test_a_store_with_conditional_writes_is_taken_and_left_clean(request: pytest.FixtureRequest, url: str) -> None:
    folder = place_of("memory://probed/x" if url == "memory" else request.getfixturevalue("bucket"))
    forget_checks()
    check_store(folder)
    assert isinstance(folder, BucketPath)
    assert list(folder.below()) == []


def test_what_killed_processes_tried_a_store_with_goes_once_it_is_old(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = place_of(bucket)
    assert isinstance(folder, BucketPath)
    for name in (".tmp-probe-0123", "tmp-probe-mine", "inner/.tmp-probe-4567"):
        write_bytes(folder / name, b"x")

    def left() -> set[str]:
        forget_checks()
        check_store(folder)
        return {path.key.removeprefix(f"{folder.key}/") for path, _ in folder.below()}

    assert left() == {".tmp-probe-0123", "tmp-probe-mine", "inner/.tmp-probe-4567"}
    monkeypatch.setattr("kcache.places.conditional._PROBE_SECONDS", -1.0)
    assert left() == {"tmp-probe-mine", "inner/.tmp-probe-4567"}


def test_a_bucket_is_probed_once_and_a_disk_never(faulty: Faults, tmp_path: Path) -> None:
    forget_checks()
    check_store(place(faulty))
    asked = faulty.requests.total()
    assert asked == 1 + 9  # the first word, and what the document on object stores says
    check_store(place(faulty) / "elsewhere")
    assert faulty.requests.total() == asked
    check_store(tmp_path)


def test_a_store_that_ignores_conditions_is_refused_for_writing(faulty: Faults) -> None:
    folder = place(faulty)
    forget_checks()
    faulty.rates = {"unconditional": 1}
    with pytest.raises(StoreError, match=r"^s3://caches: the object store writes a file over another .* on a disk"):
        check_store(folder)
    assert list(folder.below()) == []
    faulty.rates = {"denied": 1}
    with pytest.raises(StoreError, match="does not permit it; give the account of AWS_ACCESS_KEY_ID"):
        check_store(folder)


def test_a_store_that_swaps_whatever_is_there_is_refused(faulty: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_checks()
    faulty.rates, faulty.conditions = {"unconditional": 1}, ("If-Match",)
    with pytest.raises(StoreError, match=r"writes over a file that has changed since it was read"):
        check_store(place(faulty))


def test_what_the_library_does_not_ask_again_is_asked_again(faulty: Faults) -> None:
    for number in range(4):
        folder = place(faulty) / str(number)
        faulty.rates = {}
        write_bytes(folder / "file", b"x")
        faulty.rates = {"cut": 0.5}
        assert len(list(folder.below())) == len(list(folder.iterdir())) == 1
        faulty.rates = {"lost_answer": 0.5}
        remove(folder)
        assert list(folder.below()) == []
    assert faulty.happened["cut"] > 1
    assert faulty.happened["lost_answer"] > 1
