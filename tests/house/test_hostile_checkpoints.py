"""Forged checkpoints: their pickles are never opened, and their states are refused in one message."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from forgery import NOT_JSON, OUT, VALUES, pickles, resealed, set_in

from kcache.errors import RunError
from kcache.store.checkpoint import latest_checkpoint, open_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path, marker: Path) -> Path:
    """A checkpoint as the trainer writes it, of a network of one layer."""
    from diffusers import PriorTransformer
    from safetensors.torch import save_file

    from kcache.store.checkpoint import save_checkpoint

    network = PriorTransformer(
        num_attention_heads=1,
        attention_head_dim=4,
        num_layers=1,
        embedding_dim=4,
        num_embeddings=2,
        additional_embeddings=4,
    )
    run = tmp_path / "inside" / "run"
    run.mkdir()

    def write(folder: Path) -> None:
        network.save_pretrained(folder / "prior")
        save_file({"proj_in.weight.exp_avg": torch.zeros(4, 4)}, folder / "optimizer.safetensors")

    return save_checkpoint(run, 3, write, {"config": {}})


def test_planted_pickles_in_a_checkpoint_are_never_opened(checkpoint: Path, marker: Path) -> None:
    from diffusers import PriorTransformer

    planted = pickles(marker)
    names = ["custom_checkpoint_0.pkl", "random_states_0.pkl", "scheduler.bin", "optimizer.bin", "pytorch_model.bin"]
    for name in [*names, "prior/diffusion_pytorch_model.bin", "prior/model.pth", "pytorch_lora_weights.bin"]:
        (checkpoint / name).write_bytes(planted["bin" if name.endswith("bin") else "pkl"])
    assert open_checkpoint(checkpoint).step == 3
    PriorTransformer.from_pretrained(checkpoint, subfolder="prior", use_safetensors=True)
    (checkpoint / "prior" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(RunError, match=r"diffusion_pytorch_model\.safetensors missing"):
        open_checkpoint(checkpoint)


def test_pickles_in_place_of_a_checkpoint_s_files_are_refused(checkpoint: Path, marker: Path) -> None:
    for name in ("optimizer.safetensors", "prior/diffusion_pytorch_model.safetensors", "state.json"):
        (checkpoint / name).write_bytes(pickles(marker)["pth"])
        with pytest.raises(RunError, match="broken"):
            latest_checkpoint(checkpoint.parent)


@pytest.mark.parametrize("place", [("files",), ("files", "*"), ("files", OUT), ("step",), ("state",), ("version",)])
def test_hostile_states_of_a_checkpoint_are_refused(checkpoint: Path, place: tuple[Any, ...]) -> None:
    whole = (checkpoint / "state.json").read_bytes()
    for value in VALUES:
        (checkpoint / "state.json").write_bytes(whole)
        place_now = tuple(next(iter(json.loads(whole)["files"])) if key == "*" else key for key in place)
        resealed(checkpoint / "state.json", set_in(*place_now)(value))
        with suppress(RunError):
            assert type(open_checkpoint(checkpoint).step) is int
    for content in NOT_JSON:
        (checkpoint / "state.json").write_bytes(content)
        with pytest.raises(RunError):
            open_checkpoint(checkpoint)
