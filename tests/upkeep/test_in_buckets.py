"""What looks after caches, of one in a bucket: damage is found and named, and a store that fails is no damage."""

from pathlib import Path

import pytest
from faulty_s3 import Faults
from in_bucket import contents, damage, put

from kcache import Cache
from kcache.errors import StoreError
from kcache.places.bucket import BucketPath
from kcache.places.conditional import forget_checks
from kcache.places.effects import remove, write_bytes
from kcache.upkeep.convert import convert_cache
from kcache.upkeep.garbage import collect_garbage
from kcache.upkeep.merge import merge_caches
from kcache.upkeep.verify import VerifyProgress, verify_cache


@pytest.fixture(params=["cache", "published"])
def there(request: pytest.FixtureRequest, tmp_path: Path) -> BucketPath:
    return put(Path(request.getfixturevalue(request.param)), f"memory://upkeep/{tmp_path.name}/cache")


def test_a_sound_cache_is_sound(there: BucketPath) -> None:
    told = list[VerifyProgress]()
    write_bytes(there / "notes" / "mine.txt", b"a note")
    write_bytes(there / "latents-64-00000000.txt", b"a note")
    result = verify_cache(str(there), told.append)
    assert (result.corrupt, result.cache) == (False, str(there))
    assert result.orphaned == ("latents-64-00000000.txt", "notes/")
    assert told[-1].done == told[-1].total == result.bytes > 0


def test_damage_is_named_as_on_a_disk(there: BucketPath, tmp_path: Path) -> None:
    cache = Cache.open(there)
    locator = cache.index["latents-64"][2]
    file = cache.field_files("latents").files[locator["shard"]].path
    damage(file, int(locator["latents"]["offset"]) + 1)
    gone = sorted(path for path, _ in there.below() if path.name.endswith(".rows.npy"))[0]
    remove(gone)
    for path, _ in there.below():
        local = tmp_path / path.key.removeprefix(there.key).lstrip("/")
        local.parent.mkdir(parents=True, exist_ok=True)
        local.write_bytes(path.read_bytes())
    here, found = verify_cache(tmp_path), verify_cache(there)
    assert found.rows == here.rows
    assert [row.sample for row in found.rows] == [cache.samples["id"][2].as_py()]
    assert [broken.path for broken in found.files] == [broken.path for broken in here.files]
    assert len(found.files) == 2


def test_what_arrives_wrong_is_read_again(there: BucketPath, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, read = set[tuple[BucketPath, int]](), BucketPath.read_range

    def read_range(path: BucketPath, start: int, length: int) -> memoryview:
        content = bytearray(read(path, start, length))
        if (path, start) not in seen:
            seen.add((path, start))
            content[0] ^= 1
        return memoryview(content)

    monkeypatch.setattr(BucketPath, "read_range", read_range)
    for path in [path for path, _ in there.below() if path.suffix == ".jsonl"]:
        seen.add((path, 0))
    assert not verify_cache(there).corrupt


def test_a_store_that_fails_is_no_damage(there: BucketPath, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: BucketPath, *_: int) -> memoryview:
        raise StoreError(f"{path}: no connection")

    monkeypatch.setattr(BucketPath, "read_range", fail)
    with pytest.raises(StoreError, match="no connection"):
        verify_cache(there)


def test_a_cache_in_a_bucket_is_converted_and_merged(there: BucketPath, bucket: str, tmp_path: Path) -> None:
    cache = Cache.open(there)
    form = "webdataset" if cache.manifest.format == "zarr" else "zarr"
    convert_cache(str(there), f"{bucket}/other", form)
    merge_caches(str(tmp_path / "all"), [str(there), str(there)])
    for made in (f"{bucket}/other", tmp_path / "all"):
        opened = Cache.open(made)
        assert opened.fingerprint == cache.fingerprint
        assert (opened.read([3, 1], ["latents"])["latents"] == cache.read([3, 1], ["latents"])["latents"]).all()
        assert not verify_cache(made).corrupt


def test_nothing_is_written_where_the_store_ignores_conditions(cache: str, faulty: Faults) -> None:
    there = put(Path(cache), f"{faulty.url}/cache")
    before, new = contents(there), there.parent / "new"
    faulty.rates = {"unconditional": 1}
    for write in (
        lambda: convert_cache(there, new, "webdataset"),
        lambda: merge_caches(new, [there, there]),
        lambda: collect_garbage(there),
    ):
        forget_checks()
        with pytest.raises(StoreError, match="expected one with conditional writes"):
            write()
    assert collect_garbage(there, dry_run=True).paths == ()
    assert contents(there) == before
    assert list(new.below()) == []
