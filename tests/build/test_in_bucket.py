"""Builds in a bucket of a real object store: the same names and bytes as on a disk, whatever happens meanwhile."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_builds
import torch
from bucketed_builds import build_bucketed
from faulty_s3 import Faults
from filer import copy_in, copy_out, listed
from in_bucket import put
from small_builds import copy_pictures, digests, encoded, foretold, small_config

import kcache.build.encode
from kcache import Cache
from kcache.build.build import BuildResult, build_cache
from kcache.build.claims import TURN
from kcache.build.committed import check_outside, check_target
from kcache.build.plan import CLAIMS, claims_folder, freeze_plan
from kcache.build.survey import missing_rows, survey
from kcache.errors import CacheMismatchError, StoreError
from kcache.loader import CacheLoader
from kcache.places import place_of
from kcache.places.bucket import BucketPath
from kcache.places.effects import remove, write_bytes, write_json
from kcache.processes import this_process
from kcache.store.shards import RowBlock, commit_shard
from kcache.upkeep.verify import verify_cache


@pytest.fixture(scope="module")
def source(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_pictures(oracle, tmp_path_factory.mktemp("bucket") / "pictures")


@pytest.fixture(scope="module")
def on_disk(source: Path, oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Gives a cache of the pictures on a disk, of the form of the moment."""
    folder = tmp_path_factory.mktemp("local")

    def on_disk() -> Path:
        if not (cache := folder / small_builds.FORM).exists():
            build_at(str(cache), source, oracle)
        return cache

    return on_disk


@pytest.fixture
def local(on_disk: Callable[[], Path]) -> Path:
    return on_disk()


both_forms = pytest.mark.usefixtures("form")


def build_at(url: str, source: Path, oracle: Path, **changes: Any) -> BuildResult:
    """Build a cache with two shards of each table at a path or URL."""
    say = changes.pop("say", lambda _: None)
    return build_cache(str(source), url, small_config(oracle, rows_per_shard=4, **changes), say=say)


def key_of(url: str) -> str:
    place = place_of(url)
    assert isinstance(place, BucketPath)
    return place.key


def assert_same(url: str, local: Path, folder: Path) -> None:
    """What lies at `url`, copied out by a tool that is none of ours, is the cache `local`, name by name."""
    assert digests(copy_out(key_of(url), folder / "copied")) == digests(local)


@both_forms
def test_a_build_is_the_same_as_on_a_disk_and_opens_wherever_it_is_copied(
    bucket: str, source: Path, oracle: Path, local: Path, tmp_path: Path
) -> None:
    result = build_at(bucket, source, oracle)
    assert (result.cache, result.samples) == (bucket, 6)
    assert_same(bucket, local, tmp_path)
    copy_in(tmp_path / "copied", f"{key_of(bucket)}-again")
    rows = Cache.open(local).read(range(6), ["image_embeds", "latents"])
    for place in (bucket, str(tmp_path / "copied"), f"{bucket}-again"):
        read = Cache.open(place).read(range(6), ["image_embeds", "latents"])
        assert all(np.array_equal(read[name], rows[name]) for name in rows)
        assert encoded(build_at(place, source, oracle)) == {}
    verify_cache(str(tmp_path / "copied"))
    assert_same(f"{bucket}-again", local, tmp_path / "again")


def test_shapes_resolutions_and_mirror_images_are_the_same_as_on_a_disk(
    bucket: str, bucketed: Path, oracle: Path, tmp_path: Path
) -> None:
    """Built one after the other, then with another list of shapes; opened, verified and streamed where they are."""
    local = shutil.copytree(bucketed / "cache", tmp_path / "local")
    build_bucketed(bucketed / "source", bucket, oracle, format="zarr")  # type: ignore[arg-type]
    fewer: dict[str, Any] = {"aspect_ratio_buckets": "48,80;64,64;80,48", "format": "zarr"}
    found, expected = (build_at(str(cache), bucketed / "source", oracle, **fewer) for cache in (bucket, local))
    assert encoded(found) == encoded(expected) == {"latents-48x80": 2, "latents-80x48": 2}
    there, here = digests(copy_out(key_of(bucket), tmp_path / "copied")), digests(local)
    superseded = there.keys() - here.keys()
    assert here == {name: digest for name, digest in there.items() if name not in superseded}
    assert {name.split("-")[0] for name in superseded} == {"index"}  # of the two manifests before
    assert not verify_cache(bucket).corrupt
    batches = []
    for path, residency in ((bucket, "stream"), (local, "ram")):
        cache = Cache.open(path, resolution=(32, 64))
        loader = CacheLoader(cache, ["image_embeds", "latents"], 4, shuffle="stream", residency=residency)
        batches.append(list(islice(loader.forever(), 20)))
    for streamed, right in zip(*batches, strict=True):
        assert all(torch.equal(streamed[name], right[name]) for name in right)
    assert {tuple(batch["latents"].shape[1:]) for batch in batches[0]} == {(4, 4, 4), (4, 6, 10), (4, 8, 8), (4, 10, 6)}


def test_where_nothing_is_to_do_a_build_asks_little_and_writes_its_turn_only(
    faulty: Faults, source: Path, oracle: Path, local: Path
) -> None:
    copy_in(local, key_of(faulty.url))
    before = listed(key_of(faulty.url))
    build_at(faulty.url, source, oracle)
    few, shards = faulty.requests.total(), len(list(local.glob("*/0*.json")))
    assert faulty.requests["PUT"] <= 10  # those of the probe and of the turn
    assert few <= 100 + 4 * shards
    assert listed(key_of(faulty.url)) == before
    first = faulty.requests["GET"]
    build_at(faulty.url, source, oracle)
    again = faulty.requests["GET"] - first
    assert first - again >= 2 * shards  # records and side files, which this machine has seen
    assert listed(key_of(faulty.url)) == before


@both_forms
def test_what_changed_is_encoded_and_what_was_superseded_stays_for_readers(
    bucket: str, oracle: Path, tmp_path: Path
) -> None:
    pictures = copy_pictures(oracle, tmp_path / "pictures")
    build_at(bucket, pictures, oracle)
    reader, before = Cache.open(bucket), set(listed(key_of(bucket)))
    (pictures / "img_00.txt").write_text("another caption")
    (pictures / "img_01.png").write_bytes(b"no picture")
    foretold_now = foretold(pictures, bucket, oracle, rows_per_shard=4)  # type: ignore[arg-type]
    assert {name: table.missing for name, table in foretold_now.tables.items() if table.missing} == {
        "image_embeds": 1, "latents-64": 1, "text": 1,
    }  # fmt: skip
    assert set(listed(key_of(bucket))) == before
    result = build_at(bucket, pictures, oracle)
    assert (result.samples, result.rejected, encoded(result)) == (5, 1, {"text": 1})
    assert b"img_01" in (place_of(bucket) / "rejected.jsonl").read_bytes()
    gone = before - set(listed(key_of(bucket)))
    assert gone == set()
    assert len(reader.read(range(6), ["image_embeds"])["image_embeds"]) == 6
    fewer = copy_pictures(oracle, tmp_path / "fewer", 1)
    with pytest.raises(CacheMismatchError, match="--replace"):
        build_at(bucket, fewer, oracle)
    assert build_at(bucket, fewer, oracle, replace=True).samples == 1


@both_forms
def test_a_build_that_broke_off_goes_on(
    bucket: str, source: Path, oracle: Path, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, count = kcache.build.encode.commit_shard, 0

    def once(*arguments: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            raise StoreError("no connection")
        return commit(*arguments, **named)

    monkeypatch.setattr(kcache.build.encode, "commit_shard", once)
    with pytest.raises(StoreError):
        build_at(bucket, source, oracle)
    assert not [name for name in listed(key_of(bucket)) if name == TURN or "/claims/" in name]
    committed = count - 1
    assert build_at(bucket, source, oracle).samples == 6
    assert (committed, count) == (2, 7)  # six shards, and the one that failed
    assert_same(bucket, local, tmp_path)


def test_requests_that_fail_in_every_way_change_nothing(
    faulty: Faults, source: Path, oracle: Path, local: Path, tmp_path: Path
) -> None:
    kinds = ("slow_down", "conflict", "landed_500", "lost_answer", "lost_request", "cut")
    faulty.rates.update(dict.fromkeys(kinds, 0.04) | {"conflict": 0.4})
    build_at(faulty.url, source, oracle)
    assert set(faulty.happened) == set(kinds)
    assert_same(faulty.url, local, tmp_path)


def test_a_store_that_forbids_in_the_middle_costs_a_line_and_nothing_else(
    faulty: Faults, source: Path, oracle: Path, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, count = kcache.build.encode.commit_shard, 0

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count == 4:
            faulty.rates["denied"] = 1.0
        return commit(*arguments, **named)

    monkeypatch.setattr(kcache.build.encode, "commit_shard", counted)
    with pytest.raises(StoreError, match="does not permit it") as told:
        build_at(faulty.url, source, oracle)
    assert len(str(told.value).splitlines()) == 1
    faulty.rates.clear()
    build_at(faulty.url, source, oracle)
    assert count == 7
    assert_same(faulty.url, local, tmp_path)


@pytest.fixture
def planned(bucket: str, source: Path, oracle: Path) -> BucketPath:
    """The folder of the claims of a cache whose plan is frozen, and of which nothing is built."""
    cache = place_of(bucket)
    job = survey(str(source), cache, small_config(oracle, rows_per_shard=4), lambda _: None)
    plan = missing_rows(job, job.committed().tables, retry=False, seen={})
    freeze_plan(cache, plan)
    claims = claims_folder(cache, plan)
    assert isinstance(claims, BucketPath)
    return claims


def test_who_builds_elsewhere_is_waited_for_and_its_work_taken_over_when_asked(
    bucket: str, planned: BucketPath, source: Path, oracle: Path, local: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    elsewhere = asdict(replace(this_process(), host="pod-a", namespace="1"))
    write_json(planned / "text-00001", elsewhere | {"token": "theirs"})
    monkeypatch.setattr("kcache.build.claims.QUIET_SECONDS", 0.0)

    class Waiting(Exception):
        pass

    def listen(message: str) -> None:
        if message.startswith("waiting"):
            raise Waiting(message)

    with pytest.raises(Waiting, match=f"on pod-a, which holds text-00001 in {bucket}/plans/.*, in 5 min"):
        build_at(bucket, source, oracle, say=listen)
    said: list[str] = []
    build_at(bucket, source, oracle, say=said.append, take_over=True)
    assert any("taking over what process" in message for message in said)
    assert_same(bucket, local, tmp_path)


@both_forms
def test_a_shard_that_another_plan_committed_first_stays_and_no_row_is_missed(
    bucket: str, planned: BucketPath, source: Path, oracle: Path
) -> None:
    job = survey(str(source), place_of(bucket), small_config(oracle, rows_per_shard=4), lambda _: None)
    for recipe in job.recipes.values():
        folder = place_of(bucket) / recipe.directory
        commit_shard(folder, "00000", recipe, RowBlock(keys=np.zeros((0, 16), np.uint8), arrays={}), provenance={})
    result = build_at(bucket, source, oracle)
    assert (result.samples, result.rejected) == (6, 0)
    assert len(Cache.open(bucket).read(range(6), ["latents"])["latents"]) == 6


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("moment", "form"),
    [("builder.is_mine", "zarr"), ("build.freeze_plan", "webdataset"), ("build.finish_build", "webdataset")],
)
def test_a_claim_that_is_removed_under_its_holder_costs_work_and_nothing_else(
    bucket: str, source: Path, oracle: Path, on_disk: Callable[[], Path], tmp_path: Path, moment: str, form: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """By one that was suspended between its last look and the removal of what it took for its own: no store asks both.

    Whoever comes next finds nothing claimed, and finishes the cache before the holder goes on.
    """
    monkeypatch.setattr("small_builds.FORM", form)
    name, cache = f"kcache.build.{moment}", place_of(bucket)
    module, _, attribute = name.rpartition(".")
    function, said = getattr(sys.modules[module], attribute), list[str]()

    def after_the_removal(*arguments: Any) -> Any:
        monkeypatch.setattr(name, function)
        claims = [path for path, _ in cache.below() if path.name == TURN or path.parent.name == CLAIMS]
        assert claims
        for claim in claims:
            remove(claim)
        with monkeypatch.context() as other:
            other.setattr("kcache.build.claims._held", {})
            assert build_at(bucket, source, oracle).samples == 6
        return function(*arguments)

    monkeypatch.setattr(name, after_the_removal)
    assert build_at(bucket, source, oracle, say=said.append).samples == 6
    assert_same(bucket, on_disk(), tmp_path)


def test_what_is_no_cache_is_left_alone(bucket: str, source: Path, oracle: Path) -> None:
    write_bytes(place_of(bucket) / "thesis.tex", b"years of work")
    for url, words in ((bucket, "not empty and not a cache"), (f"{bucket}/thesis.tex", "is a file")):
        with pytest.raises(CacheMismatchError, match=words):
            build_at(url, source, oracle)
    assert listed(key_of(bucket)) == ["thesis.tex"]


def test_no_cache_is_begun_inside_of_another_one(cache: str, bucket: str, faulty: Faults) -> None:
    there = put(Path(cache), f"{bucket}/cache")
    with pytest.raises(CacheMismatchError, match=f"^{there}/inside is inside of the cache {there}, which owns"):
        check_target(there / "inside")
    check_target(there)
    check_target(there.parent / "beside")
    faulty.rates = {"denied": 1}  # an account may see nothing of what lies above
    check_outside(there / "inside")
    assert faulty.happened["denied"] > 0


def test_a_builder_that_comes_and_goes_is_no_file(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = iter([True, False, True, False])
    monkeypatch.setattr(BucketPath, "is_dir", lambda _: next(there))
    check_target(place_of(bucket))


def test_the_command_builds_at_a_url_and_takes_it_up_again(
    bucket: str, source: Path, oracle: Path, local: Path, tmp_path: Path,
    kcache_command: Callable[..., int], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = small_config(oracle, rows_per_shard=4)
    flags = {name: value for name, value in vars(config).items() if value not in (None, False, ())} | {"resolution": 64}
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    assert kcache_command("cache-build", str(source), bucket, *arguments, "--dry-run") == 0
    assert listed(key_of(bucket)) == []
    for words in ("7 encoded, 0 present before", "0 to do"):
        assert kcache_command("cache-build", str(source), bucket, *arguments) == 0
        assert words in capsys.readouterr().out
    assert_same(bucket, local, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["copied"]
