"""Training on pictures of several shapes, at two resolutions and mirrored: online, interrupted, in other processes."""

from pathlib import Path
from typing import Any

import pytest
from bucketed_builds import bucketed_source, build_bucketed
from short_runs import assert_equal_weights, config, course

from kcache.errors import CacheMismatchError
from kcache.store.cache import Cache
from kcache.store.run_directory import read_config, read_metrics, read_validation
from kcache.training.trainer import Progress, train

BOTH: dict[str, Any] = {"resolution": (32, 64), "aspect_ratio_buckets": None, "shuffle": "stream"}
"""Squares at 32 pixels, five shapes at 64."""


class Killed(BaseException):
    pass


def kill_at(step: int) -> Any:
    def report(progress: Progress) -> None:
        if progress.step >= step:
            raise Killed

    return report


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bucketed_source(tmp_path_factory.mktemp("shaped") / "pictures")


@pytest.fixture(scope="module")
def path(source: Path, oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shaped") / "cache"
    build_bucketed(source, folder, oracle)
    return folder


@pytest.fixture(scope="module")
def tars(source: Path, oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shaped") / "tars"
    build_bucketed(source, folder, oracle, format="webdataset")
    return folder


def test_thirty_steps_are_those_of_the_encoders_in_the_loop(
    source: Path, path: Path, tars: Path, tmp_path: Path
) -> None:
    """From either form and every residency: mirrored pictures, five shapes, two resolutions, images left out."""
    settings = {**BOTH, "max_train_steps": 30, "image_dropout": 0.2, "gradient_accumulation_steps": 1}
    train(path, config(tmp_path / "online", "decoder", online=str(source), **settings))
    for name, cache, residency in (("mmap", path, "mmap"), ("stream", tars, "stream"), ("ram", tars, "ram")):
        train(cache, config(tmp_path / name, "decoder", residency=residency, **settings))
        assert course(tmp_path / name) == course(tmp_path / "online")
        assert_equal_weights(tmp_path / name, tmp_path / "online", "decoder")
    train(path, config(tmp_path / "plain", "decoder", flip=False, **settings))
    assert course(tmp_path / "plain") != course(tmp_path / "online")


def test_the_prior_takes_mirrored_pictures_only_when_it_is_asked_to(source: Path, path: Path, tmp_path: Path) -> None:
    train(path, config(tmp_path / "unasked"))
    train(path, config(tmp_path / "without", flip=False))
    train(path, config(tmp_path / "mirrored", flip=True))
    train(path, config(tmp_path / "online", flip=True, online=str(source)))
    assert course(tmp_path / "unasked") == course(tmp_path / "without") != course(tmp_path / "mirrored")
    assert course(tmp_path / "online") == course(tmp_path / "mirrored")


def test_an_interrupted_run_goes_on_bit_for_bit(path: Path, tmp_path: Path) -> None:
    """Interrupted at every other step; and with other rows of mirrored pictures it does not."""
    settings = {**BOTH, "max_train_steps": 11, "checkpointing_steps": 1}
    train(path, config(tmp_path / "whole", "decoder", **settings))
    for step in (1, 3, 5, 7, 9):
        with pytest.raises(Killed):
            train(
                path,
                config(tmp_path / "parts", "decoder", resume_from_checkpoint="latest", **settings),
                report=kill_at(step),
            )
    going_on = config(tmp_path / "parts", "decoder", resume_from_checkpoint="latest", **settings)
    plain = config(tmp_path / "parts", "decoder", resume_from_checkpoint="latest", flip=False, **settings)
    with pytest.raises(CacheMismatchError, match="flip"):
        train(path, plain)
    train(path, going_on)
    assert course(tmp_path / "parts") == course(tmp_path / "whole")
    assert_equal_weights(tmp_path / "parts", tmp_path / "whole", "decoder")


def test_epochs_are_counted_in_passes_and_what_there_is_of_shapes_is_said(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Three epochs of twelve pictures, each pass of one."""
    opened = Cache.open(path, 64)
    parts = [len(part) for part in opened.by_shape("latents")]
    assert sum(parts) == len(opened) == 12
    result = train(path, config(
        tmp_path, "decoder", resolution=(64,), train_batch_size=1, gradient_accumulation_steps=1, max_train_steps=None,
        num_train_epochs=3,
    ))  # fmt: skip
    assert result.step == 36
    assert len(read_metrics(tmp_path)) == 36
    told = read_config(tmp_path)
    assert [each["samples"] for each in told["shapes"]] == parts
    assert told["mirrored"] is True
    assert "32 high, 96 wide: " in caplog.text
    assert "mirrored picture" in caplog.text
    card = (tmp_path / "README.md").read_text()
    assert "32x96, 48x80, 64x64, 80x48, 96x32" in card
    assert "36 of up to 1 samples each" in card


def test_held_out_pictures_are_looked_at_in_each_of_their_shapes(path: Path, tmp_path: Path) -> None:
    train(path, config(tmp_path, "decoder", val_fraction=0.3, **BOTH))
    [entry] = read_validation(tmp_path)
    assert {"val_loss", "val_loss_32px", "val_loss_64px"} <= entry.keys()
    assert min(entry["val_loss_32px"], entry["val_loss_64px"]) <= entry["val_loss"]
    assert entry["val_loss"] <= max(entry["val_loss_32px"], entry["val_loss_64px"])
