"""A step without data takes, by the ledger, what torch's allocator gives out in a step with data."""

from pathlib import Path
from typing import Any

import pytest
import torch
from measuring.allocated import allocated_peak
from short_runs import config

from kcache.encoders.repositories import PIPELINES, find_repository
from kcache.forecast.rehearsal import empty_network, rehearse
from kcache.training.network.objective import load_objective
from kcache.training.optimizer import make_optimizer

BATCH = 4


def batch_on(device: str) -> dict[str, torch.Tensor]:
    """A batch of the recorded decoder's."""
    shapes = {"image_embeds": (BATCH, 32), "latents": (BATCH, 4, 16, 16), "noise": (BATCH, 4, 16, 16)}
    rows = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
    return rows | {"timesteps": torch.zeros(BATCH, dtype=torch.int64)}


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 1},
        {"gradient_checkpointing": True},
        {"lora_rank": 4},
        {"mixed_precision": "bf16"},
    ],
)
def test_what_is_counted_is_what_is_allocated(oracle: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    run = config(tmp_path, "decoder", **settings)
    base = find_repository(str(oracle / "decoder"), None, PIPELINES["decoder"].components)
    counted = rehearse(load_objective(run, base, None, load=empty_network), run, batch_on("meta"), torch.device("cpu"))
    objective = load_objective(run, base, None).train()
    optimizer = make_optimizer(objective.network, run, torch.device("cpu"))
    batch = batch_on("cpu")

    def step() -> None:
        for _ in range(run.gradient_accumulation_steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=run.mixed_precision == "bf16"):
                loss = objective(batch, batch["noise"], batch["timesteps"])
            (loss / 2).backward()
            del loss
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    weights = sum(tensor.nbytes for tensor in objective.state_dict().values())
    measured = weights + allocated_peak(lambda: [step() for _ in range(2)])
    assert counted.peak - counted.most["batch"] == pytest.approx(measured, rel=0.03)
    assert counted.most["weights"] == weights
