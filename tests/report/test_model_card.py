"""A model card says what was trained and loads it: its Python runs as it is."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PriorTransformer, UNet2DConditionModel
from filling import decoder_like, fills_holes, sees_hints
from huggingface_hub import ModelCard
from peft import LoraConfig
from PIL import Image
from short_runs import write_run

from kcache.config import DECODER_REPO
from kcache.errors import RunError
from kcache.objectives.lora import add_lora, save_lora
from kcache.objectives.widening import learnt_whole, widen_for_hints, widen_for_masks
from kcache.report.model_card import model_card
from kcache.store.run_directory import LORA_FILE

NETWORKS: dict[str, Any] = {"prior": ("prior", PriorTransformer), "decoder": ("unet", UNet2DConditionModel)}
OTHER = {"prior": "decoder", "decoder": "prior"}


def train_nothing(run_dir: Path, oracle: Path, stage: str, *, lora: bool) -> torch.Tensor:
    """Put a network with a marked weight into a run directory, or adapters with one, and return that weight."""
    name, network_class = NETWORKS[stage]
    network = network_class.from_pretrained(oracle / stage, subfolder=name)
    if lora:
        network.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
        network.save_lora_adapter(run_dir, weight_name=LORA_FILE)
        return next(value for key, value in network.named_parameters() if "lora_B" in key).detach()
    for parameter in network.parameters():
        parameter.data.mul_(1.25)
    network.save_pretrained(run_dir / name)
    return next(network.parameters()).detach()


def code_of(card: str) -> str:
    return card.split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize("stage", NETWORKS)
@pytest.mark.parametrize("kind", ["whole", "part", "lora"])
def test_the_python_of_a_card_draws_with_what_was_trained(oracle: Path, tmp_path: Path, stage: str, kind: str) -> None:
    run_dir = write_run(tmp_path / "run", oracle / stage, oracle / OTHER[stage], stage)
    if kind == "whole":
        shutil.copytree(oracle / stage, run_dir, dirs_exist_ok=True)
    weight = train_nothing(run_dir, oracle, stage, lora=kind == "lora")
    code = code_of(model_card(run_dir, whole=kind == "whole"))
    drawing = "num_inference_steps=2"
    names: dict[str, Any] = {}
    exec(code.replace('snow")', f'snow", {drawing})').replace(").images", f", {drawing}).images"), names)  # noqa: S102
    trained = names["prior"].prior if stage == "prior" else names["decoder"].unet
    weights = [value for key, value in trained.named_parameters() if kind != "lora" or "lora_B" in key]
    assert torch.equal(weights[0], weight)
    assert names["image"].size == (64, 64)


def widened_lora(run_dir: Path, base: str, hint: str | None) -> torch.Tensor:
    """Put a LoRA of a plain decoder that was widened into a run directory, and return a weight that it has whole."""
    network = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    (widen_for_masks if hint is None else widen_for_hints)(network)
    add_lora(network, rank=2, alpha=None, dropout=0.0, target_modules=(), seed=0, whole=learnt_whole(network))
    with torch.no_grad():
        network.conv_in.weight[:, 4:] = 0.1
    save_lora(network, run_dir)
    return network.conv_in.weight.detach()


@pytest.mark.parametrize("hint", [None, "depth"])
@pytest.mark.parametrize("kind", ["whole", "part", "lora", "widened"])
def test_the_python_of_a_card_fills_holes_or_draws_by_a_hint(
    oracle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, hint: str | None
) -> None:
    wide = fills_holes if hint is None else sees_hints
    base = decoder_like(tmp_path / "base", oracle, (lambda _: None) if kind == "widened" else wide)
    run_dir = write_run(tmp_path / "run", base, oracle / "prior", "decoder", inpaint=hint is None, hint=hint)
    if kind == "whole":
        shutil.copytree(base, run_dir, dirs_exist_ok=True)
    (tmp_path / "of").mkdir()
    (tmp_path / "of" / "decoder").symlink_to(base)
    if kind == "widened":
        weight = widened_lora(run_dir, base, hint)
    else:
        weight = train_nothing(run_dir, tmp_path / "of", "decoder", lora=kind == "lora")
    # Another network than the published one may have been trained at sides that its pipeline does not take.
    told = json.loads((run_dir / "config.json").read_text())
    told["cache"]["tables"] = {"latents-48": "ab" * 32}
    (run_dir / "config.json").write_text(json.dumps(told))
    card = model_card(run_dir, whole=kind == "whole")
    data = ModelCard(card).data
    assert data.pipeline_tag == "image-to-image"
    assert ("inpainting" if hint is None else "controlnet") in data.tags
    assert ("Kandinsky 2.2 inpainting decoder" if hint is None else "Kandinsky 2.2 decoder that reads hints") in card
    assert ("their file holds `conv_in`" in card) is (kind == "widened")
    assert ("and `add_embedding.input_hint_block` whole" in card) is (kind == "widened" and hint is not None)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (70, 80)).save("photo.jpg")
    for name in ("hole.png", "hint.png"):
        Image.linear_gradient("L").resize((70, 80)).save(name)
    drawing = "num_inference_steps=2"
    names: dict[str, Any] = {}
    code = code_of(card).replace('snow")', f'snow", {drawing})').replace(").images", f", {drawing}).images")
    exec(code, names)  # noqa: S102
    expected = "KandinskyV22InpaintPipeline" if hint is None else "KandinskyV22ControlnetPipeline"
    assert type(names["decoder"]).__name__ == expected
    part = {"lora": "lora_B", "widened": "conv_in.modules_to_save"}.get(kind, "")
    weights = [value for key, value in names["decoder"].unet.named_parameters() if part in key]
    assert torch.equal(weights[0], weight)
    assert names["image"].size == (64, 64)


def test_a_card_says_what_was_done(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", "me/base", "me/other", learning_rate=3e-5, validation_prompts=("a fox", "b"))
    (run_dir / "pictures").mkdir()
    for step in (999_999, 1_000_000):
        (run_dir / "pictures" / f"step-{step:06}.png").write_bytes(b"")
    card = model_card(run_dir)
    assert "on top of me/base at c0ffee" in card
    assert "1,234 samples of the cache `/home/someone/caches/foxes`, tables latents-64 `abababab" in card
    assert "* steps: 3 of 8 samples each\n* loss: 3, mean of the last 3 steps" in card
    assert "at step 3: val_loss 0.25, val_loss_t000_249 0.5" in card
    assert "| learning_rate | `3e-05` |" in card
    assert "adam_epsilon" not in card
    assert "](pictures/step-1000000.png)\n\n* a fox\n* b\n" in card
    shutil.rmtree(run_dir / "pictures")
    assert "](pictures" not in model_card(run_dir)


def test_cells_stay_in_their_table(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", "me/base", "me/other", where="name == '`|\n'")
    (row,) = [line for line in model_card(run_dir).splitlines() if line.startswith("| where")]
    assert row == "| where | `name == ''\\| '` |"


@pytest.mark.parametrize("lora", [False, True])
def test_the_front_matter_is_a_model_cards(tmp_path: Path, lora: bool) -> None:
    run_dir = write_run(tmp_path / "run", DECODER_REPO, "me/prior")
    if lora:
        (run_dir / LORA_FILE).write_bytes(b"")
    data = ModelCard(model_card(run_dir, repo_id="me/fox")).data.to_dict()
    assert data["base_model"] == DECODER_REPO
    assert data["base_model_relation"] == ("adapter" if lora else "finetune")
    assert data["prior"] == ["me/prior"]
    assert data["library_name"] == "diffusers"
    assert ("lora" in data["tags"]) is lora


@pytest.mark.parametrize("stage", NETWORKS)
def test_a_published_card_names_no_folder_of_this_machine(tmp_path: Path, stage: str) -> None:
    for name in ("base", "other"):
        (tmp_path / name).mkdir()
    run_dir = write_run(tmp_path / "run", tmp_path / "base", tmp_path / "other", stage)
    assert str(tmp_path / "base") in model_card(run_dir)
    card = model_card(run_dir, repo_id="me/fox", whole=False)
    assert str(tmp_path) not in card
    assert "/home" not in card
    assert "'path/to/base'" in code_of(card)
    assert {"base_model", "prior"}.isdisjoint(ModelCard(card).data.to_dict())


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"config\.json cannot be read"):
        model_card(tmp_path)
