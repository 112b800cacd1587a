"""Training from rows that are streamed is training from rows in memory: out of a bucket, and after an interruption."""

import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from faulty_s3 import Faults
from in_bucket import put
from short_runs import STAGES, assert_equal_weights, config, course

from kcache.errors import ConfigError, RunError
from kcache.loader import CacheLoader
from kcache.report.page import Table
from kcache.report.run import read_run, run_sections
from kcache.store.run_directory import read_metrics
from kcache.training.trainer import train
from kcache.training.validation import Validation


@pytest.mark.parametrize("stage", STAGES)
def test_a_bucket_its_copies_and_memory_give_the_same_losses(
    stage: str, cache: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(Path(cache), bucket)
    dropout = {"caption_dropout": 0.3} if stage == "prior" else {"image_dropout": 0.3}
    expected, streamed = tmp_path / "memory", tmp_path / "bucket"
    told: list[Mapping[str, float]] = []
    for run_dir, path, residency in ((expected, cache, "ram"), (streamed, bucket, "stream")):
        settings = {"shuffle": "stream", "residency": residency, "max_train_steps": 2, **dropout}
        train(path, config(run_dir, stage, **settings), report=lambda progress: told.append(progress.waits))
    monkeypatch.setattr("kcache.loader.residency.free_memory", lambda: 0)
    settings = {"shuffle": "stream", "stage_dir": str(tmp_path / "copies"), "max_train_steps": 2, **dropout}
    train(bucket, config(tmp_path / "copied", stage, **settings))
    assert course(tmp_path / "copied") == course(expected)
    assert len(list((tmp_path / "copies").glob("*/*"))) == 2  # shards
    assert course(streamed) == course(expected)
    assert_equal_weights(streamed, expected, stage)
    assert told[0] == {}
    assert told[-1].keys() == {"store", "verification", "copying"}
    assert all(0 <= share <= 1 for share in told[-1].values())
    assert {"wait_store", "wait_verification", "wait_copying"} <= read_metrics(streamed)[-1].keys()
    assert waits_reported(streamed) == ["the store", "verification", "copying"]
    assert waits_reported(expected) == []


def waits_reported(run_dir: Path) -> list[str]:
    tables = [block for section in run_sections(read_run(run_dir)) for block in section.blocks]
    rows = [row[0] for block in tables if isinstance(block, Table) for row in block.rows]
    return [name.removeprefix("Of that, for ") for name in rows if name.startswith("Of that, for ")]


def test_a_run_goes_on_as_if_it_had_not_ended(cache: str, tmp_path: Path) -> None:
    def run(name: str, **settings: Any) -> Path:
        train(cache, config(tmp_path / name, **({"shuffle": "stream", "residency": "stream"} | settings)))
        return tmp_path / name

    run("half", max_train_steps=2)
    again = run("half", max_train_steps=3, resume_from_checkpoint="latest", residency="mmap")
    assert course(again) == course(run("whole", max_train_steps=3))
    with pytest.raises(RunError, match="shuffle: stream → full"):
        run("half", shuffle="full", residency="auto", max_train_steps=4, resume_from_checkpoint="latest")


def test_a_new_order_of_other_samples_is_streamed_as_it_is_read_from_memory(cache: str, tmp_path: Path) -> None:
    for residency in ("ram", "stream"):
        wishes = {"output_dir": tmp_path / residency, "shuffle": "stream", "residency": residency}
        train(cache, config(**wishes, where="tokens <= 10", max_train_steps=2))
        again = {"resume_from_checkpoint": "latest", "new_order": True, "max_train_steps": 6}
        train(cache, config(**wishes, **again, where="tokens > 7"))
    assert course(tmp_path / "stream") == course(tmp_path / "ram")
    assert_equal_weights(tmp_path / "stream", tmp_path / "ram", "prior")


def test_what_streaming_needs_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--residency stream with --shuffle full.*give --shuffle stream"):
        config(tmp_path, residency="stream")
    with pytest.raises(ConfigError, match="--stage-bytes changes nothing without --shuffle or --stage-dir"):
        config(tmp_path, stage_bytes=10**9)
    with pytest.raises(ConfigError, match=r"--stage-dir /fast with --residency ram: it is where"):
        config(tmp_path, stage_dir="/fast", residency="ram")
    with pytest.raises(ConfigError, match=r"--stage-dir /fast with --online: it is where"):
        config(tmp_path, stage_dir="/fast", online="photos")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_whoever_waits_for_rows_that_do_not_come_is_stopped_all_the_same(
    cache: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: signal.Signals,
) -> None:
    """In the middle of the third step: the second is kept, and the batch that had come for the third is taken again."""
    monkeypatch.setattr("kcache.loader.batches.POLL_SECONDS", 0.01)
    monkeypatch.setattr("kcache.stopping.LAST_WORD_SECONDS", 0.01)
    silence, fill, hand_over = threading.Event(), CacheLoader._fill, CacheLoader._hand_over

    def hang(self: CacheLoader, part: Any, share: Any, *others: Any) -> Any:
        return silence.wait() if share.turns[0] == 10 else fill(self, part, share, *others)

    def end(self: CacheLoader, filling: Any, part: Any, weight: float, after: Any) -> Any:
        if after.turn == 12:
            os.kill(os.getpid(), number)
        return hand_over(self, filling, part, weight, after)

    with monkeypatch.context() as patch:
        patch.setattr(CacheLoader, "_fill", hang)
        patch.setattr(CacheLoader, "_hand_over", end)
        with pytest.raises(SystemExit) as ended:
            train(cache, config(tmp_path / "run"))
    silence.set()
    assert ended.value.code == 128 + number
    assert f"stopped by {number.name}; go on with" in caplog.text
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert [entry["step"] for entry in read_metrics(tmp_path / "run")] == [1, 2]
    train(cache, config(tmp_path / "run", resume_from_checkpoint="latest"))
    train(cache, config(tmp_path / "whole"))
    assert course(tmp_path / "run") == course(tmp_path / "whole")


@pytest.mark.timeout(60)
def test_whoever_validates_on_rows_that_do_not_come_is_stopped_all_the_same(
    cache: str, faulty: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kcache.training.validation.POLL_SECONDS", 0.01)
    monkeypatch.setattr("kcache.stopping.LAST_WORD_SECONDS", 0.01)
    faulty.stall_seconds, totals = 600, Validation.totals
    put(Path(cache), faulty.url)

    def silent(self: Validation) -> Any:
        faulty.rates = {"stall": 1}
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        return totals(self)

    monkeypatch.setattr(Validation, "totals", silent)
    streaming = {"shuffle": "stream", "residency": "stream", "val_fraction": 0.3, "validation_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        train(faulty.url, config(tmp_path, max_train_steps=3, **streaming))
    assert faulty.happened["stall"] > 0
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    # What hangs is no thread that the program waits for at its end.
    assert [
        thread for thread in threading.enumerate() if thread.name.startswith("kcache-fetch") and not thread.daemon
    ] == []
