"""Pictures during training: those of the stock pipelines, without the encoders, leaving training as it was."""

import gc
import os
import shutil
import signal
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import PriorTransformer, UNet2DConditionModel
from filling import decoder_like, fills_holes
from PIL import Image
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from kcache.config import TrainConfig
from kcache.config.shapes import Shape
from kcache.encoders.repositories import PIPELINES, Repository, find_repository
from kcache.errors import ModelError
from kcache.report import pictures
from kcache.report.grid import png_bytes
from kcache.report.pictures import PromptPictures
from kcache.report.sampling import sample
from kcache.stopping import stopped_when_safe

STAGES = ["prior", "decoder"]
PROMPTS = ("a red circle", "a blue square")


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "PRIOR_STEPS", 3)
    monkeypatch.setattr(pictures, "DECODER_STEPS", 2)


def repositories(oracle: Path) -> dict[str, Repository]:
    return {
        "prior": find_repository(str(oracle / "prior"), None, PIPELINES["prior"].components),
        "decoder": find_repository(str(oracle / "decoder"), None, PIPELINES["decoder"].components),
    }


def prompt_pictures(oracle: Path, stage: str, *shapes: Shape, **settings: Any) -> PromptPictures:
    found = repositories(oracle)
    base, counterpart = found[stage], found["decoder" if stage == "prior" else "prior"]
    settings = {"seed": 7, "validation_prompts": PROMPTS, "num_validation_images": 2} | settings
    config = TrainConfig(stage=stage, output_dir="run", **settings)  # type: ignore[arg-type]
    return PromptPictures(config, base, counterpart, shapes or [(64, 64)], "cpu")


def learner(oracle: Path, stage: str) -> torch.nn.Module:
    kind, folder = (PriorTransformer, "prior") if stage == "prior" else (UNet2DConditionModel, "unet")
    network: torch.nn.Module = kind.from_pretrained(oracle / stage, subfolder=folder)
    return network.train()


def arrays(drawn: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(picture) for picture in drawn])


@pytest.mark.parametrize("stage", STAGES)
def test_pictures_are_those_of_kcache_sample(oracle: Path, stage: str) -> None:
    lying, standing = (
        sample(
            [prompt for prompt in PROMPTS for _ in range(2)],
            decoder=str(oracle / "decoder"),
            prior=str(oracle / "prior"),
            prior_num_inference_steps=3,
            num_inference_steps=2,
            height=height,
            width=width,
            seed=7,
            device="cpu",
        )
        for height, width in ((64, 128), (128, 64))
    )
    expected = [picture for both in zip(lying, standing, strict=True) for picture in both]
    drawer = prompt_pictures(oracle, stage, (64, 100), (128, 64))
    drawer.prepare()
    network = learner(oracle, stage)
    with stopped_when_safe():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(InterruptedError, match="asks to stop"):
            drawer.draw(network)
    for _ in range(2):
        drawn = drawer.draw(network)
        assert [picture.size for picture in drawn] == [(128, 64), (64, 128)] * 4
        assert [png_bytes(picture) for picture in drawn] == [png_bytes(picture) for picture in expected]
    assert drawer.prompts == [PROMPTS[0]] * 4 + [PROMPTS[1]] * 4


@pytest.mark.parametrize("stage", STAGES)
def test_pictures_show_what_was_learned(oracle: Path, stage: str) -> None:
    drawer = prompt_pictures(oracle, stage)
    drawer.prepare()
    network = learner(oracle, stage)
    before = arrays(drawer.draw(network))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.02
    assert not np.array_equal(arrays(drawer.draw(network)), before)


@pytest.mark.parametrize("stage", STAGES)
def test_training_goes_on_as_if_nothing_had_been(oracle: Path, stage: str) -> None:
    drawer = prompt_pictures(oracle, stage, num_validation_images=1)
    drawer.prepare()
    network = learner(oracle, stage)
    next(iter(network.children())).eval()
    modes = [module.training for module in network.modules()]
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    seen: list[bool] = []
    network.register_forward_hook(lambda module, *_: seen.append(module.training or torch.is_grad_enabled()))
    state = torch.get_rng_state()
    drawer.draw(network)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("stage", STAGES)
def test_the_encoders_are_gone_once_they_were_asked(oracle: Path, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []
    for kind in (CLIPTextModelWithProjection, CLIPVisionModelWithProjection):
        begin = kind.__init__

        def remember(self: Any, *args: Any, _begin: Any = begin, **settings: Any) -> None:
            made.append(weakref.ref(self))
            _begin(self, *args, **settings)

        monkeypatch.setattr(kind, "__init__", remember)
    drawer = prompt_pictures(oracle, stage)
    drawer.prepare()
    gc.collect()
    assert len(made) == 2
    assert all(network() is None for network in made)


@pytest.mark.parametrize("stage", STAGES)
def test_half_precision_draws_nearly_the_same(oracle: Path, stage: str) -> None:
    network = learner(oracle, stage)
    whole, half = (prompt_pictures(oracle, stage, mixed_precision=precision) for precision in ("no", "bf16"))
    whole.prepare()
    half.prepare()
    expected = arrays(whole.draw(network)).astype(int)
    autocast = arrays(half.draw(network)).astype(int)
    assert 0 < np.abs(autocast - expected).mean() < 2
    # Under adapters the network's own weights are kept in half precision.
    for name, parameter in network.named_parameters():
        if name not in ("clip_mean", "clip_std"):
            parameter.data = parameter.data.bfloat16()
    assert np.abs(arrays(half.draw(network)).astype(int) - expected).mean() < 2


def test_a_prior_and_a_decoder_that_do_not_belong_together_are_refused(oracle: Path, tmp_path: Path) -> None:
    shutil.copytree(oracle / "decoder", tmp_path / "decoder")
    config = tmp_path / "decoder" / "unet" / "config.json"
    config.write_text(config.read_text().replace('"encoder_hid_dim": 32', '"encoder_hid_dim": 48'))
    shutil.copytree(oracle / "prior", tmp_path / "prior")
    for stage in STAGES:
        with pytest.raises(ModelError, match=r"makes image_embeds of 32 numbers; .* expects 48"):
            prompt_pictures(tmp_path, stage).prepare()


@pytest.mark.parametrize(
    ("stage", "broken"),
    [
        ("decoder", "prior/text_encoder/model.safetensors"),
        ("decoder", "prior/prior/diffusion_pytorch_model.safetensors"),
        ("decoder", "decoder/movq/diffusion_pytorch_model.safetensors"),
        ("prior", "decoder/unet/diffusion_pytorch_model.safetensors"),
        ("prior", "decoder/model_index.json"),
    ],
)
def test_a_half_that_cannot_be_loaded_is_refused_at_the_start(
    oracle: Path, tmp_path: Path, stage: str, broken: str
) -> None:
    for name in ("prior", "decoder"):
        shutil.copytree(oracle / name, tmp_path / name)
    path = tmp_path / broken
    path.write_bytes(path.read_bytes()[:1000])
    if path.suffix == ".json":
        path.unlink()
    with pytest.raises(
        ModelError,
        match=r"cannot be loaded as KandinskyV22.*to draw the --validation-prompts.*give a repository that works",
    ):
        prompt_pictures(tmp_path, stage).prepare()


def test_a_decoder_that_fills_holes_draws_no_prompts(oracle: Path, tmp_path: Path) -> None:
    folder = decoder_like(tmp_path / "decoder", oracle, fills_holes)
    decoder = find_repository(folder, None, PIPELINES["decoder"].components)
    config = TrainConfig(stage="prior", output_dir="run", validation_prompts=PROMPTS)
    drawing = PromptPictures(config, repositories(oracle)["prior"], decoder, [(64, 64)], "cpu")
    with pytest.raises(
        ModelError, match="one for KandinskyV22InpaintPipeline; expected one that draws the --validation"
    ):
        drawing.prepare()
