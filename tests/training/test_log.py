"""What a run writes down of itself: every step, once, and soon enough to see that it lives."""

import json
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.tracking import TensorBoardTracker
from short_runs import STAGES, config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import kcache.training.log
import kcache.training.run
import kcache.training.trainer
from kcache.training.trainer import Progress, train

SCALARS = {"loss", "grad_norm", "lr", "samples_per_second", "loader_wait", "peak_memory_bytes"}


def events(run_dir: Path) -> EventAccumulator:
    """What tensorboard reads from the folder of a run."""
    accumulator = EventAccumulator(str(run_dir / "logs" / "text2image-fine-tune"))
    accumulator.Reload()
    return accumulator


def reported_steps(cache: str, run_dir: Path, **settings: Any) -> list[int]:
    seen: list[Progress] = []
    train(cache, config(run_dir, **settings), report=seen.append)
    return [progress.step for progress in seen]


def test_a_run_reports_at_once_and_then_every_ten_steps(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kcache.training.log, "SLOW_SECONDS", 100.0)  # on no machine a step takes that long
    # The second is the one with which all processes learn how long the first took.
    assert reported_steps(cache, tmp_path, max_train_steps=24) == [1, 2, 10, 20, 24]
    assert [entry["step"] for entry in read(tmp_path)] == list(range(1, 25))


def test_slow_steps_are_reported_one_by_one(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kcache.training.log, "SLOW_SECONDS", 0.0)  # on every machine a step takes longer
    assert reported_steps(cache, tmp_path, max_train_steps=4) == [1, 2, 3, 4]


def read(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", STAGES)
def test_tensorboard_sees_what_metrics_hold(cache: str, tmp_path: Path, stage: str) -> None:
    train(cache, config(tmp_path, stage, report_to="tensorboard", val_fraction=0.3, validation_steps=2))
    written = events(tmp_path)
    assert set(written.Tags()["scalars"]) >= SCALARS | {"val_loss", "val_loss_t000_249"}
    losses = [(event.step, event.value) for event in written.Scalars("loss")]
    assert losses == [(entry["step"], pytest.approx(entry["loss"])) for entry in read(tmp_path)]
    assert [event.step for event in written.Scalars("val_loss")] == [2, 4]


def test_pictures_go_to_tensorboard(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kcache.report.pictures.PRIOR_STEPS", 2)
    monkeypatch.setattr("kcache.report.pictures.DECODER_STEPS", 2)
    prompts = ("a fox", "an owl")
    train(cache, config(tmp_path, report_to="all", validation_prompts=prompts, validation_steps=2))
    pictures = events(tmp_path).Images("validation")
    # Those of one step side by side, in one.
    assert [(picture.step, picture.height, picture.width) for picture in pictures] == [(2, 64, 128), (4, 64, 128)]


def test_without_a_tracker_none_writes(cache: str, tmp_path: Path) -> None:
    train(cache, config(tmp_path))
    assert not (tmp_path / "logs").exists()


def test_a_run_that_is_stopped_has_told_its_trackers(
    cache: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = []

    def finish(self: TensorBoardTracker, real: Any = TensorBoardTracker.finish) -> None:
        finished.append(self.name)
        real(self)

    monkeypatch.setattr(TensorBoardTracker, "finish", finish)

    def report(progress: Progress) -> None:
        if progress.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit), caplog.at_level(logging.WARNING):
        train(cache, config(tmp_path, report_to="tensorboard", max_train_steps=40), report=report)
    assert finished == ["tensorboard"]
    assert [event.step for event in events(tmp_path).Scalars("loss")] == [entry["step"] for entry in read(tmp_path)]
    assert "go on with: --resume-from-checkpoint latest" in caplog.text


def test_speed_is_that_of_the_steps_alone(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def takes(seconds: float, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            nonlocal now
            now += seconds
            return real(*arguments)

        return wrapped

    monkeypatch.setattr(kcache.training.log, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(kcache.training.trainer, "take_step", takes(2.0, kcache.training.trainer.take_step))
    monkeypatch.setattr(kcache.training.trainer, "Evaluation", takes(100.0, kcache.training.trainer.Evaluation))
    monkeypatch.setattr(kcache.training.run, "save_checkpoint", takes(100.0, kcache.training.run.save_checkpoint))
    train(cache, config(tmp_path, max_train_steps=25, checkpointing_steps=3))
    assert [entry["samples_per_second"] for entry in read(tmp_path)] == [4 / 2.0] * 25
