"""Training from rows that are streamed is training from rows in memory: out of a bucket, and after an interruption."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from in_bucket import put
from short_runs import STAGES, assert_equal_weights, config, course

from kcache.errors import ConfigError, RunError
from kcache.report.run import report_run
from kcache.store.run_directory import read_metrics
from kcache.training.log import Progress
from kcache.training.trainer import train


@pytest.mark.parametrize("stage", STAGES)
def test_a_bucket_a_disk_and_memory_give_the_same_losses(stage: str, cache: str, bucket: str, tmp_path: Path) -> None:
    put(Path(cache), bucket)
    dropout = {"caption_dropout": 0.3} if stage == "prior" else {"image_dropout": 0.3}

    def run(name: str, path: str, **settings: Any) -> Path:
        shared = {"shuffle": "stream", "max_train_steps": 3, **dropout, **settings}
        train(path, config(tmp_path / name, stage, **shared))
        return tmp_path / name

    expected = run("memory", cache, residency="ram")
    waits = {f"wait_{name}" for name in ("store", "verification", "copying")}
    assert not waits & read_metrics(expected)[-1].keys()
    for name, path in {"disk": cache, "bucket": bucket}.items():
        streamed = run(name, path, residency="stream")
        assert course(streamed) == course(expected)
        assert_equal_weights(streamed, expected, stage)
        assert waits <= read_metrics(streamed)[-1].keys()
    run("half", bucket, residency="stream", max_train_steps=2)
    again = run("half", cache, residency="stream", resume_from_checkpoint="latest")
    assert course(again) == course(expected)
    assert_equal_weights(again, expected, stage)
    with pytest.raises(RunError, match="shuffle: stream → full"):
        run("half", cache, shuffle="full", max_train_steps=4, resume_from_checkpoint="latest")


def test_what_was_waited_for_is_told(cache: str, tmp_path: Path) -> None:
    told: list[Mapping[str, float]] = []

    def report(progress: Progress) -> None:
        told.append(progress.waits)

    train(cache, config(tmp_path / "run", shuffle="stream", residency="stream"), report)
    assert [waits.keys() for waits in told] == [{"store", "verification", "copying"}] * len(told)
    assert all(0 <= share <= 1 for waits in told for share in waits.values())
    page = report_run(tmp_path / "run").read_text()
    for row in ("Of that, for the store", "Of that, for verification", "Of that, for copying"):
        assert row in page


def test_what_streaming_needs_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--residency stream with --shuffle full.*give --shuffle stream"):
        config(tmp_path, residency="stream")
    with pytest.raises(ConfigError, match="--stage-bytes changes nothing without --shuffle"):
        config(tmp_path, stage_bytes=10**9)
