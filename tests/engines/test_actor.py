"""An actor without Ray: what it is given it commits as a builder does, whoever has changed what meanwhile."""

import logging
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from controlled import FLAGS, SHAPED, controlled_source
from small_builds import build, copy_pictures, digests, small_config

from kcache.build.pictures.sizes import sized
from kcache.build.plan import Plan, claims_folder, freeze_plan
from kcache.build.survey import Survey, missing_rows, survey
from kcache.engines.actor import EncodingActor
from kcache.engines.tasks import Setup, Task, task_maker
from kcache.errors import EngineError, ModelError, SourceError
from kcache.store.shards import read_commit


@pytest.fixture
def source(oracle: Path, tmp_path: Path) -> Path:
    return copy_pictures(oracle, tmp_path / "pictures")


@pytest.fixture
def planned(source: Path, oracle: Path, tmp_path: Path) -> tuple[Survey, Plan]:
    """A build of six pictures whose plan is frozen, in shards of four, and of which nothing is encoded."""
    cache = tmp_path / "cache"
    cache.mkdir()
    job = survey(str(source), cache, small_config(oracle, rows_per_shard=4), lambda _: None)
    plan = missing_rows(job, job.committed().tables, retry=False, seen={})
    freeze_plan(cache, plan)
    for table in plan.tables:
        (cache / table.recipe.directory).mkdir()
    return job, plan


@pytest.fixture
def actor_of() -> Iterator[Callable[..., EncodingActor]]:
    """Makes an actor for a build, and ends its thread."""
    made = []

    def make(planned: tuple[Survey, Plan], source: Path, **changes: Any) -> EncodingActor:
        job, plan = planned
        setup = Setup(
            source=str(source), cache=str(job.folder), plan=str(claims_folder(job.folder, plan).parent),
            config=job.config, wants=job.wants, repositories=job.repositories, need_captions=True,
            directory=str(Path.cwd()),
            threads=torch.get_num_threads(), workers=2, version=version("kcache"),
        )  # fmt: skip
        made.append(EncodingActor(replace(setup, **changes)))
        return made[-1]

    yield make
    for actor in made:
        actor.stop()


def tasks(job: Survey, plan: Plan) -> Iterator[Task]:
    for table in plan.tables:
        yield from map(task_maker(job, table.recipe), table.shards)


def record(job: Survey, task: Task) -> Path:
    return job.folder / task.recipe.directory / f"{task.shard.name}.json"


def test_what_it_commits_is_what_a_build_does_to_the_byte(
    planned: tuple[Survey, Plan], source: Path, actor_of: Callable[..., EncodingActor], oracle: Path, tmp_path: Path
) -> None:
    job, plan = planned
    actor = actor_of(planned, source)
    with ThreadPoolExecutor(2) as callers:  # as Ray calls it: the next task is there before this one is done
        looks = list(callers.map(actor.build, tasks(job, plan)))
    assert (looks[-1].table, looks[-1].done) == ("latents-64", {})
    assert looks[-1].seconds["encode"] > 0
    build(source, tmp_path / "alone", oracle, rows_per_shard=4)
    alone = {name: digest for name, digest in digests(tmp_path / "alone").items() if "/0000" in name}
    assert {name: digest for name, digest in digests(job.folder).items() if "/0000" in name} == alone


def test_what_it_commits_of_shapes_mirror_images_and_control_images_is_what_a_build_does(
    actor_of: Callable[..., EncodingActor], oracle: Path, tmp_path: Path
) -> None:
    source, cache = controlled_source(tmp_path / "controlled"), tmp_path / "cache"
    cache.mkdir()
    settings: dict[str, Any] = {**SHAPED, "hint_column": FLAGS["hint_column"][:1], "mask_column": FLAGS["mask_column"]}
    config = small_config(oracle, max_train_samples=4, **settings)
    job = sized(survey(str(source), cache, config, lambda _: None), lambda _: None)
    plan = missing_rows(job, job.committed().tables, retry=False, seen={})
    freeze_plan(cache, plan)
    for table in plan.tables:
        (cache / table.recipe.directory).mkdir()
    actor = actor_of((job, plan), source)
    for task in tasks(job, plan):
        actor.build(task)
    build(source, tmp_path / "alone", oracle, max_train_samples=4, **settings)
    alone = {name: digest for name, digest in digests(tmp_path / "alone").items() if "/0000" in name}
    assert {name: digest for name, digest in digests(cache).items() if "/0000" in name} == alone


def test_a_picture_is_found_by_its_name_where_others_came_before_it(
    planned: tuple[Survey, Plan], source: Path, actor_of: Callable[..., EncodingActor]
) -> None:
    job, plan = planned
    shutil.copyfile(source / "img_05.png", source / "a_new_one.png")
    (source / "a_new_one.txt").write_text("a picture that was not there when the build was planned")
    first = next(tasks(job, plan))
    actor_of(planned, source).build(first)
    commit = read_commit(record(job, first))
    assert (commit.rows, commit.absent) == (4, ())


def test_pictures_that_changed_or_went_since_are_absent(
    planned: tuple[Survey, Plan], source: Path, actor_of: Callable[..., EncodingActor]
) -> None:
    job, plan = planned
    shutil.copyfile(source / "img_03.png", source / "img_00.png")
    (source / "img_01.png").unlink()
    (source / "img_01.txt").unlink()
    first = next(tasks(job, plan))
    actor_of(planned, source).build(first)
    commit = read_commit(record(job, first))
    gone = {job.samples[0].image_key.hex(), job.samples[1].image_key.hex()}
    assert (commit.rows, set(commit.absent), commit.rejected) == (2, gone, ())


def test_a_machine_that_does_not_see_the_cache_says_so(
    planned: tuple[Survey, Plan], source: Path, actor_of: Callable[..., EncodingActor]
) -> None:
    job, plan = planned
    actor = actor_of(planned, source, cache="/elsewhere/cache", plan="/elsewhere/cache/plans/0123")
    with pytest.raises(
        EngineError, match=r"does not see the plan that is worked off, /elsewhere/.*; expected the cache"
    ):
        actor.build(next(tasks(job, plan)))


def test_a_machine_that_does_not_see_the_source_says_so(
    planned: tuple[Survey, Plan], source: Path, actor_of: Callable[..., EncodingActor]
) -> None:
    job, plan = planned
    actor = actor_of(planned, source / "elsewhere")
    with pytest.raises(SourceError, match="there is no file or folder"):
        actor.build(next(tasks(job, plan)))


def test_a_machine_with_another_encoder_under_the_same_path_is_refused(
    planned: tuple[Survey, Plan], source: Path, actor_of: Callable[..., EncodingActor], oracle: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    job, plan = planned
    other = shutil.copytree(oracle / "prior", tmp_path / "other")
    weights = other / "image_encoder" / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, weights, {"format": "pt"})
    prior = replace(job.repositories["prior"], path=other)
    actor = actor_of(planned, source, repositories={**job.repositories, "prior": prior})
    with pytest.raises(ModelError, match=r"is not what the build was planned with \(weights: "):
        actor.build(next(tasks(job, plan)))
    assert not list(job.folder.glob("*/0*"))


def test_another_version_is_refused_before_it_gets_anything(
    planned: tuple[Survey, Plan], source: Path, actor_of: Callable[..., EncodingActor]
) -> None:
    with pytest.raises(EngineError, match=r"kcache is .*, and 99\.0 where this was started"):
        actor_of(planned, source, version="99.0").look()


def test_one_that_is_told_to_stop_leaves_nothing_half_done(
    planned: tuple[Survey, Plan], source: Path, actor_of: Callable[..., EncodingActor], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, plan = planned
    actor = actor_of(planned, source)
    count = EncodingActor._count

    def stopped_at_the_first_batch(self: EncodingActor, inputs: int) -> None:
        self.stop()
        count(self, inputs)

    monkeypatch.setattr(EncodingActor, "_count", stopped_at_the_first_batch)
    first, second, *_ = tasks(job, plan)
    with ThreadPoolExecutor(2) as callers:
        errors = [callers.submit(actor.build, task).exception() for task in (first, second)]
    assert [type(error) for error in errors] == [EngineError, EngineError]
    assert not list(job.folder.glob("*-*/*"))  # nor anything under a temporary name


def test_what_is_worth_a_line_is_told_once(
    planned: tuple[Survey, Plan], source: Path, actor_of: Callable[..., EncodingActor]
) -> None:
    actor = actor_of(planned, source)
    logging.getLogger("kcache.store").warning("the digest memo cannot be used")
    assert actor.look().said == ("the digest memo cannot be used",)
    assert actor.look().said == ()
