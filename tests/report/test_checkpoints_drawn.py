"""What a run left on its way draws as its result does, or is named with what to type instead."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from short_runs import config

from kcache.encoders.repositories import PIPELINES, find_repository
from kcache.errors import ModelError
from kcache.report.sampling import sample
from kcache.training.trainer import train


@pytest.fixture(scope="module")
def base(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(oracle / "decoder", tmp_path_factory.mktemp("base") / "decoder")


@pytest.fixture(scope="module")
def runs(cache: str, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole`, of all of a decoder, and `lora`, of a prior; both with averages, and checkpoints of two steps each."""
    folder = tmp_path_factory.mktemp("runs")
    settings: dict[str, Any] = {"use_ema": True, "learning_rate": 0.01, "checkpointing_steps": 2}
    train(
        cache,
        config(folder / "whole", "decoder", **settings, pretrained_decoder_model_name_or_path=str(base)),
    )
    train(cache, config(folder / "lora", "prior", **settings, lora_rank=2))
    return folder


@pytest.fixture
def drawn(oracle: Path) -> Callable[..., np.ndarray]:
    def draw(**halves: Any) -> np.ndarray:
        both = {half: str(oracle / half) for half in ("prior", "decoder")} | halves
        steps = {"num_inference_steps": 2, "prior_num_inference_steps": 2}
        return np.asarray(sample(["a fox"], device="cpu", **both, **steps)[0])

    return draw


def test_a_checkpoint_draws_with_its_average_as_the_result_does(
    runs: Path, drawn: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    result = drawn(decoder=str(runs / "whole"))
    assert result.shape == (64, 64, 3)
    assert np.array_equal(drawn(decoder=str(runs / "whole" / "checkpoint-4")), result)
    others = [drawn(decoder=str(runs / "whole" / name)) for name in ("checkpoint-2", "raw")]
    assert not any(np.array_equal(other, result) for other in others)
    # It knows where it comes from without its run, only not how large its pictures were.
    alone = shutil.copytree(runs / "whole" / "checkpoint-4", tmp_path / "mine")
    assert np.array_equal(drawn(decoder=str(alone), height=64, width=64), result)


def test_a_checkpoint_of_adapters_does_so_too(runs: Path, drawn: Callable[..., np.ndarray]) -> None:
    pictures = [
        drawn(lora=[str(runs / "lora" / part)], height=64, width=64) for part in (".", "checkpoint-4", "checkpoint-2")
    ]
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


def test_a_base_that_moved_is_named_as_what_is_missing(
    runs: Path, base: Path, drawn: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    base.rename(base.with_name("moved"))
    try:
        with pytest.raises(ModelError, match=rf"movq is a link to {base}/movq, which is not there any more"):
            drawn(decoder=str(runs / "whole"))
        with pytest.raises(ModelError, match=rf"trained in the pipeline {base}: .* put its movq, scheduler beside"):
            drawn(decoder=str(runs / "whole" / "checkpoint-2"))
    finally:
        base.with_name("moved").rename(base)
    bare = shutil.copytree(runs / "whole" / "raw", tmp_path / "raw")
    with pytest.raises(ModelError, match="nothing tells what pipeline it was trained in"):
        drawn(decoder=str(bare))


def test_what_is_given_for_something_else_is_answered_with_what_to_type(
    runs: Path, drawn: Callable[..., np.ndarray], kcache_command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    whole, lora = runs / "whole" / "checkpoint-2", runs / "lora" / "checkpoint-2"
    for folder in (whole, runs / "whole"):
        with pytest.raises(ModelError, match=f"no adapters .*; type: --decoder {folder}$"):
            drawn(lora=[str(folder)])
    with pytest.raises(ModelError, match=f"--lora {lora}$"):
        drawn(prior=str(lora))
    for folder, flag in ((whole, "--decoder"), (lora, "--lora")):
        with pytest.raises(
            ModelError, match=rf"is a checkpoint.*{flag} {folder};.*--max-train-steps 2 --output-dir NEW"
        ):
            find_repository(str(folder), None, PIPELINES["decoder"].components)
    with pytest.raises(ModelError, match="as it was at the last step; expected a whole pipeline"):
        find_repository(str(runs / "whole" / "raw"), None, PIPELINES["decoder"].components)
    assert kcache_command("report", str(whole)) == 1
    assert (
        f"is a part of a run; expected the run's directory: kcache report {runs / 'whole'}" in capsys.readouterr().err
    )
