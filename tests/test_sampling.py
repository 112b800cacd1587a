"""Pictures come from the stock pipelines, one noise per picture."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ModelMixin, PriorTransformer, UNet2DConditionModel
from PIL import Image
from typer.testing import CliRunner

from kcache.adapters import add_lora, fuse_lora, save_lora
from kcache.errors import ModelError
from kcache.sampling import sample
from kcache_cli.app import app


def draw(oracle: Path, prompts: list[str], seed: int = 0, **changes: Any) -> list[np.ndarray]:
    settings: dict[str, Any] = {
        "decoder": str(oracle / "decoder"),
        "prior": str(oracle / "prior"),
        "num_inference_steps": 2,
        "prior_num_inference_steps": 2,
        "height": 64,
        "width": 128,
        "device": "cpu",
    }
    pictures: list[Image.Image] = sample(prompts, seed=seed, **(settings | changes))
    return [np.asarray(picture) for picture in pictures]


def test_a_picture_depends_on_its_own_prompt_and_noise_only(oracle: Path) -> None:
    together = draw(oracle, ["a red circle", "a blue square"], seed=5)
    alone = draw(oracle, ["a blue square"], seed=6)
    assert together[0].shape == (64, 128, 3)
    assert np.array_equal(together[1], alone[0])
    assert not np.array_equal(together[0], together[1])


def test_a_decoder_is_not_taken_for_a_prior(oracle: Path) -> None:
    with pytest.raises(ModelError, match=r"has no prior/config\.json"):
        sample(["a"], decoder=str(oracle / "decoder"), prior=str(oracle / "decoder"), device="cpu")


def make_lora(oracle: Path, stage: str, run: Path, seed: int = 0) -> ModelMixin:
    """A network with a LoRA that shows, saved in `run` by itself."""
    network: ModelMixin = {
        "prior": lambda: PriorTransformer.from_pretrained(oracle / "prior" / "prior"),
        "decoder": lambda: UNet2DConditionModel.from_pretrained(oracle / "decoder" / "unet"),
    }[stage]()
    add_lora(network, rank=2, alpha=None, dropout=0.0, target_modules=(), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    save_lora(network, run)
    return network


def test_loras_of_both_networks_are_added(oracle: Path, tmp_path: Path) -> None:
    """The same pictures as from pipelines whose weights have the adapters in them."""
    runs = {stage: tmp_path / f"{stage}-lora" for stage in ("prior", "decoder")}
    for stage, run in runs.items():
        network = make_lora(oracle, stage, run)
        fuse_lora(network)
        shutil.copytree(oracle / stage, tmp_path / stage)
        network.save_pretrained(tmp_path / stage / ("prior" if stage == "prior" else "unet"))
    plain = draw(oracle, ["a red circle"])[0]
    for stages in (["prior"], ["decoder"], ["decoder", "prior"]):
        fused = {stage: str(tmp_path / stage) for stage in stages}
        picture = draw(oracle, ["a red circle"], lora=[str(runs[stage]) for stage in stages])[0]
        assert np.array_equal(picture, draw(oracle, ["a red circle"], **fused)[0])
        assert not np.array_equal(picture, plain)


def test_loras_of_one_network_add_up(oracle: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        make_lora(oracle, "decoder", tmp_path / str(seed), seed)
    one, two, both, swapped = (
        draw(oracle, ["a"], lora=[str(tmp_path / run) for run in runs])[0] for runs in ("1", "2", "12", "21")
    )
    # Added in another order they differ by roundings, which grow from step to step; one without the other is far off.
    rounding = np.abs(both.astype(int) - swapped.astype(int)).mean()
    for alone in (one, two):
        assert np.abs(both.astype(int) - alone.astype(int)).mean() > 10 * rounding


def test_a_lora_that_cannot_be_used_stops_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"pytorch_lora_weights\.safetensors does not exist"):
        sample(["a"], prior="nowhere/prior", decoder="nowhere/decoder", lora=[str(tmp_path)], device="cpu")


def test_the_command_takes_several_loras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        "kcache.sampling.sample", lambda prompts, **settings: asked.update(settings) or [Image.new("RGB", (8, 8))]
    )
    command = ["sample", "a fox", "--lora", "runs/a", "--lora=runs/b", f"--output-dir={tmp_path}"]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert asked["lora"] == ["runs/a", "runs/b"]
    assert (tmp_path / "0000-a-fox.png").is_file()
