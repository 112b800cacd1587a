"""Several builders of one cache: who takes which shard, who waits for whom, and what the dead leave behind."""

import os
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_builds import build, copy_pictures, digests, encoded, small_config

import kcache.build.builder
import kcache.build.claims
import kcache.build.encode
import kcache.build.work.progress
from kcache import Cache
from kcache.build.build import build_cache
from kcache.build.claims import TURN, Patience
from kcache.build.plan import claims_folder, freeze_plan, open_plan
from kcache.build.survey import missing_rows, survey
from kcache.disk.durable import write_json
from kcache.disk.leases import LEASE_SECONDS
from kcache.errors import CacheBusyError
from kcache.processes import this_process
from kcache.store.shards import Commit, RowBlock, commit_shard, read_commit, read_commits
from kcache.upkeep.verify import verify_cache


@pytest.fixture(scope="module")
def source(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_pictures(oracle, tmp_path_factory.mktemp("builders") / "pictures")


@pytest.fixture
def planned(source: Path, oracle: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A cache whose plan is frozen and of which nothing is built, and the folder of the plan's claims."""
    cache, config = tmp_path / "cache", small_config(oracle, rows_per_shard=4)
    cache.mkdir()
    job = survey(str(source), cache, config, lambda _: None)
    plan = missing_rows(job, job.committed().tables, retry=False, seen={})
    freeze_plan(cache, plan)
    return cache, claims_folder(cache, plan)


def claimed_elsewhere(claims: Path, *names: str, age: float = 0.0) -> None:
    """Claims of a builder in a container that nobody here can see, last renewed `age` seconds ago."""
    for name in names:
        write_json(claims / name, asdict(replace(this_process(), host="pod-a", namespace="1")))
        then = (claims / name).stat().st_mtime - age
        os.utime(claims / name, (then, then))


@pytest.mark.parametrize("worker", [None, "0/2"])
def test_who_builds_elsewhere_is_waited_for_and_named_with_all_that_it_holds(
    source: Path, oracle: Path, planned: tuple[Path, Path], worker: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, claims = planned
    held = ("latents-64-00000", "text-00001")
    claimed_elsewhere(claims, *held)
    monkeypatch.setattr("kcache.build.claims.QUIET_SECONDS", 0.0)
    said: list[str] = []

    def listen(message: str) -> None:
        if message.startswith("waiting"):
            said.append(message)
            assert len(list(cache.glob("*/0*.json"))) == 4  # everything else is done
            for name in held:
                (claims / name).unlink()

    config = small_config(oracle, rows_per_shard=4, worker=worker)
    assert build_cache(str(source), str(cache), config, say=listen).samples == 6
    [message] = said
    assert f"process {os.getpid()} on pod-a, which holds text-00001, latents-64-00000 in {claims}; nothing" in message


@pytest.mark.parametrize(("age", "take_over"), [(LEASE_SECONDS + 1, False), (0.0, True)])
def test_what_a_killed_container_held_is_taken_over(
    source: Path, oracle: Path, planned: tuple[Path, Path], tmp_path: Path, age: float, take_over: bool
) -> None:
    cache, claims = planned
    claimed_elsewhere(claims, "text-00000", "image_embeds-00001", age=age)
    claimed_elsewhere(cache, TURN, age=age)
    said: list[str] = []
    config = small_config(oracle, rows_per_shard=4, take_over=take_over)
    build_cache(str(source), str(cache), config, say=said.append)
    assert len([message for message in said if message.startswith("taking over what process")]) == 1
    build(source, tmp_path / "alone", oracle, rows_per_shard=4)
    assert digests(cache) == digests(tmp_path / "alone")


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_one_that_was_suspended_and_comes_back_harms_nothing(
    source: Path, oracle: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A builder stops just before its first commit; another takes its claims, does the work, and finishes the cache."""
    cache, said, before = tmp_path / "cache", list[str](), dict[str, str]()
    kept = kcache.build.builder.Claims.kept

    def suspended(claims: Any, table: Any, shard: Any) -> bool:
        monkeypatch.setattr(kcache.build.builder.Claims, "kept", kept)
        if (plan := open_plan(cache)) is None:
            return bool(kept(claims, table, shard))
        for claim in claims_folder(cache, plan).iterdir():
            claim.unlink()
        held = kcache.build.claims._held.copy()
        kcache.build.claims._held.clear()  # as in the other process
        build(source, cache, oracle, format=form, rows_per_shard=4)
        kcache.build.claims._held.update(held)
        before.update(digests(cache))
        return bool(kept(claims, table, shard))

    monkeypatch.setattr(kcache.build.builder.Claims, "kept", suspended)
    config = small_config(oracle, format=form, rows_per_shard=4)
    result = build_cache(str(source), str(cache), config, say=said.append)
    assert (result.samples, digests(cache)) == (6, before)
    assert any("was taken over by another builder" in message for message in said)


def test_what_one_with_fewer_pictures_recorded_as_gone_is_encoded_by_one_who_has_it(
    source: Path, oracle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a builder is suspended, one of another source works off its plan."""
    cache, fewer = tmp_path / "cache", copy_pictures(oracle, tmp_path / "fewer", 2)
    kept = kcache.build.builder.Claims.kept

    def suspended(claims: Any, table: Any, shard: Any) -> bool:
        monkeypatch.setattr(kcache.build.builder.Claims, "kept", kept)
        for claim in cache.glob("plans/*/claims/*"):
            claim.unlink()
        with monkeypatch.context() as other:
            other.setattr("kcache.build.claims._held", {})
            build(fewer, cache, oracle, replace=True)
        assert any(commit.absent for path in cache.glob("*/0*.json") if (commit := read_commit(path)))
        return bool(kept(claims, table, shard))

    monkeypatch.setattr(kcache.build.builder.Claims, "kept", suspended)
    result = build(source, cache, oracle, rows_per_shard=4, replace=True)
    assert (result.samples, result.rejected) == (6, 0)
    assert encoded(build(source, cache, oracle)) == {}


@pytest.fixture
def elsewhere(source: Path, oracle: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[], None]], None]:
    """Lets something happen on another machine, in the middle of a build here, before a function of this name goes on.

    A build there has the turn, and knows nothing of who holds the cache here.
    """

    def elsewhere(name: str, happen: Callable[[], None]) -> None:
        module, _, attribute = name.rpartition(".")
        function = getattr(sys.modules[module], attribute)

        def suspended(*arguments: Any) -> Any:
            monkeypatch.setattr(name, function)
            with monkeypatch.context() as other:
                other.setattr("kcache.build.claims._held", {})
                other.setattr("kcache.build.build.exclusive", lambda _: nullcontext())
                happen()
            return function(*arguments)

        monkeypatch.setattr(name, suspended)

    return elsewhere


def test_one_that_was_suspended_while_it_planned_joins_the_plan_that_another_opened(
    source: Path, oracle: Path, tmp_path: Path, elsewhere: Callable[[str, Callable[[], None]], None]
) -> None:
    cache = tmp_path / "cache"

    def plan() -> None:
        job = survey(str(source), cache, small_config(oracle, rows_per_shard=2), lambda _: None)
        freeze_plan(cache, missing_rows(job, job.committed().tables, retry=False, seen={}))

    elsewhere("kcache.build.build.freeze_plan", plan)
    assert build(source, cache, oracle, rows_per_shard=4).samples == 6
    assert {commit.rows for path in cache.glob("*/0*.json") if (commit := read_commit(path)).rows} == {1, 2}


@pytest.mark.parametrize(
    ("form", "moment"),
    [
        ("zarr", "kcache.store.shards.publish_shard"),
        ("webdataset", "kcache.build.joined_tars.publish_shard"),
        ("zarr", "kcache.store.formats.index_files.publish"),
    ],
)
def test_one_that_was_suspended_while_it_wrote_drops_what_is_gone(
    source: Path, oracle: Path, tmp_path: Path, elsewhere: Callable[[str, Callable[[], None]], None],
    form: str, moment: str,
) -> None:  # fmt: skip
    """Another builder took over its claims, removed what it was making, and has finished."""
    cache, before = tmp_path / "cache", dict[str, str]()

    def finish() -> None:
        for path in (*cache.glob("plans/*/claims/*"), cache / TURN):
            path.unlink(missing_ok=True)
        for path in (*cache.glob(".tmp-*"), *cache.glob("*/.tmp-*")):
            shutil.rmtree(path)
        build(source, cache, oracle, format=form, rows_per_shard=4)
        before.update(digests(cache))

    elsewhere(moment, finish)
    assert build(source, cache, oracle, format=form, rows_per_shard=4).samples == 6
    assert digests(cache) == before


def test_one_that_was_suspended_while_it_finished_names_nothing_that_is_gone(
    source: Path, oracle: Path, tmp_path: Path, elsewhere: Callable[[str, Callable[[], None]], None]
) -> None:
    cache = tmp_path / "cache"

    def finish() -> None:
        (cache / TURN).unlink()
        build(copy_pictures(oracle, tmp_path / "fewer", 3), cache, oracle)

    elsewhere("kcache.build.finish.write_manifest", finish)
    assert build(source, cache, oracle).samples == 6
    assert not verify_cache(cache).corrupt


def test_a_shard_that_another_committed_first_stays(source: Path, oracle: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    build(source, cache, oracle, rows_per_shard=4)
    before = digests(cache)
    for recipe in Cache.open(cache).recipes.values():
        first = read_commits(cache / recipe.directory, recipe)[0]
        block = RowBlock(keys=np.zeros((1, 16), np.uint8), arrays={})
        assert commit_shard(cache / recipe.directory, first.name, recipe, block, provenance={}) == first
    assert digests(cache) == before


def test_of_what_others_committed_no_claim_is_held(planned: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each claim is a request or more in a bucket, and so is each renewal of one that is held."""
    cache, claims = planned
    plan, taken, take = open_plan(cache), list[str](), kcache.build.claims.take
    assert plan is not None
    table = plan.tables[0]
    first, second = table.shards
    (cache / table.recipe.directory).mkdir()
    (cache / table.recipe.directory / f"{first.name}.json").write_bytes(b"")

    def counted(claim: Path, *arguments: Any) -> Any:
        taken.append(claim.name)
        return take(claim, *arguments)

    monkeypatch.setattr("kcache.build.builder.take", counted)
    own = kcache.build.builder.Claims(cache, plan, kcache.build.claims.Patience(say=lambda _: None))
    progress = kcache.build.work.progress.ShardProgress("", 0, None)
    assert list(own.claimed(table, table.shards, progress)) == [second]
    own.settled(table, second)
    (cache / table.recipe.directory / f"{second.name}.json").write_bytes(b"")  # since it was last looked
    assert list(own.claimed(table, table.shards, progress)) == []
    assert taken == [f"{table.recipe.table}-{second.name}"] * 2
    assert list(claims.iterdir()) == []


@pytest.mark.parametrize(("rows", "told"), [(4, 0), (None, 0), (3, 1)])
def test_that_an_open_plan_has_shards_of_another_size_is_said(
    source: Path, oracle: Path, planned: tuple[Path, Path], rows: int | None, told: int
) -> None:
    said: list[str] = []
    build_cache(str(source), str(planned[0]), small_config(oracle, rows_per_shard=rows), say=said.append)
    assert sum("is finished first, in shards of the size that it was begun with" in message for message in said) == told


def test_what_the_dead_left_behind_is_taken_over(
    source: Path, oracle: Path, planned: tuple[Path, Path], tmp_path: Path
) -> None:
    cache, claims = planned
    gone = asdict(replace(this_process(), started="1"))
    for claim in (claims / "text-00001", claims / "image_embeds-00000", cache / TURN):
        write_json(claim, gone)
    build(source, cache, oracle, rows_per_shard=4)
    build(source, tmp_path / "alone", oracle, rows_per_shard=4)
    assert digests(cache) == digests(tmp_path / "alone")


def test_a_builder_begins_with_the_shards_of_its_number(
    source: Path, oracle: Path, planned: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    commit = kcache.build.encode.commit_shard

    def spy(folder: Path, name: str, *arguments: Any, **named: Any) -> Commit:
        order.append(name)
        return commit(folder, name, *arguments, **named)

    monkeypatch.setattr(kcache.build.encode, "commit_shard", spy)
    build(source, planned[0], oracle, rows_per_shard=4, worker="1/2")
    assert order == ["00001", "00000"] * 3


def test_a_build_of_something_else_beside_a_running_one_is_refused(
    source: Path, oracle: Path, planned: tuple[Path, Path], tmp_path: Path
) -> None:
    cache, claims = planned
    claimed_elsewhere(claims, "text-00000")
    with pytest.raises(CacheBusyError, match=r"being built with other settings by process .*, in 15 min .*--take-over"):
        build(source, cache, oracle, dtype="float16")
    fewer = copy_pictures(oracle, tmp_path / "fewer", 2)
    with pytest.raises(CacheBusyError, match="being built from another source by process"):
        build(fewer, cache, oracle)
    assert build(fewer, cache, oracle, take_over=True).samples == 2


@pytest.mark.timeout(60)
def test_tars_of_other_pictures_are_not_joined(
    source: Path, oracle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who knows only some of the planned samples would record the others as gone."""
    cache, settings = tmp_path / "cache", {"format": "webdataset", "rows_per_shard": 4, "replace": True}

    class Stopped(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr("kcache.build.builder.TarWriter.write", stop)
        with pytest.raises(Stopped):
            build(source, cache, oracle, **settings)
    plan, fewer = open_plan(cache), copy_pictures(oracle, tmp_path / "fewer", 2)
    assert plan is not None
    claimed_elsewhere(claims_folder(cache, plan), "samples-00001")
    with pytest.raises(CacheBusyError, match="being built from another source by process"):
        build(fewer, cache, oracle, **settings)
    assert read_commits(cache / plan.tables[-1].recipe.directory, plan.tables[-1].recipe) == []
    (claims_folder(cache, plan) / "samples-00001").unlink()
    assert build(source, cache, oracle, **settings).samples == 6
    build(source, tmp_path / "alone", oracle, **settings)
    assert digests(cache) == digests(tmp_path / "alone")


def test_a_claim_is_let_go_when_its_shard_is_committed(planned: tuple[Path, Path]) -> None:
    cache, folder = planned
    plan = open_plan(cache)
    assert plan is not None
    claims, table = kcache.build.builder.Claims(cache, plan, Patience(say=print)), plan.tables[0]
    mine = claims.claimed(table, table.shards, kcache.build.work.progress.ShardProgress("", 9, None))
    first, second = next(mine), next(mine)
    assert claims.kept(table, first)
    assert claims.kept(table, second)  # asked once the first is committed
    assert [path.name for path in folder.iterdir()] == [claims.path(table, second).name]
    claims.release()
    assert list(folder.iterdir()) == []
