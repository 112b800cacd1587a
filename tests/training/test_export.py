"""A run directory is a pipeline: the documented diffusers code loads it and uses the trained network."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline

from kcache.encoders.repositories import PIPELINES, Repository
from kcache.training.network.objective import load_network
from kcache.training.result import export_components, export_network, make_pipeline


def export(run_dir: Path, half: str, oracle: Path, base: Path | None = None, copy: bool = False) -> float:
    """Export a network with a changed bias, and return that bias."""
    run_dir.mkdir(exist_ok=True)
    path = base or oracle / half
    network = load_network(half, path)
    bias = network.proj_in.bias if half == "prior" else network.conv_out.bias
    bias.data.fill_(0.625)
    repository = Repository(name=str(path), path=path, revision=None)
    export_network(run_dir, PIPELINES[half], network)
    export_components(run_dir, PIPELINES[half], repository, copy=copy)
    components = PIPELINES[half].components
    make_pipeline(run_dir, half, {name: repository.read(name) for name in components})
    return 0.625


# The combined pipeline passes this argument on itself, whoever calls it.
@pytest.mark.filterwarnings("ignore:.callback_steps. is deprecated:FutureWarning")
def test_a_prior_run_goes_into_the_combined_pipeline(oracle: Path, tmp_path: Path) -> None:
    bias = export(tmp_path / "run", "prior", oracle)
    prior = DiffusionPipeline.from_pretrained(tmp_path / "run")
    components = {f"prior_{name}": component for name, component in prior.components.items()}
    pipeline = AutoPipelineForText2Image.from_pretrained(oracle / "decoder", **components)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red fox", prior_num_inference_steps=2, num_inference_steps=2, height=64, width=64).images[0]
    assert image.size == (64, 64)
    assert torch.all(pipeline.prior_prior.proj_in.bias == bias)


def test_a_decoder_run_finds_its_prior_by_its_card(oracle: Path, tmp_path: Path) -> None:
    bias = export(tmp_path / "run", "decoder", oracle)
    (tmp_path / "run" / "README.md").write_text(f"---\nprior:\n- {oracle / 'prior'}\n---\n")
    pipeline = AutoPipelineForText2Image.from_pretrained(tmp_path / "run")
    assert torch.all(pipeline.unet.conv_out.bias == bias)
    assert pipeline.prior_prior.config.embedding_dim == 32


@pytest.mark.parametrize("copy", [False, True])
def test_unchanged_components_are_links_or_copies(oracle: Path, tmp_path: Path, copy: bool) -> None:
    run = tmp_path / "run"
    export(run, "decoder", oracle, copy=copy)
    assert (run / "movq").is_symlink() is not copy
    weights = "movq/diffusion_pytorch_model.safetensors"
    assert (run / weights).read_bytes() == (oracle / "decoder" / weights).read_bytes()


def test_going_on_in_the_folder_of_the_base_keeps_its_components(oracle: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    export(run, "decoder", oracle, copy=True)
    export(run, "decoder", oracle, base=run)
    export(run, "decoder", oracle, base=run, copy=True)
    assert not (run / "movq").is_symlink()
    assert (run / "movq" / "config.json").is_file()


def test_links_become_copies_when_asked_for(oracle: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    export(run, "decoder", oracle)
    export(run, "decoder", oracle, base=run, copy=True)
    assert not (run / "movq").is_symlink()
    assert (run / "movq" / "config.json").is_file()


def test_the_image_processor_has_its_portable_name(oracle: Path, tmp_path: Path) -> None:
    export(tmp_path / "run", "prior", oracle)
    index = json.loads((tmp_path / "run" / "model_index.json").read_text())
    assert index["image_processor"] == ["transformers", "CLIPImageProcessor"]
    assert index["scheduler"] == ["diffusers", "UnCLIPScheduler"]
