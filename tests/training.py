"""Short runs for the tests of training, and what came of them."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from kcache.config import TrainConfig
from kcache.run_directory import read_metrics

STAGES = ["prior", "decoder"]
WEIGHTS = {"prior": "prior/diffusion_pytorch_model.safetensors", "decoder": "unet/diffusion_pytorch_model.safetensors"}
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"


def config(output_dir: Path, stage: str = "prior", **settings: Any) -> TrainConfig:
    """Settings of a short run."""
    defaults = {
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_train_steps": 4,
        "report_to": "none",
    }
    return TrainConfig(stage=stage, output_dir=str(output_dir), **(defaults | settings))  # type: ignore[arg-type]


def course(run_dir: Path) -> list[tuple[float, float, float]]:
    """Loss, norm of the gradient and learning rate of each step."""
    return [(entry["loss"], entry["grad_norm"], entry["lr"]) for entry in read_metrics(run_dir)]


def tensor_names(run_dir: Path) -> dict[str, set[str]]:
    """The names of the tensors in each safetensors file that a run left, checkpoints included."""
    files = sorted(run_dir.rglob("*.safetensors"))
    return {file.relative_to(run_dir).as_posix(): set(load_file(file)) for file in files}


def assert_equal_tensors(first: Path, second: Path) -> None:
    """Check that two safetensors files hold the same tensors, bit for bit."""
    a, b = load_file(first), load_file(second)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def assert_equal_weights(first: Path, second: Path, stage: str) -> None:
    """Check that two runs ended in the same weights, bit for bit."""
    assert_equal_tensors(first / WEIGHTS[stage], second / WEIGHTS[stage])
