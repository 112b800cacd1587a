"""The plan of a sweep: read strictly, and refused where runs could not be compared or would overwrite each other."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kcache.config import TrainConfig
from kcache.config.sweep import plan_sweep
from kcache.errors import ConfigError

TWO = '[[run]]\nname = "slow"\nlearning_rate = 1e-5\n[[run]]\nname = "fast"\nlearning-rate = 1e-3\nseed = 7\n'


def config(folder: Path, **settings: Any) -> TrainConfig:
    return TrainConfig(stage="prior", output_dir=str(folder / "sweep"), **settings)


def write(folder: Path, text: str) -> Path:
    (folder / "sweep.toml").write_text(text)
    return folder / "sweep.toml"


def test_runs_are_the_flags_with_what_their_tables_change(tmp_path: Path) -> None:
    given = config(tmp_path, seed=3, resume_from_checkpoint="latest")
    slow, fast = plan_sweep(write(tmp_path, TWO), given)
    assert slow.settings == {"learning_rate": 1e-5}
    assert slow.config == replace(given, learning_rate=1e-5, output_dir=str(tmp_path / "sweep" / "slow"))
    assert (fast.config.learning_rate, fast.config.seed) == (1e-3, 7)
    (whole,) = plan_sweep(write(tmp_path, '[[run]]\nname = "whole"\nlearning_rate = 1\n'), given)
    assert isinstance(whole.config.learning_rate, float)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", "has no runs"),
        ("run = 3", "has no runs"),
        ("seed = 1\n" + TWO, "has seed; expected"),
        ("[[run]]\nseed = 1", "run 1 has the name None"),
        ('[[run]]\nname = "../up"', r"run 1 has the name '\.\./up'"),
        (TWO + '[[run]]\nname = "slow"', "several runs have the name 'slow'"),
        ('[[run]]\nname = "a"\nresolution = 512', "run 'a': runs of one sweep cannot differ in resolution"),
        ('[[run]]\nname = "a"\noutput-dir = "b"', "cannot differ in output-dir"),
        ('[[run]]\nname = "a"\nlearning_rat = 1', "run 'a': 'learning_rat' is no setting"),
        ('[[run]]\nname = "a"\nseed = "1"', "run 'a': seed is '1'; expected a whole number"),
        ('[[run]]\nname = "a"\nseed = -1', "run 'a': --seed is -1"),
        ('[[run]]\nname = "a"\nimage_dropout = 0.1', "run 'a': --image-dropout is for the decoder"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(tmp_path: Path, text: str, answer: str) -> None:
    with pytest.raises(ConfigError, match=answer):
        plan_sweep(write(tmp_path, text), config(tmp_path))


def test_a_sweep_that_is_not_there_is_answered_with_one_that_can_be_typed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .*rates\.toml") as refused:
        plan_sweep(tmp_path / "rates.toml", config(tmp_path))
    lines = [line for line in str(refused.value).splitlines() if line.startswith("  ")]
    (run,) = plan_sweep(write(tmp_path, "\n".join(lines)), config(tmp_path))
    assert (run.name, run.settings) == ("slow", {"learning_rate": 1e-5})


def test_runs_do_not_overwrite_each_other_on_the_hub(tmp_path: Path) -> None:
    given = config(tmp_path, push_to_hub=True, hub_model_id="me/fox")
    with pytest.raises(ConfigError, match="several runs have the hub_model_id 'me/fox'"):
        plan_sweep(write(tmp_path, TWO), given)
    plan_sweep(write(tmp_path, TWO), replace(given, hub_model_id=None))


def test_every_run_has_its_own_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave it out"):
        plan_sweep(write(tmp_path, TWO), config(tmp_path, resume_from_checkpoint="runs/a/checkpoint-3"))
