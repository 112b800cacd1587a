"""Training on pictures of several shapes, at two resolutions and mirrored: online, interrupted, selected, swept.

In several processes they are trained on in `test_distributed`.
"""

import math
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from short_runs import assert_equal_weights, config, course

from kcache.errors import CacheMismatchError
from kcache.store.cache import Cache
from kcache.store.run_directory import read_config, read_starts
from kcache.training.network import objective
from kcache.training.setup import _choose_samples, prepare_run
from kcache.training.sweep import run_sweep
from kcache.training.trainer import Progress, take_step, train
from kcache.upkeep.convert import convert_cache

BOTH: dict[str, Any] = {"resolution": (32, 64), "train_batch_size": 7}
"""Squares at 32 pixels seven at a time, five shapes at 64 two at a time, of some of which samples wait for others."""
WHOLE = BOTH | {"shuffle": "stream", "image_dropout": 0.2, "max_train_steps": None, "num_train_epochs": 3}
STEPS = 13


class Killed(BaseException):
    pass


def kill_at(step: int) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        if progress.step >= step:
            raise Killed

    return report


@pytest.fixture(scope="module")
def path(bucketed: Path) -> Path:
    return bucketed / "cache"


@pytest.fixture(scope="module")
def whole(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs, whose last step reaches into a fourth."""
    run_dir = tmp_path_factory.mktemp("whole")
    assert train(path, config(run_dir, "decoder", residency="mmap", **WHOLE)).step == STEPS
    return run_dir


def test_epochs_are_counted_in_passes_and_what_there_is_of_shapes_is_told(path: Path, whole: Path) -> None:
    told = read_config(whole)
    counts = [(each["samples"], each["batch"]) for each in told["shapes"]]
    assert [samples for samples, _ in counts] == [len(part) for part in Cache.open(path, (32, 64)).by_shape("latents")]
    assert sum(samples for samples, _ in counts) == 24
    assert {batch for _, batch in counts} == {7, 2, 1}
    assert math.ceil(sum(3 * samples // batch for samples, batch in counts) / 2) == STEPS
    assert told["mirrored"] is True
    card = (whole / "README.md").read_text()
    assert "32x96, 48x80, 64x64, 80x48, 96x32" in card
    assert f"{STEPS} of up to 14 samples each" in card


def test_the_encoders_in_the_loop_and_the_other_form_streamed_learn_the_same(
    bucketed: Path, path: Path, whole: Path, tmp_path: Path
) -> None:
    convert_cache(str(path), str(tmp_path / "tars"), "webdataset", resolution=(32, 64))
    train(tmp_path / "tars", config(tmp_path / "streamed", "decoder", residency="stream", **WHOLE))
    train(path, config(tmp_path / "online", "decoder", online=str(bucketed / "source"), **WHOLE))
    for name in ("streamed", "online"):
        assert course(tmp_path / name) == course(whole)
        assert_equal_weights(tmp_path / name, whole, "decoder")


def test_an_interrupted_run_goes_on_bit_for_bit(
    path: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    going_on = config(tmp_path, "decoder", resume_from_checkpoint="latest", checkpointing_steps=2, **WHOLE)
    with pytest.raises(Killed):
        train(path, going_on, report=kill_at(6))
    train(path, going_on)
    assert course(tmp_path) == course(whole)
    assert_equal_weights(tmp_path, whole, "decoder")
    assert "32 high, 96 wide: " in caplog.text
    assert "half of the turns take the mirrored picture" in caplog.text


@pytest.mark.parametrize(
    ("stage", "flip", "mirrored"), [("prior", None, False), ("prior", True, True), ("decoder", None, True)]
)
def test_the_prior_takes_mirrored_pictures_only_when_it_is_asked_to(
    path: Path, tmp_path: Path, stage: str, flip: bool | None, mirrored: bool
) -> None:
    resolution = (64,) if stage == "decoder" else ()
    samples, _ = _choose_samples(path, config(tmp_path, stage, flip=flip, resolution=resolution))
    assert (samples.flip, len(samples)) == (mirrored, 12)


def test_the_few_samples_of_a_rare_shape_count_as_much_as_any_others(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a loss of 1 for each pass that of a single one, where two make a batch, is half."""
    run = prepare_run(path, config(tmp_path, "decoder", gradient_accumulation_steps=1, **BOTH))
    monkeypatch.setattr(run.objective, "forward", lambda *_: 1 + 0 * run.learning[0].sum())
    found = set()
    with closing(run.loader.forever()) as batches:
        for batch in islice(batches, 12):
            loss, _ = take_step(run, iter([batch]))
            found.add((batch["latents"].shape[-1], len(batch["latents"]), loss.item()))
    assert found == {(4, 7, 1.0), (8, 2, 1.0), (6, 2, 1.0), (10, 2, 1.0), (12, 1, 0.5), (4, 1, 0.5)}


def test_other_shapes_or_mirror_images_begin_a_new_order_where_it_is_asked_for(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of wide pictures at both resolutions, and then of the same ones at one, without their mirror images."""
    lying: dict[str, Any] = {"train_batch_size": 1, "where": "width > height", "max_train_steps": None}
    settings = lying | {"resume_from_checkpoint": "latest"}
    train(path, config(tmp_path, "decoder", resolution=(32, 64), **settings, num_train_epochs=1))
    with monkeypatch.context() as patch:
        patch.setattr("kcache.training.setup.load_objective", lambda *_, **__: pytest.fail("loaded"))
        for changes, found in [
            ({"resolution": (32, 64), "flip": False}, r"\(mirrored pictures before, none now\)"),
            ({"resolution": (64,)}, r"\(6 pictures of 32x32 before, 0 now\).*--new-order.*--resolution"),
            ({"resolution": (32,)}, r"\(pictures of several shapes before, of one now\)"),
            ({"resolution": (32, 64), "where": None}, r"6 samples before, 12 now"),
        ]:
            with pytest.raises(CacheMismatchError, match=found):
                train(path, config(tmp_path, "decoder", **settings | changes))
    other = settings | {"resolution": (64,), "flip": False, "num_train_epochs": 2, "gradient_accumulation_steps": 1}
    result = train(path, config(tmp_path, "decoder", **other, new_order=True))
    assert result.step == 6 + 6
    assert read_starts(tmp_path)[1]["new_order"] == {"samples": 6, "before": 6}


def test_a_sweep_trains_on_the_shapes_that_each_run_selects(path: Path, tmp_path: Path) -> None:
    runs = '[[run]]\nname = "all"\n[[run]]\nname = "lying"\nwhere = "width > height"\nseed = 3\n'
    (tmp_path / "sweep.toml").write_text(runs)
    given = config(tmp_path / "sweep", "decoder", max_train_steps=1, **BOTH)
    result = run_sweep(path, given, tmp_path / "sweep.toml")
    assert [(run.step, run.error) for run in result.runs] == [(1, None), (1, None)]
    told = {name: read_config(tmp_path / "sweep" / name)["shapes"] for name in ("all", "lying")}
    assert [sum(each["samples"] for each in shapes) for shapes in told.values()] == [24, 12]
    assert [80, 48] in [each["shape"] for each in told["all"]]
    assert [80, 48] not in [each["shape"] for each in told["lying"]]


@pytest.mark.parametrize(("resolution", "shaped"), [((32,), False), ((32, 64), True)])
def test_compiled_blocks_are_for_any_shape_where_there_are_several(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resolution: tuple[int, ...], shaped: bool
) -> None:
    found: list[bool] = []
    monkeypatch.setattr("kcache.training.setup.check_compiler", lambda device: None)
    monkeypatch.setattr(objective, "compile_blocks", lambda _, *, packed, shaped: found.append(shaped))
    prepare_run(path, config(tmp_path, "decoder", resolution=resolution, compile=True))
    assert found == [shaped]
