"""When a run is looked at, by what weights, and that looking changes nothing."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filling import MODEL, decoder_like, fills_holes
from PIL import Image
from short_runs import STAGES, config, course

from kcache.config.shapes import Shape
from kcache.errors import ModelError
from kcache.report.figures import CLIP_SCORE, run_panels
from kcache.store.cache import Cache
from kcache.store.likeness.cosines import caption_cosines
from kcache.store.run_directory import append_metrics, read_validation
from kcache.training.log import RunLog
from kcache.training.run import TrainingRun
from kcache.training.setup import prepare_run
from kcache.training.trainer import train
from kcache.training.validation import Evaluation, _make_pictures, first_looked_at, key_numbers

PROMPTS = ("a fox", "an owl")


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kcache.report.pictures.PRIOR_STEPS", 2)
    monkeypatch.setattr("kcache.report.pictures.DECODER_STEPS", 2)
    monkeypatch.setattr("kcache.report.held_out.DECODER_STEPS", 2)


def looked_at(run_dir: Path) -> list[int]:
    return [entry["step"] for entry in read_validation(run_dir)]


def pictures(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run_dir / "pictures").glob("*.png"))}


def evaluated_run(cache: str, run_dir: Path, **settings: Any) -> tuple[TrainingRun, Evaluation]:
    run = prepare_run(cache, config(run_dir, **settings))
    run_dir.mkdir()
    append_metrics(run_dir, [{"step": 1, "loss": 1.0, "grad_norm": 1.0, "lr": 1e-4, "samples_per_second": 1.0}])
    return run, Evaluation(run, RunLog(run))


def look(evaluation: Evaluation, step: int) -> None:
    """What the loop does when an evaluation is due."""
    evaluation.validate(step)
    evaluation.draw(step)


def test_a_run_is_looked_at_now_and_then_and_at_its_end(cache: str, tmp_path: Path) -> None:
    train(cache, config(tmp_path, max_train_steps=7, val_fraction=0.3, validation_steps=3))
    assert looked_at(tmp_path) == [3, 6, 7]
    assert (tmp_path / "loss.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"validation_steps": 7}, [7]),
        ({"validation_steps": 100}, [7]),
        ({"validation_epochs": 1}, [2, 4, 6, 7]),  # 8 samples are left to train on, and a step takes 4
        ({"validation_epochs": 3}, [6, 7]),
    ],
)
def test_when_a_run_is_looked_at_follows_from_its_settings(
    cache: str, tmp_path: Path, settings: dict[str, Any], steps: list[int]
) -> None:
    _, evaluation = evaluated_run(cache, tmp_path / "run", max_train_steps=7, val_fraction=0.3, **settings)
    assert [step for step in range(1, 8) if evaluation.is_due(step)] == steps


def test_without_anything_to_look_at_nothing_is_due(cache: str, tmp_path: Path) -> None:
    _, evaluation = evaluated_run(cache, tmp_path / "run")
    assert not any(evaluation.is_due(step) for step in range(1, 5))


@pytest.mark.parametrize("stage", [*STAGES, "inpaint"])
def test_looking_changes_nothing(oracle: Path, cache: str, tmp_path: Path, stage: str) -> None:
    settings: dict[str, Any] = {"val_fraction": 0.3, "lora_rank": 2, "lora_dropout": 0.5, "max_train_steps": 4}
    looking: dict[str, Any] = {"validation_prompts": PROMPTS, "validation_steps": 1}
    seldom, files = dict[str, Any](), "step"
    if stage == "inpaint":
        filling = decoder_like(tmp_path / "decoder", oracle, fills_holes)
        settings |= {"inpaint": True, MODEL: filling}
        looking, seldom = {"num_validation_images": 1, "validation_steps": 1}, {"num_validation_images": 0}
        stage, files = "decoder", "held-out"
    train(cache, config(tmp_path / "seldom", stage, **settings, **seldom))
    train(cache, config(tmp_path / "often", stage, **settings, **looking))
    assert course(tmp_path / "often") == course(tmp_path / "seldom")
    assert list(pictures(tmp_path / "often")) == [f"{files}-{step:06d}.png" for step in range(1, 5)]
    assert not (tmp_path / "seldom" / "pictures").exists()


@pytest.mark.parametrize(
    "looking", [{"validation_prompts": PROMPTS}, {"stage": "decoder", "inpaint": True, "num_validation_images": 1}]
)
def test_a_resumed_run_looks_as_if_it_had_not_been_stopped(cache: str, tmp_path: Path, looking: dict[str, Any]) -> None:
    settings = {"val_fraction": 0.3, "validation_steps": 2, "checkpointing_steps": 3, **looking}
    train(cache, config(tmp_path / "whole", max_train_steps=6, **settings))
    train(cache, config(tmp_path / "parts", max_train_steps=5, **settings))
    train(cache, config(tmp_path / "parts", max_train_steps=6, resume_from_checkpoint="latest", **settings))
    before_its_end = [entry for entry in read_validation(tmp_path / "parts") if entry["step"] != 5]
    assert before_its_end == read_validation(tmp_path / "whole")
    whole, parts = pictures(tmp_path / "whole"), pictures(tmp_path / "parts")
    assert {name: parts[name] for name in whole} == whole


def test_with_an_average_that_is_looked_at(cache: str, tmp_path: Path) -> None:
    for use_ema in (False, True):
        train(cache, config(tmp_path / f"{use_ema}", val_fraction=0.3, use_ema=use_ema, max_train_steps=4))
    plain, averaged = tmp_path / "False", tmp_path / "True"
    assert course(averaged) == course(plain)
    assert looked_at(averaged) == looked_at(plain) == [4]
    assert read_validation(averaged)[0]["val_loss"] != pytest.approx(read_validation(plain)[0]["val_loss"], rel=1e-6)


def test_what_is_held_out_is_not_trained_on(cache: str, tmp_path: Path) -> None:
    run, _ = evaluated_run(cache, tmp_path / "run", val_fraction=0.3)
    assert run.held_out is not None
    keys = [set(part.samples["image_key"].to_pylist()) for part in (run.cache, run.held_out)]
    assert not keys[0] & keys[1]
    assert len(keys[0] | keys[1]) == len(set(Cache.open(cache).samples["image_key"].to_pylist()))


@pytest.mark.parametrize("resolutions", [(64,), (32, 64)])
def test_held_out_pictures_are_the_first_that_are_looked_at_at_their_largest(
    bucketed: Path, resolutions: tuple[int, ...]
) -> None:
    opened = Cache.open(bucketed / "cache", resolutions)
    chosen = first_looked_at(opened, ("image_embeds", "latents"), 5)
    numbers = [int(key_numbers(part)[sample]) for part, sample, _ in chosen]
    assert numbers == sorted(key_numbers(opened).tolist())[:5]
    assert [turn for _, _, turn in chosen] == [number >> 1 for number in numbers]
    assert {part.resolution for part, _, _ in chosen} == {64}
    assert len(first_looked_at(opened, ("image_embeds", "latents"), 99)) == len(opened)


def test_held_out_pictures_that_cannot_be_drawn_cost_no_training(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*given: Any) -> None:
        raise ModelError("the MoVQ is broken")

    monkeypatch.setattr("kcache.report.held_out.load_pretrained", broken)
    run, evaluation = evaluated_run(cache, tmp_path / "run", stage="decoder", inpaint=True, val_fraction=0.3)
    look(evaluation, 1)
    said = "no held-out pictures can be drawn of this run (the MoVQ is broken); the work goes on"
    assert said in [record.getMessage() for record in caplog.records]
    assert looked_at(run.output_dir) == [1]
    assert not pictures(run.output_dir)


def test_halves_that_do_not_belong_together_are_refused_before_the_first_step(
    oracle: Path, cache: str, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for component in (oracle / "decoder").iterdir():
        (foreign / component.name).symlink_to(component)
    (foreign / "unet").unlink()
    (foreign / "unet").mkdir()
    text = (oracle / "decoder" / "unet" / "config.json").read_text()
    (foreign / "unet" / "config.json").write_text(text.replace('"encoder_hid_dim": 32', '"encoder_hid_dim": 16'))
    settings = {"pretrained_decoder_model_name_or_path": str(foreign), "validation_prompts": PROMPTS}
    with pytest.raises(ModelError, match=r"makes image_embeds of 32 numbers; .* expects 16"):
        train(cache, config(tmp_path / "run", **settings))
    assert course(tmp_path / "run") == []


@pytest.mark.parametrize(
    ("counts", "shapes"),
    [
        ({}, [(512, 512)]),
        ({(256, 256): 9, (768, 768): 9}, [(768, 768)]),
        ({(32, 96): 2, (48, 80): 3, (64, 64): 1, (80, 48): 0, (96, 32): 1}, [(48, 80), (64, 64), (96, 32)]),
    ],
)
def test_pictures_have_the_shapes_that_most_of_what_is_trained_on_has(
    counts: dict[Shape, int], shapes: list[Shape], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def make(config: object, base: object, counterpart: object, given: list[Shape], device: object) -> SimpleNamespace:
        made.append(given)
        return SimpleNamespace(prepare=lambda: None)

    monkeypatch.setattr("kcache.report.pictures.PromptPictures", make)
    run: Any = SimpleNamespace(
        cache=SimpleNamespace(held=SimpleNamespace(shapes=lambda: counts)),
        config=None,
        base="base",
        counterpart="other half",
        accelerator=SimpleNamespace(is_main_process=True, device="cpu"),
    )
    _make_pictures(run)
    assert made == [shapes]


def test_no_generator_is_touched_by_looking(cache: str, tmp_path: Path) -> None:
    _, evaluation = evaluated_run(cache, tmp_path / "run", val_fraction=0.3, validation_prompts=PROMPTS)
    before = torch.get_rng_state()
    look(evaluation, 1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("stage", STAGES)
def test_drawn_pictures_are_scored_as_captions_are(
    cache: str, oracle: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Cache.open(cache)
    captions = opened.samples["captions"].to_pylist()
    number = next(i for i, texts in enumerate(captions) if len(texts) == 1)
    [name] = opened.select([number]).samples["name"].to_pylist()
    with Image.open(oracle / "data" / name) as file:
        picture = file.convert("RGB")
    monkeypatch.setattr("kcache.report.pictures.PromptPictures.draw", lambda *_: [picture, picture])
    prompts = (captions[number][0], "something else")
    looking = {"validation_prompts": prompts, "validation_clip_score": True, "val_fraction": 0.3}
    _, evaluation = evaluated_run(cache, tmp_path / "run", stage=stage, **looking)
    evaluation.look(4)
    [entry] = read_validation(tmp_path / "run")
    own, other = entry["clip_score_1"], entry["clip_score_2"]
    assert own == pytest.approx(caption_cosines(opened)[number], abs=1e-5)
    assert own != pytest.approx(other, abs=1e-3)
    assert entry["val_clip_score"] == pytest.approx((own + other) / 2)
    titles = run_panels([{"step": 1, "loss": 1.0, "grad_norm": 1.0, "lr": 1e-4}], [entry])
    assert CLIP_SCORE in titles
    # What cannot be had costs a warning, and not the losses.
    monkeypatch.setattr("kcache.report.pictures.prompt_scores", lambda *_: 1 / 0)
    evaluation.look(5)
    assert "val_clip_score" not in read_validation(tmp_path / "run")[-1]
