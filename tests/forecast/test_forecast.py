"""What a run will take is said from configurations and indexes; what a run refuses is refused."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from short_runs import config

from kcache import Cache
from kcache.config import TrainConfig
from kcache.errors import KcacheError
from kcache.forecast import Forecast, advice, forecast_run
from kcache.forecast.advice import least_change
from kcache.forecast.largest import largest_batch
from kcache.forecast.rehearsal import empty_network
from kcache.training import train
from kcache.training.setup import prepare_run


@pytest.fixture(scope="module")
def unread(cache: str, oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """The cache and its prior, all rows and weights of which are empty files."""
    folder = tmp_path_factory.mktemp("unread")
    shutil.copytree(cache, folder / "cache")
    shutil.copytree(oracle / "prior", folder / "prior")
    rows = [path for path in (folder / "cache").glob("*/*/**/*") if path.is_file() and path.suffix != ".json"]
    for path in [*rows, *(folder / "prior").rglob("*.safetensors")]:
        path.write_bytes(b"")
    return str(folder / "cache"), {"pretrained_prior_model_name_or_path": str(folder / "prior")}


@pytest.fixture(scope="module")
def said(unread: tuple[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Forecast]:
    """What is said of a run of the prior with some settings; each is asked for once."""
    known: dict[str, Forecast] = {}

    def said(**settings: Any) -> Forecast:
        if (key := repr(sorted(settings.items()))) not in known:
            run = config(tmp_path_factory.mktemp("runs") / "run", **(unread[1] | settings))
            known[key] = forecast_run(unread[0], run)
            assert not Path(run.output_dir).exists()
        return known[key]

    return said


def test_neither_weights_nor_rows_are_read(said: Callable[..., Forecast], cache: str, tmp_path: Path) -> None:
    found = said()
    run = prepare_run(cache, config(tmp_path / "run"))
    assert found.learning == sum(each.numel() for each in run.learning)
    assert found.parameters == sum(each.numel() for each in run.network.parameters())
    assert found.checkpoint_bytes == sum(run.checkpoint_files.values())
    assert (found.steps, found.global_batch, found.checkpoints) == (run.max_steps, 4, 1)
    assert found.epochs == pytest.approx(4 * 4 / len(run.cache))
    assert found.row_bytes == found.memory["rows"] == run.cache.resident_bytes(tuple(run.raw_objective.row_shapes))
    assert found.peak == sum(found.memory.values())
    assert found.fits is True
    assert found.advice is found.step_seconds is None


def test_more_samples_take_more_memory_and_checkpointing_takes_less(said: Callable[..., Forecast]) -> None:
    small, large, lean = said(), said(train_batch_size=16), said(train_batch_size=16, gradient_checkpointing=True)
    adapters = said(lora_rank=2)
    assert small.peak < large.peak
    assert lean.peak <= large.peak
    assert adapters.learning < adapters.parameters
    assert adapters.memory["optimizer"] < small.memory["optimizer"]
    assert adapters.checkpoint_bytes < small.checkpoint_bytes


def test_the_largest_batch_has_captions_that_there_are(cache: str, tmp_path: Path) -> None:
    opened, run = Cache.open(cache), config(tmp_path, train_batch_size=3)
    objective = prepare_run(opened, run).raw_objective
    batch = largest_batch(objective, (opened,), run, weighted=True)
    lengths = np.diff(batch.tensors["text_offsets"].numpy())
    there = opened.read(range(len(opened)), ["text_encoder_hidden_states"])["text_offsets"]
    assert set(lengths) <= set(np.diff(there))
    assert batch.tokens == lengths.sum() == len(batch.tensors["text_encoder_hidden_states"])
    assert batch.tensors["weight"].shape == (3,)


def test_a_device_that_has_too_little_is_answered_with_flags(
    unread: tuple[str, dict[str, Any]], tmp_path: Path, said: Callable[..., Forecast], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advice, "TAKE_LESS", (("gradient_checkpointing", True),))
    run, room = config(tmp_path / "run", **unread[1]), said().peak - said().memory["rows"] - 1
    found = forecast_run(unread[0], run, device_memory=room)
    assert (found.fits, found.device) == (False, "another device")
    assert found.advice is not None
    assert found.advice.flags
    assert found.advice.peak <= room < found.peak
    nothing = forecast_run(unread[0], replace(run, train_batch_size=1), device_memory=10)
    assert (nothing.fits, nothing.advice) == (False, None)


SIZES = {"gradient_checkpointing": 30, "mixed_precision": 20, "weights": 7, "lora_rank": 15}


def taken(changed: TrainConfig) -> int:
    """Bytes that a run of these settings takes, as the tests of advice have it."""
    size = 100 + changed.train_batch_size
    return size - sum(less for name, less in SIZES.items() if getattr(changed, name) not in (False, None, "no", "fp32"))


@pytest.mark.parametrize(
    ("available", "settings", "flags"),
    [
        (104, {}, ("--gradient-checkpointing",)),
        (76, {}, ("--train-batch-size 4", "--gradient-accumulation-steps 4", "--gradient-checkpointing")),
        (58, {}, ("--gradient-checkpointing", "--mixed-precision bf16")),
        (
            50,
            {},
            (
                "--train-batch-size 4",
                "--gradient-accumulation-steps 4",
                "--gradient-checkpointing",
                "--mixed-precision bf16",
                "--weights bf16",
            ),
        ),
        (43, {}, ("--gradient-checkpointing", "--mixed-precision bf16", "--lora-rank 16")),
        (43, {"gradient_checkpointing": True, "mixed_precision": "bf16"}, ("--lora-rank 16",)),
        (20, {}, None),
        (58, {"resume_from_checkpoint": "latest"}, None),
        (85, {"resume_from_checkpoint": "latest"}, ("--gradient-checkpointing",)),
    ],
)
def test_the_least_change_comes_first(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    available: int,
    settings: dict[str, Any],
    flags: tuple[str, ...] | None,
) -> None:
    monkeypatch.setattr(advice, "_has_bitsandbytes", lambda: False)
    run = config(tmp_path, train_batch_size=8, **settings)
    found = least_change(run, available, taken)
    assert (None if found is None else found.flags) == flags
    assert found is None or found.peak <= available


@pytest.mark.parametrize(
    "settings",
    [
        {"where": "tokens > 1000"},
        {"lora_rank": 33},
        {"resume_from_checkpoint": "nowhere"},
        {"pretrained_prior_model_name_or_path": "/nowhere/prior"},
        {"output_dir": "the cache itself"},
    ],
)
def test_what_a_run_refuses_is_refused(cache: str, tmp_path: Path, settings: dict[str, Any]) -> None:
    if "output_dir" in settings:
        settings = {"output_dir": cache}
    run = replace(config(tmp_path / "run"), **settings)
    with pytest.raises(KcacheError) as refused:
        forecast_run(cache, run)
    with pytest.raises(KcacheError) as expected:
        train(cache, run)
    assert str(refused.value) == str(expected.value)


def test_a_network_is_made_of_its_configuration_alone(oracle: Path) -> None:
    network = empty_network("prior", oracle / "prior")
    assert {each.device.type for each in network.parameters()} == {"meta"}
