"""Where a run may write: not over a run, a cache or a folder of pictures, and beside anything else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from short_runs import config

import kcache.training.trainer
from kcache.encoders.repositories import COMPONENTS
from kcache.errors import CacheBusyError, RunError
from kcache.store.run_directory import RESULT, read_starts
from kcache.training.resume import _RESULT, check_output_dir
from kcache.training.trainer import train

LATEST = {"resume_from_checkpoint": "latest"}


@pytest.fixture(scope="module")
def finished(cache: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that was too short for a checkpoint."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(cache, config(folder, max_train_steps=1, use_ema=True))
    return folder


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_earlier_run_is_gone_on_with_or_left_alone(
    cache: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kcache.training.trainer, "prepare_run", lambda *_: pytest.fail("loaded"))
    before, elsewhere = contents(finished), tmp_path / "checkpoint-2"
    elsewhere.mkdir()
    for resume in (None, str(elsewhere)):
        with pytest.raises(RunError, match=r"holds checkpoint-1 of an earlier run") as refused:
            train(cache, config(finished, resume_from_checkpoint=resume))
        for answer in ("another --output-dir", "--resume-from-checkpoint latest"):
            assert answer in str(refused.value)
    assert contents(finished) == before
    check_output_dir(config(finished, **LATEST))


def test_a_run_leaves_only_what_is_known_to_be_a_result(finished: Path) -> None:
    others = {"config.json", "metrics.jsonl", "validation.jsonl", "starts.jsonl", "checkpoint-1"}
    assert {path.name for path in finished.iterdir()} - others <= set(_RESULT)
    assert {*RESULT, *COMPONENTS} <= set(_RESULT)


@pytest.mark.parametrize(("metrics", "result"), [("", ["README.md"]), ('{"step": 1}\n', [])])
def test_steps_without_a_result_are_a_run_and_so_is_a_result_without_steps(
    tmp_path: Path, metrics: str, result: list[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text(metrics)
    for name in result:
        (tmp_path / name).touch()
    with pytest.raises(RunError, match="of an earlier run, and no checkpoint"):
        check_output_dir(config(tmp_path))


def in_a_cache(folder: Path) -> Path:
    folder.mkdir()
    (folder / "manifest.json").touch()
    return folder


def in_an_unfinished_cache(folder: Path) -> Path:
    (folder / "plans").mkdir(parents=True)
    return folder


def among_pictures(folder: Path) -> Path:
    folder.mkdir()
    (folder / "0001.JPG").touch()
    return folder


def above_a_run(folder: Path) -> Path:
    (folder / "prior").mkdir(parents=True)
    return folder


def in_a_network(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").touch()
    return folder


def at_a_file(folder: Path) -> Path:
    folder.touch()
    return folder


def below_a_file(folder: Path) -> Path:
    folder.touch()
    return folder / "runs" / "prior"


def at_a_broken_link(folder: Path) -> Path:
    folder.symlink_to("nowhere")
    return folder


@pytest.mark.parametrize("resume", [None, "latest"])
@pytest.mark.parametrize(
    ("place", "answer"),
    [
        (in_a_cache, "place is a cache, with which"),
        (in_an_unfinished_cache, "place is a cache, with which"),
        (among_pictures, "place is a source of pictures, with which"),
        (above_a_run, "place holds prior, which a run would replace"),
        (in_a_network, r"place holds config\.json, which a run would replace"),
        (at_a_file, "place is a file; expected a folder"),
        (below_a_file, "place is a file; expected a folder"),
        (at_a_broken_link, "place is a broken link; expected a folder"),
    ],
)
def test_what_a_run_would_spoil_is_refused(
    tmp_path: Path, place: Callable[[Path], Path], answer: str, resume: str | None
) -> None:
    with pytest.raises(RunError, match=answer):
        check_output_dir(config(place(tmp_path / "place"), resume_from_checkpoint=resume))


def test_a_run_in_a_cache_is_refused_though_it_was_begun(tmp_path: Path) -> None:
    (in_a_cache(tmp_path / "cache") / "metrics.jsonl").touch()
    with pytest.raises(RunError, match="is a cache"):
        check_output_dir(config(tmp_path / "cache", **LATEST))


def test_what_no_run_touches_may_be_there(tmp_path: Path) -> None:
    check_output_dir(config(tmp_path))
    check_output_dir(config(tmp_path / "none" / "yet"))
    for name in ("train.log", "slurm-17.out", "logs/events", "wandb/run", "run.toml", "run.sh", "notes.md", ".x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    check_output_dir(config(tmp_path))
    check_output_dir(config(tmp_path, **LATEST))


def test_a_start_that_ended_before_its_first_step_is_in_no_ones_way(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(kcache.training.trainer, "take_step", crash)
    for _ in range(2):
        with pytest.raises(MemoryError):
            train(cache, config(tmp_path))
    assert len(read_starts(tmp_path)) == 2


def test_a_run_that_still_goes_on_is_not_to_be_removed(cache: str, tmp_path: Path) -> None:
    refused = []

    def report(_: object) -> None:
        for resume in (None, "latest"):
            with pytest.raises(CacheBusyError, match="another process") as error:
                train(cache, config(tmp_path, resume_from_checkpoint=resume))
            refused.append(error)

    train(cache, config(tmp_path, max_train_steps=1), report=report)
    assert len(refused) == 2
