"""A checkpoint gives back what was saved, or says that it cannot; it is never half of one."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PriorTransformer

from kcache import checkpoint
from kcache.checkpoint import (
    checkpoint_steps,
    latest_checkpoint,
    open_checkpoint,
    restore_optimizer,
    save_checkpoint,
    trainable_parameters,
)
from kcache.errors import RunError

STATE = {"loader": {"epoch": 3, "samples_consumed": 8}, "lr": 0.1}


@pytest.fixture
def network() -> PriorTransformer:
    torch.manual_seed(0)
    network = PriorTransformer(
        num_attention_heads=1, attention_head_dim=8, num_layers=1, embedding_dim=8, num_embeddings=4
    )
    network.clip_mean.requires_grad_(False)
    network.clip_std.requires_grad_(False)
    return network


def trained_optimizer(network: PriorTransformer, steps: int) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(trainable_parameters(network).values(), lr=1e-2)
    for step in range(steps):
        for number, parameter in enumerate(trainable_parameters(network).values()):
            parameter.grad = torch.full_like(parameter, 0.1 * (step + 1) * (number + 1))
        optimizer.step()
    return optimizer


def save(run_dir: Path, step: int, network: PriorTransformer, **settings: Any) -> Path:
    optimizer = trained_optimizer(network, 2)
    return save_checkpoint(
        run_dir, step, network_name="prior", network=network, optimizer=optimizer, state=STATE, **settings
    )


def test_network_optimizer_and_state_come_back(tmp_path: Path, network: PriorTransformer) -> None:
    optimizer = trained_optimizer(network, 3)
    path = save_checkpoint(
        tmp_path, 12, network_name="prior", network=network, optimizer=optimizer, state=STATE, total_limit=None
    )
    opened = open_checkpoint(path)
    loaded = PriorTransformer.from_pretrained(path, subfolder="prior")
    loaded.clip_mean.requires_grad_(False)
    loaded.clip_std.requires_grad_(False)
    restored = torch.optim.AdamW(trainable_parameters(loaded).values(), lr=1e-3)
    restore_optimizer(opened, restored, loaded)

    assert (opened.step, opened.state) == (12, STATE)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), loaded.parameters(), strict=True))
    assert restored.param_groups[0]["lr"] == 1e-3
    before, after = optimizer.state_dict()["state"], restored.state_dict()["state"]
    assert before.keys() == after.keys()
    for index, entries in before.items():
        assert all(torch.equal(value, after[index][entry]) for entry, value in entries.items())


def test_nothing_in_a_checkpoint_is_pickled(tmp_path: Path, network: PriorTransformer) -> None:
    path = save(tmp_path, 1, network)
    assert {file.suffix for file in path.rglob("*") if file.is_file()} == {".json", ".safetensors"}


FILES = ["state.json", "optimizer.safetensors", "prior/config.json", "prior/diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "emptied", "cut", "changed"])
def test_a_damaged_file_is_refused_and_latest_takes_the_one_before(
    tmp_path: Path, network: PriorTransformer, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    save(tmp_path, 5, network)
    file = save(tmp_path, 10, network) / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "changed":
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        file.write_bytes(b"" if damage == "emptied" else content[:-7])

    with pytest.raises(RunError, match="checkpoint-10"):
        open_checkpoint(tmp_path / "checkpoint-10")
    with caplog.at_level(logging.WARNING):
        latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert latest.step == 5
    assert "checkpoint-10" in caplog.text


def test_latest_refuses_to_start_anew_when_every_checkpoint_is_broken(
    tmp_path: Path, network: PriorTransformer
) -> None:
    assert latest_checkpoint(tmp_path) is None
    (save(tmp_path, 5, network) / "optimizer.safetensors").unlink()
    with pytest.raises(RunError, match="all 1 checkpoints"):
        latest_checkpoint(tmp_path)


def test_the_oldest_go_only_when_the_new_one_is_there(
    tmp_path: Path, network: PriorTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, network)
    save(tmp_path, 2, network, total_limit=2)

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full_disk)
        with pytest.raises(OSError, match="No space"):
            save(tmp_path, 3, network, total_limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    save(tmp_path, 10, network, total_limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path, network: PriorTransformer) -> None:
    save(tmp_path, 4, network)
    network.proj_in.bias.data.fill_(7.0)
    path = save(tmp_path, 4, network)
    assert checkpoint_steps(tmp_path) == [4]
    open_checkpoint(path)
    loaded = PriorTransformer.from_pretrained(path, subfolder="prior")
    assert torch.equal(loaded.proj_in.bias, network.proj_in.bias)


def test_the_newest_is_found_by_number(tmp_path: Path, network: PriorTransformer) -> None:
    for step in (9, 10, 100):
        save(tmp_path, step, network)
    (tmp_path / "checkpoint-best").mkdir()
    assert checkpoint_steps(tmp_path) == [9, 10, 100]


def test_another_networks_optimizer_is_refused(tmp_path: Path, network: PriorTransformer) -> None:
    opened = open_checkpoint(save(tmp_path, 1, network))
    other = torch.nn.Linear(2, 2)
    with pytest.raises(RunError, match="parameters that the network does not train"):
        restore_optimizer(opened, torch.optim.AdamW(other.parameters()), other)


def test_what_is_no_checkpoint_is_said(tmp_path: Path, network: PriorTransformer) -> None:
    with pytest.raises(RunError, match="is not a checkpoint"):
        open_checkpoint(tmp_path / "checkpoint-7")
    path = save(tmp_path, 1, network)
    shutil.move(path / "state.json", tmp_path / "state.json")
    (path / "state.json").write_text('{"digest": "", "version": 99}')
    with pytest.raises(RunError, match=r"version 99.*version 1"):
        open_checkpoint(path)
