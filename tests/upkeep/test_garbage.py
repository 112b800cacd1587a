"""Garbage: what is no part of a cache goes, everything else stays, and building again has nothing to do."""

import os
import shutil
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_bucket import contents, put
from small_builds import build, copy_pictures, digests, encoded, small_config

import kcache.upkeep.garbage
from kcache import Cache
from kcache.build.build import BuildResult, build_cache
from kcache.build.plan import Plan, freeze_plan
from kcache.disk.durable import exclusive
from kcache.errors import CacheBusyError, CacheIncompleteError
from kcache.places.effects import temporary_folder
from kcache.store.formats.shard_files import DRAFT, publish_shard
from kcache.store.formats.side_files import side_name
from kcache.upkeep.garbage import Garbage, collect_garbage
from kcache.upkeep.verify import verify_cache

pytestmark = pytest.mark.usefixtures("form")

FIELDS = ["image_embeds", "latents", "text_embeds", "text_encoder_hidden_states"]


@pytest.fixture(scope="module")
def built(form: str, oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source of six pictures, one of them broken, and its cache in shards of two rows."""
    folder = tmp_path_factory.mktemp("collect")
    source = copy_pictures(oracle, folder / "pictures")
    (source / "img_05.png").write_bytes(b"no picture")
    (source / "img_05.txt").write_text("picture number 4")
    build(source, folder / "cache", oracle, rows_per_shard=2)
    return source, folder / "cache"


@pytest.fixture
def copies(built: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    return tuple(Path(shutil.copytree(path, tmp_path / path.name)) for path in built)  # type: ignore[return-value]


def disk_bytes(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())


def rows(cache: Path) -> dict[str, np.ndarray]:
    opened = Cache.open(cache)
    return opened.read(range(len(opened)), FIELDS)


def assert_same_cache(cache: Path, before: dict[str, np.ndarray], source: Path, oracle: Path) -> None:
    """The rows are what they were, and a build finds nothing to do and changes nothing."""
    after = rows(cache)
    assert all(np.array_equal(after[name], before[name]) for name in before)
    files = digests(cache)
    assert encoded(build(source, cache, oracle, rows_per_shard=2)) == {}
    assert digests(cache) == files


def test_a_cache_without_garbage_stays_as_it_is(copies: tuple[Path, Path]) -> None:
    before = digests(copies[1])
    garbage = collect_garbage(copies[1])
    assert (garbage.paths, garbage.bytes) == ((), 0)
    assert digests(copies[1]) == before


def test_shards_that_no_sample_uses_go(copies: tuple[Path, Path], oracle: Path, form: str) -> None:
    source, cache = copies
    for name in ("img_01", "img_02", "img_03"):
        (source / f"{name}.txt").write_text(f"another caption for {name}")
        (source / f"{name}.png").write_bytes(
            (oracle / "data" / name.replace("0", "1", 1)).with_suffix(".png").read_bytes()
        )
    build(source, cache, oracle, rows_per_shard=2, replace=True)
    before, samples, fingerprint = rows(cache), Cache.open(cache).samples, Cache.open(cache).fingerprint
    planned = collect_garbage(cache, dry_run=True)
    size = disk_bytes(cache)
    garbage = collect_garbage(cache)
    assert garbage.paths == planned.paths
    assert garbage.bytes == planned.bytes > 0
    assert size - disk_bytes(cache) == pytest.approx(garbage.bytes, abs=3000)  # manifest and index are shorter, too
    gone = "samples-" if form == "webdataset" else "latents-64-"
    assert any(path.startswith(gone) and "/00001" in path for path in garbage.paths)
    assert not any((cache / path).exists() for path in garbage.paths)
    assert (Cache.open(cache).samples, Cache.open(cache).fingerprint) == (samples, fingerprint)
    assert_same_cache(cache, before, source, oracle)


def test_compact_drops_unused_rows_from_mixed_shards(copies: tuple[Path, Path], oracle: Path) -> None:
    source, cache = copies
    (source / "img_02.txt").write_text("another caption")
    (source / "img_00.png").unlink()
    (source / "img_00.txt").unlink()
    build(source, cache, oracle, rows_per_shard=2)
    before = rows(cache)
    assert collect_garbage(cache).unused_bytes > 0
    size = disk_bytes(cache)
    garbage = collect_garbage(cache, compact=True)
    assert (garbage.unused_bytes, collect_garbage(cache, dry_run=True).paths) == (0, ())
    assert disk_bytes(cache) < size
    captions = len(Cache.open(cache).caption_bounds) - 1
    assert Cache.open(cache).manifest.tables["text"].rows == captions + 1
    assert_same_cache(cache, before, source, oracle)


def test_tables_of_another_recipe_and_leftovers_go(copies: tuple[Path, Path], oracle: Path, form: str) -> None:
    source, cache = copies
    build(source, cache, oracle, rows_per_shard=2, dtype="float16")
    (cache / ".tmp-1-dead").mkdir()
    (cache / ".tmp-1-dead" / "half").write_bytes(b"half a shard")
    live = next(cache.glob("samples-*/" if form == "webdataset" else "text-*/"))
    (live / ".tmp-2-dead").write_bytes(b"half a file")
    (live / "00099.rows.npy").write_bytes(b"never committed")
    (cache / f"samples-{'0' * 16}.parquet").write_bytes(b"of an older manifest")
    (cache / "notes.txt").write_text("not kcache's")
    before = rows(cache)
    old = {path.name for path in cache.iterdir() if path.is_dir()} - {".tmp-1-dead"}
    garbage = collect_garbage(cache)
    removed = old - {path.name for path in cache.iterdir()}
    assert len(removed) == (2 if form == "webdataset" else 3)
    assert garbage.bytes > 0
    assert not list(cache.rglob(".tmp-*"))
    assert not list(cache.rglob("00099*"))
    assert (cache / "notes.txt").exists()
    for name, array in rows(cache).items():
        assert np.array_equal(array, before[name])
    assert encoded(build(source, cache, oracle, rows_per_shard=2, dtype="float16")) == {}


def test_what_was_rejected_stays_known(
    copies: tuple[Path, Path], oracle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, cache = copies
    for path in source.glob("img_0[0-4].*"):
        path.unlink()
    for i in (10, 11):
        shutil.copyfile(oracle / "data" / f"img_{i}.png", source / f"img_{i}.png")
        (source / f"img_{i}.txt").write_text("a new picture")
    build(source, cache, oracle, rows_per_shard=2, replace=True)
    collect_garbage(cache, compact=True)
    monkeypatch.setattr("kcache.encoders.frozen.load_encoder", lambda *_: pytest.fail("an encoder was loaded"))
    assert build(source, cache, oracle, rows_per_shard=2).rejected == 1


def test_hard_links_free_nothing(copies: tuple[Path, Path], oracle: Path, tmp_path: Path) -> None:
    source, cache = copies
    build(source, cache, oracle, rows_per_shard=2, dtype="float16")
    shutil.copytree(cache, tmp_path / "linked", copy_function=os.link)
    assert collect_garbage(cache).bytes == 0


def test_it_waits_for_builds(copies: tuple[Path, Path]) -> None:
    with exclusive(copies[1]), pytest.raises(CacheBusyError):
        collect_garbage(copies[1])
    freeze_plan(copies[1], Plan(tables=()))
    with pytest.raises(CacheIncompleteError, match="unfinished build"):
        collect_garbage(copies[1])


def test_nothing_is_removed_under_a_reader(copies: tuple[Path, Path], oracle: Path) -> None:
    source, cache = copies
    reader = Cache.open(cache).select([1, 0])
    expected = Cache.open(cache).read([1, 0], FIELDS)
    for name in ("img_02", "img_03"):
        (source / f"{name}.txt").write_text(f"another caption for {name}")
        (source / f"{name}.png").write_bytes((source / "img_00.png").read_bytes() + name.encode())
    build(source, cache, oracle, rows_per_shard=2)  # goes on beside it
    before = digests(cache)
    with pytest.raises(CacheBusyError, match="in use by another process, or another part of this one"):
        collect_garbage(cache, compact=True)
    assert digests(cache) == before
    assert len(collect_garbage(cache, dry_run=True).paths) >= 2  # the old list of samples and the old index among them
    assert all(np.array_equal(rows, expected[name]) for name, rows in reader.read([0, 1], FIELDS).items())
    assert reader.samples["name"].to_pylist() == ["img_01.png", "img_00.png"]
    del reader
    assert collect_garbage(cache, compact=True).bytes > 0
    assert len([*cache.glob("index-*"), *cache.glob("samples-*.parquet")]) == 2


def test_interrupted_it_goes_on(copies: tuple[Path, Path], oracle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, cache = copies
    build(source, cache, oracle, rows_per_shard=2, dtype="float16")
    before = rows(cache)
    with monkeypatch.context() as patch:
        patch.setattr("kcache.upkeep.garbage.remove", lambda path: path.rename(path.parent / ".tmp-3-x") and 1 / 0)
        with pytest.raises(ZeroDivisionError):
            collect_garbage(cache)
    assert all(np.array_equal(rows(cache)[name], before[name]) for name in before)
    assert collect_garbage(cache).bytes > 0
    assert collect_garbage(cache).paths == ()


def lost_race(cache: Path) -> list[str]:
    """What a writer of shard 00000 leaves in each folder of shards that another one, with other bytes, came before."""
    made = []
    for name in sorted(path.parent.name for path in cache.glob("*-*/00000.json")):
        with temporary_folder(cache / name) as temporary:
            (temporary / DRAFT).mkdir()
            (temporary / DRAFT / "zarr.json").write_bytes(b"{}")
            (temporary / side_name(DRAFT)).write_bytes(b"other rows")
            stem, _ = publish_shard(temporary, cache / name, "00000")
        made += [f"{name}/{stem}", f"{name}/{stem}.rows.npy"]
    return made


def test_what_lost_a_race_is_no_part_of_the_cache_and_goes(copies: tuple[Path, Path]) -> None:
    cache = copies[1]
    before = digests(cache)
    made = lost_race(cache)
    assert len(made) >= 4
    found = verify_cache(cache)
    assert (found.corrupt, sorted(path.rstrip("/") for path in found.orphaned)) == (False, made)
    assert collect_garbage(cache).paths == tuple(made)
    assert digests(cache) == before


def test_in_a_bucket_a_build_that_wants_what_is_removed_waits_and_makes_it_anew(
    copies: tuple[Path, Path], oracle: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build of what the cache held before begins when what is no part of it is known, and not removed yet."""
    source, cache = copies
    fewer = copy_pictures(oracle, tmp_path / "fewer", 2)
    build(fewer, cache, oracle, rows_per_shard=2, replace=True)
    place = put(cache, f"{bucket}/cache")
    waits, find = threading.Event(), kcache.upkeep.garbage.find_garbage
    monkeypatch.setattr("kcache.upkeep.garbage._DAY", -60.0)
    monkeypatch.setattr("kcache.build.claims.QUIET_SECONDS", 0.0)

    def listen(message: str) -> None:
        if message.startswith("waiting for"):
            waits.set()

    with ThreadPoolExecutor(1) as builder:

        def found(*arguments: Any) -> Garbage:
            garbage = find(*arguments)
            config = small_config(oracle, rows_per_shard=2)
            monkeypatch.setattr("kcache.upkeep.garbage.find_garbage", find)
            job = builder.submit(build_cache, str(source), str(place), config, say=listen)
            jobs.append(job)
            job.add_done_callback(lambda _: waits.set())
            waits.wait()
            return garbage

        jobs = list[Future[BuildResult]]()
        monkeypatch.setattr("kcache.upkeep.garbage.find_garbage", found)
        assert collect_garbage(str(place)).paths != ()
        assert jobs[0].result().samples == 5
    assert not verify_cache(str(place)).corrupt


def test_in_a_bucket_only_what_is_older_than_a_day_goes(
    copies: tuple[Path, Path], oracle: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, cache = copies
    (source / "img_02.txt").write_text("another caption")
    (source / "img_00.png").unlink()
    reader = Cache.open(cache)  # so that what the next build supersedes stays
    build(source, cache, oracle, rows_per_shard=2)
    lost_race(cache)
    place = put(cache, f"{bucket}/cache")
    waiting = collect_garbage(str(place), compact=True)
    assert (waiting.paths, waiting.bytes, waiting.younger > 8) == ((), 0, True)
    assert not verify_cache(str(place)).corrupt
    monkeypatch.setattr("kcache.upkeep.garbage._DAY", -60.0)
    garbage = collect_garbage(str(place), compact=True)
    assert (len(garbage.paths), garbage.younger) == (waiting.younger, 0)
    del reader
    collect_garbage(cache, compact=True)
    assert contents(place) == contents(cache)
    assert verify_cache(str(place)).orphaned == ()
