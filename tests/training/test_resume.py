"""A run that was interrupted anywhere goes on as if it had not been, bit for bit, and from nothing else."""

import json
import os
import pickle
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from short_runs import LORA_WEIGHTS, WEIGHTS, assert_equal_tensors, config, course

import kcache.training.run
from kcache.disk.memo import DigestMemo
from kcache.encoders.repositories import find_repository
from kcache.encoders.weights import weights_digest
from kcache.errors import CacheMismatchError, RunError
from kcache.store.checkpoint import latest_checkpoint, open_checkpoint
from kcache.store.run_directory import read_starts
from kcache.training.optimizer.libraries import state_bytes
from kcache.training.resume import checkpoint_to_resume
from kcache.training.trainer import train

STEPS = 8
ALL = {
    "gradient_accumulation_steps": 1,
    "max_train_steps": STEPS,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 3,
    "use_ema": True,
}


@pytest.mark.parametrize(
    ("stage", "lora_rank", "steps"),
    [("prior", None, range(1, STEPS)), ("decoder", None, (2, 5)), ("prior", 2, (2, 5))],  # in and after the warm-up
)
def test_every_step_is_one_to_go_on_from(
    cache: str, tmp_path: Path, stage: str, lora_rank: int | None, steps: Sequence[int]
) -> None:
    variant = bool(lora_rank)
    settings: dict[str, Any] = ALL | {"lora_rank": lora_rank, "use_dora": variant, "use_rslora": variant}
    whole, last = tmp_path / "whole", f"checkpoint-{STEPS}"
    train(cache, config(whole, stage, **settings, checkpointing_steps=1))
    weights = WEIGHTS[stage] if lora_rank is None else LORA_WEIGHTS
    for step in steps:
        part, path = tmp_path / f"from-{step}", str(whole / f"checkpoint-{step}")
        train(cache, config(part, stage, **settings, checkpointing_steps=STEPS, resume_from_checkpoint=path))
        assert course(part) == course(whole)[step:]
        for name in (f"{last}/{weights}", f"{last}/optimizer.safetensors", f"{last}/ema.safetensors", weights):
            assert_equal_tensors(part / name, whole / name)
        assert_equal_tensors(part / "raw" / weights, whole / "raw" / weights)
        shutil.rmtree(part)


BF16: dict[str, Any] = {"weights": "bf16", "mixed_precision": "bf16"}
KEPT = {
    "adamw": ".exp_avg",
    "adamw-8bit": ".absmax1",
    "adafactor": ".exp_avg_sq_row",
    "prodigy": "param_groups.0.d_numerator",
}
"""Of what each keeps, what the others do not."""
GROUP = "param_groups.0"
ALONE: dict[str, Any] = {"fused_backward": True, "offload_optimizer": True}


def owner(entry: str) -> str:
    """The parameter that an optimizer's entry is of."""
    return entry.rpartition(".")[0]


@pytest.mark.parametrize(
    ("stage", "optimizer", "settings"),
    [
        ("decoder", "adamw-8bit", BF16 | {"gradient_accumulation_steps": 2}),
        ("prior", "adafactor", {"fused_backward": True, "ema_device": "cpu"}),
        ("prior", "prodigy", {"learning_rate": 1.0, "gradient_accumulation_steps": 2}),
        ("prior", "adamw", BF16 | ALONE),
    ],
)
def test_every_optimizer_goes_on_bit_for_bit(
    cache: str, tmp_path: Path, stage: str, optimizer: str, settings: dict[str, Any]
) -> None:
    settings = {**ALL, "max_train_steps": 4, "checkpointing_steps": 2, "optimizer": optimizer} | settings
    whole, part = tmp_path / "whole", tmp_path / "part"
    train(cache, config(whole, stage, **settings))
    train(cache, config(part, stage, **settings, resume_from_checkpoint=str(whole / "checkpoint-2")))
    assert course(part) == course(whole)[2:]
    states = "checkpoint-4/optimizer.safetensors"
    for name in (f"checkpoint-4/{WEIGHTS[stage]}", states, "checkpoint-4/ema.safetensors", WEIGHTS[stage]):
        assert_equal_tensors(part / name, whole / name)
    dtypes = {str(tensor.dtype) for tensor in load_file(whole / "raw" / WEIGHTS[stage]).values()}
    assert ("torch.bfloat16" in dtypes) is ("weights" in settings)
    assert {str(tensor.dtype) for tensor in load_file(whole / "checkpoint-4/ema.safetensors").values()} == {
        "torch.float32"
    }
    entries = load_file(whole / states)
    assert any(name.endswith(KEPT[optimizer]) for name in entries)
    learning = [load_file(whole / "checkpoint-4/ema.safetensors")[name] for name in {*map(owner, entries)} - {GROUP}]
    taken, foretold = (
        sum(tensor.nbytes for tensor in entries.values()),
        state_bytes(learning, config(whole, **settings)),
    )
    assert taken == pytest.approx(foretold, rel=0.02, abs=16 * len(learning))
    with pytest.raises(AssertionError):  # something was learnt between the two
        assert_equal_tensors(whole / f"checkpoint-2/{WEIGHTS[stage]}", whole / f"checkpoint-4/{WEIGHTS[stage]}")
    other = config(part, stage, **(settings | {"optimizer": "adamw" if optimizer != "adamw" else "adafactor"}))
    with pytest.raises(RunError, match=rf"made with other settings .*optimizer: {optimizer} → "):
        checkpoint_to_resume(replace(other, resume_from_checkpoint="latest"))


def test_the_average_is_the_result_and_the_raw_weights_stay_beside_it(cache: str, tmp_path: Path) -> None:
    train(cache, config(tmp_path / "plain"))
    train(cache, config(tmp_path / "averaged", use_ema=True))
    assert course(tmp_path / "averaged") == course(tmp_path / "plain")
    assert_equal_tensors(tmp_path / "averaged" / "raw" / WEIGHTS["prior"], tmp_path / "plain" / WEIGHTS["prior"])
    with pytest.raises(AssertionError):
        assert_equal_tensors(tmp_path / "averaged" / WEIGHTS["prior"], tmp_path / "plain" / WEIGHTS["prior"])


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_a_checkpoint_with_a_damaged_file_is_refused_and_the_one_before_it_taken(
    cache: str, tmp_path: Path, lora_rank: int | None
) -> None:
    settings: dict[str, Any] = {"use_ema": True, "lora_rank": lora_rank, "checkpointing_steps": 2}
    train(cache, config(tmp_path, **settings))
    last = tmp_path / "checkpoint-4"
    files = [path for path in last.rglob("*") if path.is_file()]
    assert len(files) == (5 if lora_rank is None else 4)
    for file in files:
        whole = file.read_bytes()
        changed = whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :]
        for damaged in (None, b"", whole[:-2], whole + b"x", changed):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            with pytest.raises(RunError, match=rf"checkpoint-4 is (broken|not a checkpoint).*{file.name}"):
                checkpoint_to_resume(config(tmp_path, **settings, resume_from_checkpoint=str(last)))
            latest = checkpoint_to_resume(config(tmp_path, **settings, resume_from_checkpoint="latest"))
            assert latest is not None
            assert latest.step == 2
            file.write_bytes(whole)
    assert train(cache, config(tmp_path, **settings, max_train_steps=5, resume_from_checkpoint=str(last))).step == 5


def test_a_checkpoint_may_be_named_by_its_path_or_its_name(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train(cache, config(Path("run"), checkpointing_steps=2))
    paths = [
        "run/checkpoint-2",
        "./run/checkpoint-2/",
        f"{tmp_path}/run/checkpoint-2/",
        "checkpoint-2",
        "checkpoint-2/",
    ]
    for path in paths:
        checkpoint = checkpoint_to_resume(config(Path("run"), resume_from_checkpoint=path))
        assert checkpoint is not None
        assert checkpoint.step == 2
    for path in ("checkpoint-3", "run", "", "run/checkpoint-2/prior"):
        with pytest.raises(RunError, match="is not a checkpoint"):
            checkpoint_to_resume(config(Path("run"), resume_from_checkpoint=path))


def test_two_runs_do_not_mix_in_one_directory(cache: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        train(cache, config(tmp_path / name, checkpointing_steps=2))
    with pytest.raises(RunError, match="two holds checkpoint-4 of an earlier run"):
        train(cache, config(tmp_path / "two", resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2")))


def test_a_run_does_not_go_back(cache: str, tmp_path: Path) -> None:
    train(cache, config(tmp_path, checkpointing_steps=2))
    with pytest.raises(
        RunError, match="checkpoint-4 comes after step 4; expected one no later than --max-train-steps 3"
    ):
        train(cache, config(tmp_path, max_train_steps=3, resume_from_checkpoint="latest"))
    again = config(tmp_path, max_train_steps=3, resume_from_checkpoint="checkpoint-2")
    assert train(cache, again).step == len(course(tmp_path)) == 3
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert latest.step == 3  # and not that of what was left
    assert open_checkpoint(tmp_path / "checkpoint-4.left").step == 4


def test_another_kind_of_run_is_refused_before_its_network_is_loaded(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(cache, config(tmp_path, lora_rank=2, checkpointing_steps=4))
    monkeypatch.setattr(kcache.training.setup, "load_objective", lambda *_: pytest.fail("loaded"))
    others: list[tuple[dict[str, Any], str]] = [
        ({"lora_rank": 4}, "lora_rank: 2 → 4"),
        ({}, "lora_rank: 2 → None"),
        ({"lora_rank": 2, "stage": "decoder"}, "stage: prior → decoder"),
        ({"lora_rank": 2, "lora_target_modules": ("to_q",)}, "lora_target_modules: .* → .*to_q"),
        (
            {"lora_rank": 2, "lora_alpha": 8.0, "lora_dropout": 0.5},
            r"lora_alpha: None → 8\.0, lora_dropout: 0\.0 → 0\.5",
        ),
    ]
    for settings, change in others:
        with pytest.raises(RunError, match=change):
            train(cache, config(tmp_path, **settings, resume_from_checkpoint="latest"))


def test_another_selection_of_samples_is_refused_and_begins_a_new_order_where_it_is_asked_to(
    cache: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begun = config(tmp_path / "run", where="tokens <= 10", checkpointing_steps=2)
    train(cache, begun)
    grown = replace(begun, where=None, max_train_steps=8, resume_from_checkpoint="latest")
    with pytest.raises(CacheMismatchError, match=r"5 samples before, 10 now.*--new-order"):
        train(cache, grown)

    copies = [shutil.copytree(tmp_path / "run", tmp_path / name) for name in ("whole", "again", "part")]
    for copy in copies[:2]:
        train(cache, replace(grown, output_dir=str(copy), new_order=True))
    part = replace(grown, output_dir=str(copies[2]), new_order=True)
    train(cache, replace(part, max_train_steps=6))
    train(cache, replace(part, new_order=False))  # begun before, and gone on with
    for copy in copies:
        assert course(copy) == course(copies[0])
        assert_equal_tensors(copy / WEIGHTS["prior"], copies[0] / WEIGHTS["prior"])
        told = [start.get("new_order") for start in read_starts(copy)]
        assert told[:2] == [None, {"samples": 10, "before": 5}]
        assert "* after step 4: in a new order of 10 samples, where there were 5" in (copy / "README.md").read_text()
    assert course(copies[0])[:4] == course(tmp_path / "run")
    caplog.clear()
    train(cache, replace(part, max_train_steps=9))
    assert "--new-order: the samples are those of" in caplog.text


def test_a_run_of_another_length_says_so(cache: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings: dict[str, Any] = {"max_train_steps": None, "lr_scheduler": "linear", "lr_warmup_steps": 0}
    train(cache, config(tmp_path / "whole", **settings, num_train_epochs=2))
    train(cache, config(tmp_path / "part", **settings, num_train_epochs=1, checkpointing_steps=3))
    go_on: dict[str, Any] = {
        **settings,
        "num_train_epochs": 2,
        "resume_from_checkpoint": "latest",
        "checkpointing_steps": 5,
    }
    caplog.clear()
    train(cache, config(tmp_path / "part", **go_on))
    assert [lr for *_, lr in course(tmp_path / "part")][3:] == [lr for *_, lr in course(tmp_path / "whole")][3:]
    assert "is of a run of 3 steps, this one has 5: from step 4 on, the learning rate is that of" in caplog.text
    assert "linear" in caplog.text
    caplog.clear()
    train(cache, config(tmp_path / "part", **go_on))
    assert not caplog.records


def repainted(oracle: Path, folder: Path) -> Path:
    """A copy of the recorded prior pipeline whose prior, and nothing else, has other weights."""
    shutil.copytree(oracle / "prior", folder)
    file = folder / WEIGHTS["prior"]
    save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return folder


def test_adapters_are_refused_another_base_before_it_is_loaded(
    cache: str, oracle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(cache, config(tmp_path / "run", lora_rank=2, checkpointing_steps=4))
    other = str(repainted(oracle, tmp_path / "other"))
    again = config(
        tmp_path / "run", lora_rank=2, pretrained_prior_model_name_or_path=other, resume_from_checkpoint="latest"
    )
    monkeypatch.setattr(kcache.training.setup, "load_objective", lambda *_: pytest.fail("loaded"))
    with pytest.raises(RunError) as refused:
        train(cache, again)
    with DigestMemo() as memo:
        begun, found = (
            weights_digest(find_repository(str(base), None, ["prior"]), "prior", memo)[:12]
            for base in (oracle / "prior", other)
        )
    assert f"the network of {oracle / 'prior'}, weights {begun}…; found that of {other}, weights {found}…" in str(
        refused.value
    )
    assert "give these by --pretrained-prior-model-name-or-path" in str(refused.value)


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_a_base_that_moved_is_the_same_one(cache: str, oracle: Path, tmp_path: Path, lora_rank: int | None) -> None:
    settings: dict[str, Any] = {"lora_rank": lora_rank, "checkpointing_steps": 2}
    train(cache, config(tmp_path / "run", **settings))
    settings["pretrained_prior_model_name_or_path"] = str(shutil.copytree(oracle / "prior", tmp_path / "moved"))
    path = str(tmp_path / "run" / "checkpoint-2")
    train(cache, config(tmp_path / "again", **settings, resume_from_checkpoint=path))
    assert course(tmp_path / "again") == course(tmp_path / "run")[2:]


def test_a_checkpoint_from_before_the_base_was_recorded_is_taken(cache: str, oracle: Path, tmp_path: Path) -> None:
    train(cache, config(tmp_path, lora_rank=2, checkpointing_steps=2))
    state = dict(open_checkpoint(tmp_path / "checkpoint-4").state)
    del state["adapted"]
    reseal(tmp_path / "checkpoint-4", state)
    settings: dict[str, Any] = {"lora_rank": 2, "checkpointing_steps": 2, "max_train_steps": 6}
    train(cache, config(tmp_path, **settings, resume_from_checkpoint="latest"))
    assert open_checkpoint(tmp_path / "checkpoint-6").state["adapted"]["name"] == str(oracle / "prior")


def plant_pickles(folder: Path, marker: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(marker),)

    for name in ("optimizer.bin", "random_states_0.pkl", "scheduler.bin", "prior/diffusion_pytorch_model.bin"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))


def test_a_planted_pickle_is_not_run(cache: str, tmp_path: Path) -> None:
    settings = {"max_train_steps": 4, "checkpointing_steps": 2}
    train(cache, config(tmp_path / "run", **settings))
    marker = tmp_path / "run-by-a-pickle"
    plant_pickles(tmp_path / "run" / "checkpoint-2", marker)
    path = str(tmp_path / "run" / "checkpoint-2")
    train(cache, config(tmp_path / "again", **settings, resume_from_checkpoint=path))
    assert course(tmp_path / "again") == course(tmp_path / "run")[2:]
    assert not marker.exists()


def reseal(checkpoint: Path, state: dict[str, Any]) -> None:
    """Make a checkpoint whose state is another, and which nevertheless passes for whole."""
    from kcache.store.recipe import json_digest

    body = json.loads((checkpoint / "state.json").read_text())
    del body["digest"]
    body["state"] = state
    (checkpoint / "state.json").write_text(json.dumps({**body, "digest": json_digest(body)}))


@pytest.mark.parametrize("lacking", ["config", "global_batch", "tables", "loader", "lr_scheduler", "samples_seen"])
def test_a_state_that_lacks_something_is_refused_in_one_message(cache: str, tmp_path: Path, lacking: str) -> None:
    settings = {"max_train_steps": None, "num_train_epochs": 1, "checkpointing_steps": 2}
    train(cache, config(tmp_path, **settings))
    checkpoint = tmp_path / "checkpoint-2"
    state = {name: value for name, value in open_checkpoint(checkpoint).state.items() if name != lacking}
    reseal(checkpoint, state)
    with pytest.raises(RunError, match=lacking):
        train(cache, config(tmp_path / "again", **settings, resume_from_checkpoint=str(checkpoint)))


def test_a_checkpoint_from_before_a_setting_has_its_default(cache: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"checkpointing_steps": 2}
    train(cache, config(tmp_path / "whole", "decoder", **settings))
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    state = dict(open_checkpoint(checkpoint).state)
    later = {"inpaint", "mask_growth", "hole_loss"}
    state["config"] = {name: value for name, value in state["config"].items() if name not in later}
    reseal(checkpoint, state)
    settings["resume_from_checkpoint"] = str(checkpoint)
    train(cache, config(tmp_path / "on", "decoder", **settings))
    assert course(tmp_path / "on") == course(tmp_path / "whole")[2:]
    with pytest.raises(RunError, match="inpaint: False → True"):
        train(cache, config(tmp_path / "other", "decoder", **settings, inpaint=True))
    state["config"] = {name: value for name, value in state["config"].items() if name != "stage"}
    reseal(checkpoint, state)
    with pytest.raises(RunError, match=r"does not say how its run was set up .*stage"):
        train(cache, config(tmp_path / "other", "decoder", **settings))


def test_an_average_cannot_be_taken_up_halfway(cache: str, tmp_path: Path) -> None:
    train(cache, config(tmp_path, checkpointing_steps=2))
    with pytest.raises(RunError, match="use_ema: False → True"):
        train(cache, config(tmp_path, use_ema=True, resume_from_checkpoint="latest"))
