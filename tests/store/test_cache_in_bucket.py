"""A cache in a bucket: it opens, its rows are those of the copy on the disk, and what is wrong there is named."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from faulty_s3 import Faults
from in_bucket import damage, put

from kcache import Cache
from kcache.errors import CacheCorruptError, CacheNotFoundError, StoreError
from kcache.places.bucket import BucketPath
from kcache.places.effects import remove
from kcache.store.rows import gather

FIELDS = ["image_embeds", "latents", "text_embeds", "text_encoder_hidden_states"]


@pytest.fixture(params=["cache", "published"])
def local(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(request.param)


@pytest.fixture
def there(local: str, tmp_path: Path) -> BucketPath:
    return put(Path(local), f"memory://caches/{tmp_path.name}/cache")


def equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in expected)


def test_rows_of_a_bucket_are_those_of_the_disk(local: str, bucket: str) -> None:
    disk, cache = Cache.open(local), Cache.open(str(put(Path(local), bucket)))
    assert (len(cache), cache.fingerprint) == (len(disk), disk.fingerprint)
    wanted = [5, 0, 5, 3, len(disk) - 1]
    dropped = np.array([False, True, False, False, True])
    for options in ({}, {"drop_caption": dropped, "drop_image": dropped}):
        assert equal(cache.read(wanted, FIELDS, **options), disk.read(wanted, FIELDS, **options))
    cache.make_mapped(FIELDS, stays=True)
    assert equal(cache.where("tokens > 0").read(wanted, FIELDS), disk.read(wanted, FIELDS))
    cache.make_resident(FIELDS)
    assert equal(cache.read(wanted, FIELDS), disk.read(wanted, FIELDS))


def test_rows_that_lie_together_are_fetched_together(there: BucketPath, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, asked, read = Cache.open(there), [], BucketPath.read_range
    monkeypatch.setattr(BucketPath, "read_range", lambda path, *span: asked.append(path) or read(path, *span))
    cache.read(range(len(cache)), ["latents"])
    assert len(asked) == len({file.path for file in cache.field_files("latents").files})


def flip(content: memoryview) -> memoryview:
    return memoryview(bytes([content[0] ^ 1]) + bytes(content[1:]))


def failing(count: int, change: Callable[[memoryview], memoryview], patch: pytest.MonkeyPatch) -> list[BucketPath]:
    """The first `count` ranges that are read arrive otherwise than they lie there; what was asked for is noted."""
    asked, read = list[BucketPath](), BucketPath.read_range

    def read_range(path: BucketPath, start: int, length: int) -> memoryview:
        asked.append(path)
        content = read(path, start, length)
        return change(content) if len(asked) <= count else content

    patch.setattr(BucketPath, "read_range", read_range)
    return asked


@pytest.mark.parametrize("change", [flip, lambda content: content[:-1]])
def test_what_arrives_wrong_is_fetched_again(
    change: Callable[[memoryview], memoryview], local: str, there: BucketPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache.open(there)
    asked = failing(2, change, monkeypatch)
    assert equal(cache.read([3], ["latents"]), Cache.open(local).read([3], ["latents"]))
    assert len(asked) == 3
    asked = failing(3, change, monkeypatch)
    with pytest.raises(CacheCorruptError, match=str(cache.field_files("latents").files[0].path)):
        cache.read([3], ["latents"])
    assert len(asked) == 3


def test_a_damaged_object_is_named(there: BucketPath) -> None:
    cache = Cache.open(there)
    for field in ("image_embeds", "text_encoder_hidden_states"):
        locator = cache.index[cache.table_of(field)][2]
        file = cache.field_files(field).files[locator["shard"]].path
        damage(file, int(locator[field]["offset"]) + 5)
        with pytest.raises(CacheCorruptError, match=rf"{file} is corrupt in the row at byte .* crc32c"):
            cache.read([2], [field])
        with pytest.raises(CacheCorruptError, match=str(file)):
            cache.make_resident([field])
        damage(file, int(locator[field]["offset"]) + 5)


def test_a_cut_object_is_named(there: BucketPath) -> None:
    cache = Cache.open(there)
    file = cache.field_files("latents").files[0].path
    for content in (file.read_bytes()[:9000], b"x"):
        file.store.put(file.key, content)
        with pytest.raises(CacheCorruptError, match=rf"{file} .* the file ends \d+ bytes before the row does"):
            cache.read(range(len(cache)), ["latents"])


def test_a_missing_object_is_named(there: BucketPath) -> None:
    cache = Cache.open(there)
    file = cache.field_files("latents").files[0].path
    remove(file)
    with pytest.raises(CacheCorruptError, match=str(file)):
        cache.read([0], ["latents"])
    remove(there / cache.manifest.tables["latents-64"].shards[0].data)
    with pytest.raises(CacheCorruptError, match=r"lacks 1 of its \d shards, such as memory://"):
        Cache.open(there)


def test_a_store_that_fails_is_no_damage(there: BucketPath, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache.open(there)

    def fail(path: BucketPath, *_: int) -> memoryview:
        raise StoreError(f"{path}: no connection")

    monkeypatch.setattr(BucketPath, "read_range", fail)
    with pytest.raises(StoreError, match="no connection"):
        cache.read([0], ["latents"])
    monkeypatch.setattr(BucketPath, "read_bytes", fail)
    with pytest.raises(StoreError, match="no connection"):
        Cache.open(there)


def test_what_is_no_cache_says_what_it_is(there: BucketPath) -> None:
    for url, expected in {
        there.parent: f"the caches are in it: {there}",
        there / "manifest.json": f"it is part of the cache {there}; give that",
        there.parent / "nothing": "nothing at that path; run `kcache cache-build",
    }.items():
        with pytest.raises(CacheNotFoundError, match=expected):
            Cache.open(url)


def test_rows_come_right_from_a_store_that_fails_now_and_then(
    cache: str, faulty: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KCACHE_HOME", str(tmp_path / "home"))
    there = put(Path(cache), faulty.url)
    faulty.rates = {"slow_down": 0.2, "cut": 0.2, "wrong_bytes": 0.1, "lost_request": 0.1}
    disk, opened = Cache.open(cache), Cache.open(there)
    for numbers in (range(len(disk)), [2, 7], [9, 0, 4]):
        assert equal(opened.read(numbers, FIELDS), disk.read(numbers, FIELDS))
    assert {"cut", "wrong_bytes"} <= faulty.happened.keys()


@pytest.mark.parametrize("field", ["latents", "text_encoder_hidden_states"])
def test_an_index_that_points_anywhere_gives_no_row(there: BucketPath, field: str) -> None:
    cache = Cache.open(there)
    files, entries = cache.field_files(field), cache.index[cache.table_of(field)][:3].copy()
    for offset in (1 << 63, 1 << 40, (1 << 64) - 1):
        entries[field]["offset"][1] = offset
        with pytest.raises(CacheCorruptError, match=r"the file ends \d+ bytes before the row does"):
            gather(files, entries, np.empty)
    entries[field]["offset"][1] = entries[field]["offset"][0]
    if cache.field(field).ragged:
        entries[field]["length"][1] = (1 << 32) - 128
        with pytest.raises(CacheCorruptError, match="it has 4294967168 bytes"):
            gather(files, entries, lambda *_: pytest.fail("memory was taken"))
