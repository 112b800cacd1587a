"""What a finished run leaves is what stock diffusers loads, bit for bit: whole, averaged, adapted and fused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    ModelMixin,
    PriorTransformer,
    UNet2DConditionModel,
)
from filling import MODEL, decoder_like, fills_holes
from PIL import Image
from recorded import load_objective, recorded_steps
from safetensors.torch import load_file
from short_runs import LORA_WEIGHTS, STAGES, WEIGHTS, config
from torch import Tensor

from kcache.report.drawn.halves import class_of, find_half
from kcache.report.figures import plot_run
from kcache.training.trainer import train

NAMES = {"prior": "prior", "decoder": "unet"}
CLASSES = {"prior": PriorTransformer, "decoder": UNet2DConditionModel}
LAST = "checkpoint-4"


def load_stock(folder: Path, stage: str) -> ModelMixin:
    """The network of the pipeline in `folder`, as stock diffusers loads it."""
    pipeline = KandinskyV22PriorPipeline if stage == "prior" else KandinskyV22Pipeline
    network: ModelMixin = pipeline.from_pretrained(folder).components[NAMES[stage]]
    return network


def predict(oracle: Path, stage: str, network: ModelMixin) -> Tensor:
    objective, step = load_objective(oracle, stage, packed=False).eval(), recorded_steps(oracle, stage)[0]
    objective.network = network.eval()
    with torch.no_grad():
        return objective.predict(step, step["noise"], step["timesteps"])[0]


def assert_equal(first: Any, second: Any) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("stage", STAGES)
def test_the_result_is_the_last_steps_network(cache: str, tmp_path: Path, stage: str) -> None:
    train(cache, config(tmp_path, stage, checkpointing_steps=4))
    trained = load_file(tmp_path / LAST / WEIGHTS[stage])
    assert_equal(load_stock(tmp_path, stage).state_dict(), trained)
    assert not (tmp_path / "raw").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_the_result_of_a_run_with_an_average_is_the_average(cache: str, tmp_path: Path, stage: str) -> None:
    train(cache, config(tmp_path, stage, checkpointing_steps=4, use_ema=True))
    trained, average = (load_file(tmp_path / LAST / name) for name in (WEIGHTS[stage], "ema.safetensors"))
    assert any(not torch.equal(average[name], trained[name]) for name in average)
    assert_equal(load_stock(tmp_path, stage).state_dict(), trained | average)
    raw = CLASSES[stage].from_pretrained(tmp_path / "raw" / NAMES[stage])
    assert_equal(raw.state_dict(), trained)


@pytest.mark.parametrize("use_ema", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_adapters_are_left_as_learned_and_fused_to_the_same_function(
    oracle: Path, cache: str, tmp_path: Path, stage: str, use_ema: bool
) -> None:
    # A learning rate at which few steps make a difference.
    settings = {"learning_rate": 0.05, "lora_rank": 2, "lora_alpha": 3.0, "export_pipeline": True, "use_ema": use_ema}
    train(cache, config(tmp_path, stage, checkpointing_steps=4, **settings))
    left, trained = (load_file(folder / LORA_WEIGHTS) for folder in (tmp_path, tmp_path / LAST))
    if use_ema:
        average = load_file(tmp_path / LAST / "ema.safetensors")
        assert_equal(left, {name.replace(".default.", "."): tensor for name, tensor in average.items()})
        assert_equal(load_file(tmp_path / "raw" / LORA_WEIGHTS), trained)
        assert any(not torch.equal(left[name], trained[name]) for name in trained)
    else:
        assert_equal(left, trained)
        assert not (tmp_path / "raw").exists()

    base = load_stock(oracle / stage, stage)
    before = predict(oracle, stage, base)
    base.load_lora_adapter(tmp_path, prefix=None, weight_name=LORA_WEIGHTS)
    adapted, fused = predict(oracle, stage, base), predict(oracle, stage, load_stock(tmp_path, stage))
    torch.testing.assert_close(fused, adapted, rtol=1e-5, atol=1e-5)
    assert (adapted - before).abs().max() > 1e-2
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


def test_half_precision_in_training_does_not_reach_the_fused_pipeline(oracle: Path, cache: str, tmp_path: Path) -> None:
    settings = {"lora_rank": 2, "learning_rate": 1e-9, "export_pipeline": True, "mixed_precision": "bf16"}
    train(cache, config(tmp_path, **settings))
    fused, base = load_stock(tmp_path, "prior"), load_stock(oracle / "prior", "prior")
    for name, tensor in fused.state_dict().items():
        torch.testing.assert_close(tensor, base.state_dict()[name], rtol=0, atol=1e-6)


def test_the_curves_are_drawn_whether_or_not_there_is_a_validation(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kcache.training.result.plot_run", plot_run)
    train(cache, config(tmp_path / "first", checkpointing_steps=4))
    with Image.open(tmp_path / "first" / "loss.png") as curves:
        assert curves.size == (1800, 1200)
    last = str(tmp_path / "first" / LAST)
    train(cache, config(tmp_path / "second", resume_from_checkpoint=last))
    assert not (tmp_path / "second" / "loss.png").exists()
    assert (tmp_path / "second" / WEIGHTS["prior"]).is_file()


def forget(run_dir: Path) -> None:
    """Leave a run's result, and nothing to go on from."""
    shutil.rmtree(run_dir / "checkpoint-4")


def test_a_result_takes_the_place_of_an_earlier_one(cache: str, tmp_path: Path) -> None:
    train(cache, config(tmp_path, use_ema=True, lora_rank=2))
    before = (tmp_path / LORA_WEIGHTS).read_bytes()
    forget(tmp_path)
    train(cache, config(tmp_path, use_ema=True, lora_rank=4, resume_from_checkpoint="latest"))
    assert (tmp_path / LORA_WEIGHTS).read_bytes() != before
    assert load_file(tmp_path / "raw" / LORA_WEIGHTS).keys() == load_file(tmp_path / LORA_WEIGHTS).keys()
    forget(tmp_path)
    train(cache, config(tmp_path, lora_rank=4, resume_from_checkpoint="latest"))
    assert not (tmp_path / "raw").exists()
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("lora", [False, True])
def test_a_decoder_that_fills_holes_is_a_pipeline_that_does(
    oracle: Path, cache: str, tmp_path: Path, *, lora: bool
) -> None:
    base = decoder_like(tmp_path / "base", oracle, fills_holes) if lora else str(oracle / "decoder")
    settings: dict[str, Any] = {"inpaint": True, MODEL: base, "use_ema": True}
    if lora:
        settings |= {"lora_rank": 2, "export_pipeline": True}
    run = tmp_path / "run"
    train(cache, config(run, "decoder", **settings, checkpointing_steps=4))
    assert json.loads((run / "model_index.json").read_text())["_class_name"] == "KandinskyV22InpaintPipeline"
    (run / "README.md").unlink()  # names the prior, which would be loaded, too
    loaded = DiffusionPipeline.from_pretrained(run)
    assert type(loaded).__name__ == "KandinskyV22InpaintPipeline"
    assert loaded.unet.config.in_channels == 9
    assert class_of("decoder", find_half("decoder", str(run), None)) == type(loaded).__name__
    if not lora:
        for learned in (run / LAST, run / "raw"):
            assert class_of("decoder", find_half("decoder", str(learned), None)) == type(loaded).__name__
