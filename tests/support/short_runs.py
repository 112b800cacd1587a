"""Short runs for the tests of training, and what came of them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from kcache.config import TrainConfig
from kcache.store.run_directory import read_metrics

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


def write_run(run_dir: Path, base: Path | str, other: Path | str, stage: str = "decoder", **settings: Any) -> Path:
    """A run directory's texts, without any network."""
    run_dir.mkdir(parents=True, exist_ok=True)
    config = TrainConfig(stage=stage, output_dir=str(run_dir), **settings)  # type: ignore[arg-type]
    told = {
        "config": asdict(config),
        "cache": {"path": "/home/someone/caches/foxes", "samples": 1234, "tables": {"latents-64": "ab" * 32}},
        "base": {"name": str(base), "revision": None if Path(base).is_dir() else "c0ffee"},
        "counterpart": str(other),
        "global_batch": 8,
        "versions": {"kcache": "0.1.0"},
    }
    (run_dir / "config.json").write_text(json.dumps(told))
    lines = [{"step": step, "loss": 1.0 + step, "lr": 1e-4} for step in range(1, 4)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run_dir / "validation.jsonl").write_text('{"step": 3, "val_loss": 0.25, "val_loss_t000_249": 0.5}\n')
    return run_dir
