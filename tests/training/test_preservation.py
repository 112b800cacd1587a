"""Class rows: drawn once by the prior that a run begins with, never stale, and beside every sample as turns have it."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import KandinskyV22PriorPipeline
from safetensors.torch import load_file, save_file
from short_runs import LORA_WEIGHTS, WEIGHTS, assert_equal_tensors, config, course

from kcache.encoders.repositories import PIPELINES, find_repository
from kcache.errors import CacheMismatchError, ConfigError
from kcache.loader.turns import draw_turns
from kcache.store.checkpoint import Checkpoint
from kcache.store.run_directory import read_config, read_metrics
from kcache.training.preservation import drawing
from kcache.training.preservation.rows import FIRST_TURN, ClassRows, path_of, read_rows, rows_of
from kcache.training.trainer import train

PROMPTS = ("a photo of a dog", "a fox")
PRESERVING: dict[str, Any] = {"class_prompt": PROMPTS, "num_class_rows": 3}
MODEL = "pretrained_prior_model_name_or_path"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where class rows are kept for other runs: of this test alone."""
    monkeypatch.setenv("KCACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "class_rows"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the encoders were asked, and how many rows the prior drew."""
    calls = Counter[str]()
    remember, draw = drawing.remember_prompts, drawing.draw_embeds

    def remembering(*arguments: Any, **settings: Any) -> Any:
        calls["encoders"] += 1
        return remember(*arguments, **settings)

    def drawing_embeds(prior: Any, prompts: Any, *arguments: Any, **settings: Any) -> Any:
        calls["rows"] += len(prompts)
        return draw(prior, prompts, *arguments, **settings)

    monkeypatch.setattr(drawing, "remember_prompts", remembering)
    monkeypatch.setattr(drawing, "draw_embeds", drawing_embeds)
    return calls


def asked(run_dir: Path, oracle: Path, **settings: Any) -> ClassRows:
    """The class rows of a run that would begin now."""
    told = config(run_dir, **(PRESERVING | settings))
    base = find_repository(getattr(told, MODEL) or str(oracle / "prior"), None, PIPELINES["prior"].components)
    found = drawing.class_rows_of(told, base, Accelerator(cpu=True))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def rows(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> ClassRows:
    """Class rows that the tiny prior drew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KCACHE_HOME", str(tmp_path_factory.mktemp("home")))
        return asked(tmp_path_factory.mktemp("run"), oracle, seed=5)


def test_rows_and_texts_are_those_of_the_stock_pipeline(oracle: Path, rows: ClassRows) -> None:
    pipeline = KandinskyV22PriorPipeline.from_pretrained(oracle / "prior", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    generators = [torch.Generator().manual_seed(5 + i) for i in range(6)]
    expected = pipeline(prompts, generator=generators, num_inference_steps=25, guidance_scale=1.0).image_embeds
    assert np.allclose(rows.arrays["image_embeds"], expected.numpy(), atol=1e-5)
    offsets = rows.arrays["text_offsets"]
    for number, text in enumerate((*PROMPTS, "")):
        with torch.no_grad():
            embeds, states, mask = pipeline._encode_prompt([text], torch.device("cpu"), 1, False)
        assert np.allclose(rows.arrays["text_embeds"][number], embeds[0], atol=1e-5)
        found = rows.arrays["text_encoder_hidden_states"][offsets[number] : offsets[number + 1]]
        assert np.allclose(found, states[0][mask[0]], atol=1e-5)


def test_every_class_row_comes_once_before_any_comes_again_whoever_asks() -> None:
    whole = rows_of(7, np.arange(60), 20)
    assert all(sorted(part.tolist()) == list(range(20)) for part in whole.reshape(3, 20))
    assert len({tuple(part) for part in whole.reshape(3, 20).tolist()}) == 3
    assert (whole[33:47] == rows_of(7, np.arange(33, 47), 20)).all()
    assert (whole != rows_of(8, np.arange(60), 20)).any()


def test_what_joins_a_batch_follows_from_its_turns(rows: ClassRows) -> None:
    turns, settings = np.arange(12), {"seed": 3, "timesteps": 1000, "draws": 2, "dropout": 0.5}
    joined = rows.beside(turns, **settings)
    chosen, offsets = rows_of(3, turns, 6), joined["class_text_offsets"]
    assert (joined["class_image_embeds"] == rows.arrays["image_embeds"][chosen]).all()
    texts = [
        int(np.flatnonzero((rows.arrays["text_embeds"] == embed).all(1))[0]) for embed in joined["class_text_embeds"]
    ]
    assert all(text in (chosen[i] // 3, 2) for i, text in enumerate(texts))
    assert 0 < texts.count(2) < 12
    for i, text in enumerate(texts):
        states, bounds = rows.arrays["text_encoder_hidden_states"], rows.arrays["text_offsets"]
        found = joined["class_text_encoder_hidden_states"][offsets[i] : offsets[i + 1]]
        assert (found == states[bounds[text] : bounds[text + 1]]).all()
    own = draw_turns(3, turns + FIRST_TURN, (32,), 1000, 2)
    assert (joined["class_noise"] == own["noise"]).all()
    assert (joined["class_timesteps"] == own["timesteps"]).all()
    assert (joined["class_noise"] != draw_turns(3, turns, (32,), 1000, 2)["noise"]).all()
    second = rows.beside(turns[4:], **settings)
    assert all((second[name] == joined[name][4:]).all() for name in ("class_image_embeds", "class_text_embeds"))
    assert (second["class_noise"] == joined["class_noise"][8:]).all()


def test_a_file_holds_the_rows_and_a_damaged_one_is_noticed(rows: ClassRows) -> None:
    content = rows.to_bytes()
    again = read_rows(content, rows.recipe)
    assert (again.fingerprint, again.digest) == (rows.fingerprint, rows.digest)
    with pytest.raises(ValueError, match="others"):
        read_rows(content, {**rows.recipe, "seed": 6})
    random = np.random.default_rng(0)
    places = [*range(0, 1200, 40), *random.integers(0, len(content), 60).tolist()]
    for place in places:
        broken = bytearray(content)
        broken[place] ^= 1 << int(random.integers(8))
        try:
            read = read_rows(bytes(broken), rows.recipe)
        except ValueError:
            continue
        assert read.digest == rows.digest  # nothing of it but the spelling of its header
    with pytest.raises(ValueError, match="no file of class rows"):
        read_rows(content[:-3], rows.recipe)


def test_they_are_drawn_once_for_all_runs_and_anew_for_whatever_decides_them(
    oracle: Path, home: Path, tmp_path: Path, drawn: Counter[str]
) -> None:
    def calls(name: str, **settings: Any) -> Counter[str]:
        before = drawn.copy()
        asked(tmp_path / name, oracle, **settings)
        return drawn - before

    assert calls("first") == {"encoders": 1, "rows": 6}
    assert calls("second", learning_rate=1e-3, prior_loss_weight=0.5, noise_draws=2, lora_rank=2) == {}
    assert calls("rows", num_class_rows=2) == {"encoders": 1, "rows": 4}
    assert calls("prompt", class_prompt=("a fox",)) == {"encoders": 1, "rows": 3}
    assert calls("seed", seed=1) == {"encoders": 1, "rows": 6}
    assert calls("precision", mixed_precision="bf16") == {"encoders": 1, "rows": 6}
    base = shutil.copytree(oracle / "prior", tmp_path / "base")
    assert calls("moved", **{MODEL: str(base)}) == {}
    weights = load_file(base / WEIGHTS["prior"])
    weights["proj_to_clip_embeddings.bias"] += 1
    save_file(weights, base / WEIGHTS["prior"], {"format": "pt"})
    assert calls("trained", **{MODEL: str(base)}) == {"encoders": 1, "rows": 6}
    first = path_of(tmp_path / "home", asked(tmp_path / "first", oracle).recipe)
    content = first.read_bytes()
    first.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert calls("damaged") == {"encoders": 1, "rows": 6}
    assert first.read_bytes() == content
    assert len(list(home.iterdir())) == 6


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_an_interrupted_run_goes_on_bit_for_bit_and_tells_both_losses(
    cache: str, home: Path, tmp_path: Path, drawn: Counter[str], lora_rank: int | None
) -> None:
    settings = {"use_ema": True, "caption_dropout": 0.3, "snr_gamma": 5.0, "noise_draws": 2, "lora_dropout": 0.1}
    settings |= PRESERVING | {"max_train_steps": 5, "lora_rank": lora_rank}
    if lora_rank is None:
        del settings["lora_dropout"]
    whole, weights = tmp_path / "whole", WEIGHTS["prior"] if lora_rank is None else LORA_WEIGHTS
    train(cache, config(whole, checkpointing_steps=2, **settings))
    path = str(whole / "checkpoint-2")
    drawn.clear()
    shutil.rmtree(home)  # a run has its own
    train(cache, config(tmp_path / "part", checkpointing_steps=9, **settings, resume_from_checkpoint=path))
    assert drawn == {}
    assert course(tmp_path / "part") == course(whole)[2:]
    for name in ("checkpoint-5/optimizer.safetensors", weights, f"raw/{weights}"):
        assert_equal_tensors(tmp_path / "part" / name, whole / name)
    kept = [[entry["class_loss"] for entry in read_metrics(tmp_path / run)] for run in ("part", "whole")]
    assert kept[0] == kept[1][2:]
    assert all(loss != entry["loss"] for loss, entry in zip(kept[1], read_metrics(whole), strict=True))


def test_online_runs_meet_the_same_and_samples_meet_what_they_met_without(
    oracle: Path, cache: str, tmp_path: Path
) -> None:
    short = {"max_train_steps": 2, "gradient_accumulation_steps": 1}
    runs = {"cached": PRESERVING, "online": PRESERVING | {"online": str(oracle / "data")}, "without": {}}
    for name, settings in runs.items():
        train(cache, config(tmp_path / name, **(short | settings)))
    assert course(tmp_path / "online") == course(tmp_path / "cached")
    losses = {name: [entry["loss"] for entry in read_metrics(tmp_path / name)] for name in runs}
    assert losses["without"][0] == pytest.approx(losses["cached"][0], rel=1e-6)  # before anything was learnt
    assert losses["without"][1] != pytest.approx(losses["cached"][1], rel=1e-6)
    assert "class_loss" not in read_metrics(tmp_path / "without")[0]
    assert not (tmp_path / "without" / "class_rows").exists()
    assert read_config(tmp_path / "cached")["cache"]["tables"].keys() == {"class_rows", "image_embeds", "text"}
    assert "class rows: 3 of each of 'a photo of a dog', 'a fox'" in (tmp_path / "cached/README.md").read_text()


def test_a_run_does_not_go_on_beside_class_rows_of_another_prior(oracle: Path, tmp_path: Path, rows: ClassRows) -> None:
    state = {"tables": {"class_rows": rows.fingerprint}, "class_rows": rows.digest}
    checkpoint = Checkpoint(path=tmp_path / "run" / "checkpoint-1", step=1, state=state)
    base = find_repository(str(oracle / "prior"), None, PIPELINES["prior"].components)
    other = config(tmp_path / "run", **PRESERVING, seed=6, resume_from_checkpoint="latest")
    with pytest.raises(CacheMismatchError, match=r"checkpoint-1 was trained beside class rows \w{12}….*--new-order"):
        drawing.class_rows_of(other, base, Accelerator(cpu=True), checkpoint)
    anew = drawing.class_rows_of(replace(other, new_order=True), base, Accelerator(cpu=True), checkpoint)
    assert anew is not None
    assert anew.fingerprint != rows.fingerprint


def test_more_rows_than_memory_holds_are_refused(oracle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"2,000,000,000,000 class rows: that takes .* fewer --num-class-rows"):
        asked(tmp_path / "run", oracle, num_class_rows=10**12)
