"""A step without data takes, by the ledger, what torch's allocator gives out in the trainer's own steps with data."""

import json
from pathlib import Path
from typing import Any

import forecast as benchmark
import pytest
import torch
from short_runs import STAGES, config

from kcache.encoders.repositories import PIPELINES, Repository
from kcache.forecast.rehearsal import empty_network, rehearse
from kcache.training.network.objective import load_objective


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, oracle: Path) -> dict[str, Repository]:
    """Pipelines of the recorded configurations alone, by stage."""
    folder, found = tmp_path_factory.mktemp("bases"), {}
    for stage in STAGES:
        network = json.loads((oracle / stage / PIPELINES[stage].network / "config.json").read_text())
        found[stage] = benchmark.write_base(folder / stage, stage, network)
    return found


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("decoder", {"use_ema": True}),
        ("decoder", {"lora_rank": 4, "gradient_checkpointing": True, "gradient_accumulation_steps": 1}),
        ("decoder", {"mixed_precision": "bf16", "gradient_accumulation_steps": 1}),
        ("prior", {}),
        ("prior", {"lora_rank": 4, "mixed_precision": "bf16", "gradient_checkpointing": True}),
    ],
)
def test_what_is_counted_is_what_is_allocated(
    bases: dict[str, Repository], tmp_path: Path, stage: str, settings: dict[str, Any]
) -> None:
    run = config(tmp_path, stage, **settings)
    objective = load_objective(run, bases[stage], None, load=empty_network)
    batch = benchmark.make_batch(objective, 4, 64, run.noise_draws)
    ledger = rehearse(objective, run, batch, torch.device("cpu"))
    measured = benchmark.real_peak(run, bases[stage], batch)
    assert ledger.peak - ledger.most["batch"] == pytest.approx(measured, rel=0.03)
