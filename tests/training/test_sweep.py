"""Sweeps: planned strictly, trained over one cache, skipped when finished, compared when some fail."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from short_runs import write_run
from small_builds import build

import kcache.training.sweep
from kcache.config import TrainConfig
from kcache.errors import RunError
from kcache.store.cache import Cache
from kcache.store.run_directory import read_metrics
from kcache.training.sweep import PlannedRun, SweptRun, _read_records, _swept, comparison_table, plot_runs, run_sweep
from kcache.training.trainer import train

TWO = '[[run]]\nname = "slow"\nlearning_rate = 1e-5\n[[run]]\nname = "fast"\nlearning-rate = 1e-3\nseed = 7\n'


@pytest.fixture(scope="module")
def cache(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep") / "cache"
    build(oracle / "data", folder, oracle)
    return folder


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The caches that runs were trained from."""
    caches: list[Any] = []

    def recorded(cache: Any, config: TrainConfig, **rest: Any) -> Any:
        caches.append(cache)
        return train(cache, config, **rest)

    monkeypatch.setattr(kcache.training.sweep, "train", recorded)
    return caches


def config(folder: Path, **settings: Any) -> TrainConfig:
    defaults = {"max_train_steps": 3, "train_batch_size": 2, "report_to": "none"}
    return TrainConfig(stage="prior", output_dir=str(folder / "sweep"), **(defaults | settings))


def write(folder: Path, text: str) -> Path:
    (folder / "sweep.toml").write_text(text)
    return folder / "sweep.toml"


def test_a_sweep_does_not_go_into_a_cache(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is a cache, with which"):
        run_sweep(cache, replace(config(tmp_path), output_dir=str(cache)), write(tmp_path, TWO))


def test_a_sweep_trains_over_one_cache_compares_and_skips(
    cache: Path, tmp_path: Path, opened: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    given, path = config(tmp_path, val_fraction=0.3), write(tmp_path, TWO)
    said: list[str] = []
    progress: list[str] = []
    first = run_sweep(cache, given, path, report=lambda name, _: progress.append(name), say=said.append)

    assert isinstance(opened[0], Cache)
    assert opened[0] is opened[1]
    assert said == ["slow: learning_rate 1e-05", "fast: learning_rate 0.001, seed 7"]
    assert list(dict.fromkeys(progress)) == ["slow", "fast"]
    assert "no checkpoint" not in caplog.text
    for run in first.runs:
        metrics = read_metrics(tmp_path / "sweep" / run.name)
        assert run.step == len(metrics) == 3
        assert run.loss == pytest.approx(sum(entry["loss"] for entry in metrics) / 3)
        assert run.val_loss is not None
    assert (tmp_path / "sweep" / "sweep.md").read_text() == first.table + "\n"
    with Image.open(tmp_path / "sweep" / "sweep.png") as picture:
        assert picture.size == (1680, 600)

    said.clear()
    assert run_sweep(cache, given, path, say=said.append).runs == first.runs
    assert said == ["slow: finished before, not run again", "fast: finished before, not run again"]
    assert len(opened) == 2


def test_a_failing_run_is_reported_and_run_again(cache: Path, tmp_path: Path) -> None:
    path = write(tmp_path, '[[run]]\nname = "bad"\nlearning_rate = 1e30\n[[run]]\nname = "good"\n')
    said: list[str] = []
    first = run_sweep(cache, config(tmp_path), path, say=said.append)
    bad, good = first.runs
    assert "expected finite values" in str(bad.error)
    assert said[1].startswith("bad failed: at step ")
    assert (good.error, good.step) == (None, 3)
    assert "failed: at step" in first.table

    path.write_text('[[run]]\nname = "bad"\nlearning_rate = 1e-4\n[[run]]\nname = "good"\n')
    second = run_sweep(cache, config(tmp_path), path, say=said.append)
    assert [run.error for run in second.runs] == [None, None]
    assert said[-1] == "good: finished before, not run again"


def test_lack_of_memory_fails_a_run_and_a_mistake_of_the_program_does_not(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(error: Exception) -> Callable[..., None]:
        def train(cache: Cache, config: TrainConfig, *, report: Any) -> None:
            raise error

        return train

    path = write(tmp_path, TWO)
    monkeypatch.setattr(kcache.training.sweep, "train", failing(RuntimeError("CUDA out of memory.\n Tried")))
    result = run_sweep(cache, config(tmp_path), path)
    assert [run.error for run in result.runs] == ["memory ran out: CUDA out of memory. Tried"] * 2
    assert "|" in result.table
    monkeypatch.setattr(kcache.training.sweep, "train", failing(KeyError("a mistake")))
    with pytest.raises(KeyError):
        run_sweep(cache, config(tmp_path), path)


def test_a_finished_run_is_not_compared_under_other_settings(cache: Path, tmp_path: Path, opened: list[Any]) -> None:
    path = write(tmp_path, '[[run]]\nname = "slow"\nlearning_rate = 1e-5\n')
    run_sweep(cache, config(tmp_path), path)
    path.write_text('[[run]]\nname = "new"\n[[run]]\nname = "slow"\nlearning_rate = 2e-5\n')
    with pytest.raises(RunError, match="learning_rate: 1e-05 → 2e-05"):
        run_sweep(cache, config(tmp_path), path)
    assert len(opened) == 1

    moved = tmp_path / "moved"
    (tmp_path / "sweep").rename(moved)
    path.write_text('[[run]]\nname = "slow"\nlearning_rate = 1e-5\n')
    run_sweep(cache, replace(config(tmp_path), output_dir=str(moved)), path)
    assert len(opened) == 1
    whole = (moved / "sweep.json").read_text()
    (moved / "sweep.json").write_text(whole[:99])
    run_sweep(cache, replace(config(tmp_path), output_dir=str(moved)), path)
    assert (moved / "sweep.json").read_text() == whole
    assert len(opened) == 1
    records = json.loads((moved / "sweep.json").read_text())
    records["runs"]["slow"]["cache"] = "0" * 64
    (moved / "sweep.json").write_text(json.dumps(records))
    with pytest.raises(RunError, match="cache: 0000000000000000 → "):
        run_sweep(cache, replace(config(tmp_path), output_dir=str(moved)), path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"runs": {"slow": {}}}', '{"runs": {"slow": {"run": 3}}}', "\0" * 99])
def test_records_that_cannot_be_read_are_what_the_runs_say_of_themselves(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    for name, steps in (("half", 4), ("slow", 3)):
        run_dir = write_run(tmp_path / name, "a", "b")
        told = json.loads((run_dir / "config.json").read_text())
        (run_dir / "config.json").write_text(json.dumps(told | {"max_steps": steps}))
        (run_dir / "model_index.json").touch()
    (tmp_path / "sweep.json").write_text(text)
    records = _read_records(tmp_path / "sweep.json", ["slow", "half", "none"])
    assert records == {"slow": {"cache": None, "config": told["config"], "run": {"error": None}}}
    assert f"{tmp_path / 'sweep.json'} cannot be read" in caplog.text


def test_a_table_shows_what_differs(tmp_path: Path) -> None:
    runs = [
        SweptRun(name="a", settings={"seed": 1}, step=1000, loss=0.5, samples_per_second=12.34),
        SweptRun(name="b", settings={"where": "a|b"}, error="no\nroom"),
    ]
    assert comparison_table(runs, config(tmp_path, seed=4)).splitlines() == [
        "| run | seed | where | steps | loss (last 100) | samples/s | outcome         |",
        "| --- | ---- | ----- | ----- | --------------- | --------- | --------------- |",
        "| a   | 1    | None  | 1,000 | 0.50000         | 12.3      | finished        |",
        "| b   | 4    | a\\|b  |       |                 |           | failed: no room |",
    ]


def test_the_hole_is_compared_where_it_was_measured(tmp_path: Path) -> None:
    runs = {name: write_run(tmp_path / name, "me/base", "me/prior") for name in ("a", "b")}
    plot_runs(tmp_path / "sweep.png", runs)
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.size == (1680, 600)
    (runs["b"] / "validation.jsonl").write_text('{"step": 3, "val_loss": 0.25, "val_hole": 0.125}\n')
    plot_runs(tmp_path / "sweep.png", runs)
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.size == (2520, 600)
    planned = [PlannedRun(name=name, settings={}, config=config(tmp_path / name)) for name in runs]
    swept = [_swept(replace(run, config=replace(run.config, output_dir=str(runs[run.name])))) for run in planned]
    assert [(run.val_loss, run.val_hole) for run in swept] == [(0.25, None), (0.25, 0.125)]
    head, _, *rows = comparison_table(swept, config(tmp_path)).splitlines()
    assert head.split("|")[4:6] == [" val_loss ", " val_hole "]
    assert [row.split("|")[5].strip() for row in rows] == ["", "0.12500"]


def test_runs_that_were_not_begun_can_be_plotted(tmp_path: Path) -> None:
    plot_runs(tmp_path / "sweep.png", {"none": tmp_path / "none"})
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.size == (840, 600)
