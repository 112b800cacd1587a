"""A decoder that fills holes is trained from any cache: the same online, interrupted, and of all shapes."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from filling import MODEL, decoder_like, fills_holes
from safetensors.torch import load_file
from short_runs import LORA_WEIGHTS, WEIGHTS, assert_equal_tensors, assert_equal_weights, config, course

from kcache.config import DECODER_REPO, DEPTH_REPO, INPAINT_REPO
from kcache.encoders.repositories import find_repository
from kcache.errors import ModelError, RunError
from kcache.loader import draw_masks
from kcache.objectives import InpaintObjective
from kcache.objectives.errors import Batch
from kcache.objectives.widening import widen, widen_for_hints
from kcache.store.cache import Cache
from kcache.store.run_directory import AVERAGE_FILE, read_validation
from kcache.training import setup
from kcache.training.network.decoder import check_decoder
from kcache.training.network.objective import load_objective
from kcache.training.trainer import train
from kcache.training.validation import key_numbers, split_by_key

STEPS = 7
ALL: dict[str, Any] = {
    "inpaint": True, "gradient_accumulation_steps": 1, "max_train_steps": STEPS, "use_ema": True
}  # fmt: skip


@pytest.fixture(scope="module")
def filling(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return decoder_like(tmp_path_factory.mktemp("filling") / "decoder", oracle, fills_holes)


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_thirty_steps_from_the_cache_equal_thirty_with_the_encoders_in_the_loop(
    oracle: Path, cache: str, tmp_path: Path, lora_rank: int | None
) -> None:
    settings: dict[str, Any] = {
        "inpaint": True,
        "max_train_steps": 30,
        "gradient_accumulation_steps": 1,
        "lora_rank": lora_rank,
    }
    train(cache, config(tmp_path / "cached", "decoder", **settings))
    train(cache, config(tmp_path / "online", "decoder", **settings, online=str(oracle / "data")))
    assert len(course(tmp_path / "cached")) == 30
    assert course(tmp_path / "online") == course(tmp_path / "cached")
    weights = WEIGHTS["decoder"] if lora_rank is None else LORA_WEIGHTS
    assert_equal_tensors(tmp_path / "online" / weights, tmp_path / "cached" / weights)


@pytest.mark.parametrize(("lora_rank", "steps"), [(None, (1, 2, 3, 5, 6)), (2, (1, 2, 3, 5, 6))])
def test_an_interrupted_run_goes_on_bit_for_bit(
    cache: str, tmp_path: Path, lora_rank: int | None, steps: Sequence[int]
) -> None:
    settings = ALL | {"lora_rank": lora_rank}
    whole, weights = tmp_path / "whole", WEIGHTS["decoder"] if lora_rank is None else LORA_WEIGHTS
    train(cache, config(whole, "decoder", **settings, checkpointing_steps=1))
    for step in steps:
        part, path = tmp_path / f"from-{step}", str(whole / f"checkpoint-{step}")
        train(cache, config(part, "decoder", **settings, checkpointing_steps=STEPS, resume_from_checkpoint=path))
        assert course(part) == course(whole)[step:]
        for name in (f"checkpoint-{STEPS}/optimizer.safetensors", weights, f"raw/{weights}"):
            assert_equal_tensors(part / name, whole / name)
    kept = {"conv_in.weight", "conv_in.bias"} if lora_rank is not None else set()
    assert kept <= load_file(whole / "checkpoint-3" / AVERAGE_FILE).keys() & load_file(whole / weights).keys()


def test_shapes_resolutions_and_mirrored_pictures_are_masked_at_their_size(
    bucketed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, measure = set(), InpaintObjective.network_input

    def watched(self: InpaintObjective, noisy: torch.Tensor, batch: Batch) -> torch.Tensor:
        assert batch["mask"].shape == (len(noisy), 1, *noisy.shape[2:])
        shapes.add(tuple(noisy.shape[2:]))
        return measure(self, noisy, batch)

    monkeypatch.setattr(InpaintObjective, "network_input", watched)
    settings = {
        "resolution": (32, 64),
        "max_train_steps": 8,
        "gradient_accumulation_steps": 1,
        "inpaint": True,
        "val_fraction": 0.2,
        "num_validation_images": 0,
    }
    for name, residency in (("mapped", "mmap"), ("read", "ram")):
        train(bucketed / "cache", config(tmp_path / name, "decoder", residency=residency, **settings))
    assert len(shapes) > 2
    assert course(tmp_path / "mapped") == course(tmp_path / "read")
    assert_equal_weights(tmp_path / "mapped", tmp_path / "read", "decoder")


def test_masks_are_of_the_turns_grown_unless_told_and_always_so_in_validation(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, measured, measure = list[torch.Tensor](), list[torch.Tensor](), InpaintObjective.measure

    def loss(self: InpaintObjective, batch: Batch, *inputs: Any) -> torch.Tensor:
        trained.append(batch["mask"])
        return super(InpaintObjective, self).loss(batch, *inputs)

    def look(self: InpaintObjective, batch: Batch, *inputs: Any) -> torch.Tensor:
        measured.append(batch["mask"])
        return measure(self, batch, *inputs)

    monkeypatch.setattr(InpaintObjective, "forward", loss)
    monkeypatch.setattr(InpaintObjective, "measure", look)
    settings = {"inpaint": True, "seed": 3, "val_fraction": 0.3, "num_validation_images": 0}
    for growth in (True, False):
        train(cache, config(tmp_path / str(growth), "decoder", mask_growth=growth, **settings))
    turns = torch.from_numpy(draw_masks(3, np.arange(16), 8, 8))
    exact = torch.from_numpy(draw_masks(3, np.arange(16), 8, 8, growth=False))
    assert torch.equal(torch.cat(trained[: len(trained) // 2]), turns)
    assert torch.equal(torch.cat(trained[len(trained) // 2 :]), exact)
    _, held_out = split_by_key(Cache.open(cache), 0.3)
    numbers = np.sort(key_numbers(held_out)) >> np.uint64(1)
    looked_at = torch.from_numpy(draw_masks(3, numbers.astype(np.int64), 8, 8))
    assert len(measured) == 8  # in four bands, twice
    assert all(torch.equal(mask, looked_at) for mask in measured)
    (entry,) = read_validation(tmp_path / "True")
    assert entry["val_hole"] != entry["val_loss"]


def test_a_plain_decoder_begins_where_it_stands_and_learns_to_see_the_mask(
    oracle: Path, cache: str, filling: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(cache, config(tmp_path / "plain", "decoder"))
    assert not caplog.records
    train(cache, config(tmp_path / "wide", "decoder", inpaint=True, max_train_steps=2, checkpointing_steps=1))
    assert course(tmp_path / "wide")[0][0] == course(tmp_path / "plain")[0][0]
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith(f"--inpaint begins with {oracle / 'decoder'}, which fills no holes yet")
    assert said.endswith(f"--pretrained-decoder-model-name-or-path {INPAINT_REPO}")
    trained = UNet2DConditionModel.from_pretrained(tmp_path / "wide" / "unet")
    assert trained.config.in_channels == 9
    assert trained.conv_in.weight[:, 4:].any()
    caplog.clear()
    resumed = {"max_train_steps": 2, "resume_from_checkpoint": "checkpoint-1"}
    train(cache, config(tmp_path / "wide", "decoder", inpaint=True, **resumed))
    assert not [record for record in caplog.records if "--inpaint begins" in record.getMessage()]
    caplog.clear()
    # What was trained is something to begin with.
    begun = [(given, lora_rank) for given in (filling, str(tmp_path / "wide")) for lora_rank in (None, 2)]
    for number, (given, lora_rank) in enumerate(begun):
        settings = {MODEL: given, "lora_rank": lora_rank, "max_train_steps": 1}
        train(cache, config(tmp_path / f"on-{number}", "decoder", inpaint=True, **settings))
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"--inpaint begins with {given}, which fills holes already" for given, _ in begun]


def test_the_objective_is_as_it_was_asked_for(filling: str, tmp_path: Path) -> None:
    repository = find_repository(filling, None, ["unet", "scheduler"])
    for hole_loss in (False, True):
        objective = load_objective(config(tmp_path, "decoder", inpaint=True, hole_loss=hole_loss), repository, None)
        assert isinstance(objective, InpaintObjective)
        assert objective.hole_loss == hole_loss


@pytest.mark.parametrize(
    ("change", "settings", "said"),
    [
        (fills_holes, {}, f"has 9 input channels: it fills holes; .* --inpaint, or give .* {DECODER_REPO}"),
        (fills_holes, {"lora_rank": 2}, "has 9 input channels: it fills holes"),
        (widen_for_hints, {}, f"has 8 input channels: it reads hints; .* --hint NAME, or give .* {DECODER_REPO}"),
        (widen_for_hints, {"inpaint": True}, f"has 8 input channels: it reads hints; .* {INPAINT_REPO}"),
        (lambda unet: widen(unet, 7), {"inpaint": True}, "has 7 input channels and 8 output channels; .* 4 or 9"),
    ],
)  # fmt: skip
def test_a_decoder_that_does_not_do_is_refused_before_it_is_loaded(
    oracle: Path, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, settings: Any, said: str
) -> None:
    given = decoder_like(tmp_path / "decoder", oracle, change)
    monkeypatch.setattr(setup, "load_objective", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ModelError, match=said):
        train(cache, config(tmp_path / "run", "decoder", **{MODEL: given}, **settings))
    assert not (tmp_path / "run").exists()


def test_a_decoder_for_hints_is_one_that_reads_them_or_a_plain_one(oracle: Path, tmp_path: Path) -> None:
    given: dict[Any, str | None] = {
        (lambda unet: None): None,
        widen_for_hints: None,
        fills_holes: f"it fills holes; expected one that reads hints; .* {DEPTH_REPO} --revision refs/pr/5",
        (lambda unet: widen(unet, 7)): "has 7 input channels and 8 output channels; expected for --hint NAME 4 or 8",
    }
    for number, (change, said) in enumerate(given.items()):
        repository = find_repository(decoder_like(tmp_path / str(number), oracle, change), None, ["unet"])
        with nullcontext() if said is None else pytest.raises(ModelError, match=said):
            check_decoder(config(tmp_path / "run", "decoder", hint="depth", lora_rank=2), repository)


def test_a_run_goes_on_as_what_it_was(cache: str, tmp_path: Path) -> None:
    settings = {"max_train_steps": 1, "checkpointing_steps": 1}
    train(cache, config(tmp_path, "decoder", **settings, inpaint=True))
    others: list[tuple[dict[str, Any], str]] = [
        ({}, "inpaint: True → False"),
        ({"inpaint": True, "mask_growth": False}, "mask_growth: True → False"),
        ({"inpaint": True, "hole_loss": True}, "hole_loss: False → True"),
    ]
    for asked, said in others:
        with pytest.raises(RunError, match=said):
            train(cache, config(tmp_path, "decoder", **settings, **asked, resume_from_checkpoint="latest"))


def test_a_lora_of_a_decoder_that_fills_holes_is_one_of_stock_diffusers(
    cache: str, filling: str, tmp_path: Path
) -> None:
    settings = {"inpaint": True, "lora_rank": 2, "export_pipeline": True, "mixed_precision": "bf16", MODEL: filling}
    train(cache, config(tmp_path, "decoder", **settings))
    assert all(".lora_" in name for name in load_file(tmp_path / LORA_WEIGHTS))
    network = UNet2DConditionModel.from_pretrained(filling, subfolder="unet")
    network.load_lora_adapter(str(tmp_path), prefix=None, weight_name=LORA_WEIGHTS)
    network.fuse_lora()
    network.unload_lora()
    fused = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert fused.config.in_channels == 9
    found = network.state_dict()
    assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in fused.state_dict().items())


def test_a_lora_of_a_widened_decoder_begins_with_what_the_plain_one_predicts_and_is_merged_whole(
    oracle: Path, cache: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"lora_rank": 2, "mixed_precision": "bf16", "learning_rate": 1e-2}
    train(cache, config(tmp_path / "plain", "decoder", **settings, max_train_steps=1))
    train(cache, config(tmp_path / "wide", "decoder", inpaint=True, export_pipeline=True, **settings))
    assert course(tmp_path / "wide")[0][0] == course(tmp_path / "plain")[0][0]
    said = caplog.records[-1].getMessage()
    adapters = load_file(tmp_path / "wide" / LORA_WEIGHTS)
    whole = {name: adapters.pop(name) for name in ("conv_in.weight", "conv_in.bias")}
    sizes = [sum(tensor.numel() for tensor in each.values()) for each in (whole, adapters)]
    assert said.startswith("conv_in: trained whole beside the adapters, at the same learning rate")
    assert f" {sizes[0]:,} of {sum(sizes):,} parameters;" in said
    own = load_file(oracle / "decoder" / "unet" / "diffusion_pytorch_model.safetensors")
    merged = load_file(tmp_path / "wide" / WEIGHTS["decoder"])
    assert merged.keys() == own.keys()
    changed = {name for name in own if not torch.equal(own[name], merged[name])}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed} - {"0"} == {
        "conv_in", "to_q", "to_k", "to_v", "add_k_proj", "add_v_proj",
    }  # fmt: skip
    assert all(torch.equal(merged[name], tensor) for name, tensor in whole.items())
    # Of float32 all along: only what was learnt stands between it and what it began with.
    first = whole["conv_in.weight"]
    assert first[:, 4:].any()
    assert first.dtype == torch.float32
    assert (first[:, :4] - own["conv_in.weight"]).abs().amax() < 5e-2
