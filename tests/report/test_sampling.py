"""Pictures come from the stock pipelines, one noise per picture."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    ModelMixin,
    PriorTransformer,
    UNet2DConditionModel,
)
from PIL import Image
from typer.testing import CliRunner

from kcache.errors import ConfigError, ModelError
from kcache.objectives.lora import add_lora, fuse_lora, save_lora
from kcache.report import sampling
from kcache.report.drawn.halves import load_pipeline
from kcache.report.sampling import draw_embeds, draw_pictures, sample
from kcache_cli.app import app
from kcache_cli.sample import save


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


def test_pictures_drawn_together_have_each_their_own_noise(oracle: Path) -> None:
    prior = load_pipeline(KandinskyV22PriorPipeline, oracle / "prior")
    decoder = load_pipeline(KandinskyV22Pipeline, oracle / "decoder")
    prompts, settings = ["a red circle", "a blue square", "a fox"], {"num_inference_steps": 2, "guidance_scale": 4.0}

    def drawn(batch_size: int) -> np.ndarray:
        generators = [torch.Generator().manual_seed(5 + i) for i in range(3)]
        embeds = draw_embeds(prior, prompts, generators, batch_size=batch_size, **settings)
        assert [tuple(part.shape) for pair in embeds for part in pair] == [(1, 32)] * 6
        pictures = draw_pictures(decoder, embeds, generators, batch_size=batch_size, height=64, width=128, **settings)
        return np.stack([np.asarray(picture) for picture in pictures]).astype(int)

    one_by_one = drawn(1)
    assert np.array_equal(one_by_one, np.stack(draw(oracle, prompts, seed=5)))
    # In batches sums are rounded otherwise, and no more than that.
    for batch_size in (2, 3):
        assert np.abs(drawn(batch_size) - one_by_one).max() <= 1


def test_a_decoder_is_not_taken_for_a_prior(oracle: Path) -> None:
    with pytest.raises(ModelError, match=r"has no prior/config\.json"):
        sample(["a"], decoder=str(oracle / "decoder"), prior=str(oracle / "decoder"), device="cpu")


def make_run(
    folder: Path, oracle: Path, *components: str, side: int | None = None, rows: dict[str, int] | None = None
) -> Path:
    """A directory as a run leaves it, of a decoder trained on pictures of `side` pixels or on `rows`, or of a prior."""
    folder.mkdir(exist_ok=True)
    tables = {"image_embeds": "0", **({} if side is None else {f"latents-{side}": "0"})}
    cache = {"tables": tables, **({} if rows is None else {"rows": rows})}
    told = {"base": {"name": "models/the base"}, "cache": cache}
    (folder / "config.json").write_text(json.dumps(told))
    (folder / "metrics.jsonl").touch()
    for name in components:
        (folder / name).symlink_to(oracle / "decoder" / name)
    return folder


def catch_sizes(monkeypatch: pytest.MonkeyPatch, sizes: list[tuple[int, int]]) -> None:
    """Have the heights and widths of pictures put into `sizes`, and none drawn."""
    monkeypatch.setattr(sampling, "load_half", lambda *_: None)
    monkeypatch.setattr(sampling, "draw_embeds", lambda *_, **__: [])
    monkeypatch.setattr(sampling, "draw_pictures", lambda *_, height, width, **__: sizes.append((height, width)) or [])


@pytest.mark.parametrize(
    ("trained", "adapted", "asked", "drawn"),
    [
        (None, None, {}, (768, 768)),
        (128, None, {}, (128, 128)),
        (100, None, {}, (128, 128)),
        (32, None, {"width": 128}, (64, 128)),
        (128, 64, {}, (64, 64)),
        (None, 64, {"height": 192}, (192, 64)),
        (128, None, {"height": 64, "width": 64}, (64, 64)),
    ],
)
def test_pictures_are_drawn_as_large_as_was_trained(
    oracle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trained: int | None,
    adapted: int | None,
    asked: dict[str, int],
    drawn: tuple[int, int],
) -> None:
    """What the decoder was trained at, or the last LoRA of it, in the multiples of 64 that MoVQ's factor of 8 makes."""
    sizes: list[tuple[int, int]] = []
    catch_sizes(monkeypatch, sizes)
    decoder = oracle / "decoder"
    if trained is not None:
        decoder = make_run(tmp_path / "run", oracle, "unet", "movq", "scheduler", side=trained)
    loras = []
    for number, side in enumerate((640, adapted) if adapted is not None else ()):
        make_lora(oracle, "decoder", make_run(tmp_path / f"lora{number}", oracle, side=side))
        loras.append(str(tmp_path / f"lora{number}"))
    make_lora(oracle, "prior", make_run(tmp_path / "of the prior", oracle))
    sample(
        ["a"],
        prior=str(oracle / "prior"),
        decoder=str(decoder),
        lora=[*loras, str(tmp_path / "of the prior")],
        device="cpu",
        **asked,
    )
    assert sizes == [drawn]


BUCKETS = {"latents-640x896": 30, "latents-576x1024": 5, "latents-896x640": 7, "latents-768": 9, "latents-640x960": 0}


@pytest.mark.parametrize(
    ("rows", "asked", "drawn"),
    [
        (BUCKETS, {}, (640, 896)),
        (BUCKETS, {"width": 768}, (640, 768)),
        (BUCKETS, {"aspect_ratio": "3:2"}, (640, 896)),
        (BUCKETS, {"aspect_ratio": "5:1"}, (576, 1024)),
        (BUCKETS, {"aspect_ratio": "2:3"}, (896, 640)),
        (BUCKETS, {"aspect_ratio": "100:99"}, (768, 768)),
        ({"latents-512": 9, "latents-768": 9}, {}, (768, 768)),
        ({"latents-768": 9}, {"aspect_ratio": "3:2"}, (640, 960)),
        ({"latents-768": 9}, {"aspect_ratio": "9:16"}, (1024, 576)),
        (None, {"aspect_ratio": "1:1"}, (768, 768)),
    ],
)
def test_pictures_have_a_shape_that_was_trained_on(
    oracle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: dict[str, int] | None,
    asked: dict[str, Any],
    drawn: tuple[int, int],
) -> None:
    sizes: list[tuple[int, int]] = []
    catch_sizes(monkeypatch, sizes)
    decoder = make_run(tmp_path / "run", oracle, "unet", "movq", "scheduler", rows=rows)
    sample(["a"], prior=str(oracle / "prior"), decoder=str(decoder), device="cpu", **asked)
    assert sizes == [drawn]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"aspect_ratio": "3/2"}, r"--aspect-ratio is '3/2'; expected a width and a height; type --aspect-ratio 3:2 "),
        ({"aspect_ratio": "0:2"}, "expected a width and a height"),
        ({"aspect_ratio": "3:2", "height": 64}, "--aspect-ratio 3:2 and --height 64 were given; .* leave --height 64"),
    ],
)
def test_what_is_no_ratio_is_refused(oracle: Path, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sample(["a"], prior=str(oracle / "prior"), decoder=str(oracle / "decoder"), device="cpu", **asked)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"height": 33}, "--height is 33; expected a multiple of 64, .*; type --height 64$"),
        ({"width": 100}, "--width is 100; expected a multiple of 64, .*; type --width 64 or --width 128$"),
        ({"height": 0}, "--height is 0"),
        ({"width": -64}, "--width is -64"),
        ({"guidance_scale": -3.0}, "--guidance-scale is -3; expected a number from 0 up"),
        ({"prior_guidance_scale": float("nan")}, "--prior-guidance-scale is nan; expected"),
        ({"prior_guidance_scale": float("inf")}, "--prior-guidance-scale is inf; expected"),
    ],
)
def test_what_cannot_be_drawn_is_refused(oracle: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        draw(oracle, ["a"], **settings)


def test_a_run_without_a_whole_network_is_told_from_a_pipeline(oracle: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", oracle)
    with pytest.raises(ModelError, match="run is the directory of a run that has left no trained network yet"):
        draw(oracle, ["a"], prior=str(run))
    make_lora(oracle, "decoder", run)
    for half in ("prior", "decoder"):
        with pytest.raises(ModelError, match=f"--decoder 'models/the base' --lora {run}$"):
            draw(oracle, ["a"], **{half: str(run)})
    (run / "config.json").unlink()
    with pytest.raises(ModelError, match=f"kcache sample PROMPT --lora {run}$"):
        draw(oracle, ["a"], decoder=str(run))
    other = make_run(tmp_path / "other", oracle, "unet", "movq", "scheduler", side=64)
    with pytest.raises(ModelError, match=r"has no prior/config\.json"):
        draw(oracle, ["a"], prior=str(other))


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
        "kcache.report.sampling.sample",
        lambda prompts, **settings: asked.update(settings) or [Image.new("RGB", (8, 8))],
    )
    command = ["sample", "a fox", "--lora", "runs/a", "--lora=runs/b", f"--output-dir={tmp_path}"]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert asked["lora"] == ["runs/a", "runs/b"]
    assert (tmp_path / "0000-a-fox.png").is_file()


def test_pictures_are_written_over_nothing(tmp_path: Path) -> None:
    for name in ("0000-a-fox.png", "0012-an-owl.png", "0100 mine.png", "0099-a-fox.jpg"):
        (tmp_path / name).write_bytes(b"mine")
    paths = [save(Image.new("RGB", (8, 8)), prompt, tmp_path) for prompt in ("A fox", "an owl")]
    assert [path.name for path in paths] == ["0013-a-fox.png", "0014-an-owl.png"]
    with Image.open(paths[0]) as drawn:
        assert drawn.size == (8, 8)
    assert (tmp_path / "0000-a-fox.png").read_bytes() == b"mine"
