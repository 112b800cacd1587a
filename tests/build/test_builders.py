"""Several builders of one cache: who takes which shard, who waits for whom, and what the dead leave behind."""

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from small_builds import build, copy_pictures, digests, encoded, small_config

import kcache.build.encode
from kcache.build.build import build_cache
from kcache.build.claims import TURN
from kcache.build.plan import claims_folder, freeze_plan
from kcache.build.survey import missing_rows, survey
from kcache.durable import write_json
from kcache.errors import CacheBusyError
from kcache.processes import this_process
from kcache.store.shards import Commit


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


def test_what_another_machine_has_claimed_is_left_to_it(source: Path, oracle: Path, planned: tuple[Path, Path]) -> None:
    cache, claims = planned
    write_json(claims / "text-00001", asdict(replace(this_process(), host="elsewhere")))
    with pytest.raises(CacheBusyError, match=r"text-00001 is held by process \d+ on elsewhere"):
        build(source, cache, oracle, rows_per_shard=4)
    assert not list(cache.glob("text-*/00001*"))
    assert len(list(cache.glob("*/0*.json"))) == 5  # everything else is done
    assert [claim.name for claim in claims.iterdir()] == ["text-00001"]
    (claims / "text-00001").unlink()
    assert encoded(build(source, cache, oracle, rows_per_shard=4)) == {"text": 3}


def test_one_of_several_waits_for_another_machine_and_names_it(
    source: Path, oracle: Path, planned: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, claims = planned
    write_json(claims / "text-00001", asdict(replace(this_process(), host="elsewhere")))
    monkeypatch.setattr("kcache.build.claims.QUIET_SECONDS", 0.0)
    said: list[str] = []

    def listen(message: str) -> None:
        if message.startswith("waiting"):
            said.append(message)
            (claims / "text-00001").unlink()

    config = small_config(oracle, rows_per_shard=4, worker="0/2")
    assert build_cache(str(source), str(cache), config, say=listen).samples == 6
    assert said == [f"waiting for process {os.getpid()} on elsewhere, which holds {claims / 'text-00001'}"]


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
    write_json(claims / "text-00000", asdict(replace(this_process(), host="elsewhere")))
    with pytest.raises(CacheBusyError, match="being built with other settings by process"):
        build(source, cache, oracle, dtype="float16")
    fewer = copy_pictures(oracle, tmp_path / "fewer", 2)
    with pytest.raises(CacheBusyError, match="being built from another source by process"):
        build(fewer, cache, oracle)
