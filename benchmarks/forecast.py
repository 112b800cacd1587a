"""How well `--dry-run` foretells memory: the peak of a rehearsed step beside that of the trainer's own, on the CPU.

    python benchmarks/forecast.py --output benchmarks/results
    python benchmarks/forecast.py --model-size full --only prior-lora16-b1 --output prior.json

What is measured is what torch's allocator gives out during two real steps, and what lies there before: weights and
average, which are counted exactly. Batches, which are numpy's, are left out of both. The published networks are made
without their weights' values; a setting takes 5 to 9 GB and some minutes.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import product, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDPMScheduler, ModelMixin
from measuring.allocated import allocated_peak
from measuring.models import read_configs
from measuring.record import write_outcome

from kcache.config import TrainConfig
from kcache.encoders.repositories import PIPELINES, Repository
from kcache.forecast.rehearsal import empty_network, rehearse
from kcache.objectives.losses import Objective
from kcache.training.accelerator import make_accelerator
from kcache.training.network.objective import load_objective
from kcache.training.optimizer.average import make_average
from kcache.training.optimizer.learning import trainable_parameters
from kcache.training.optimizer.libraries import make_optimizer
from kcache.training.optimizer.one_by_one import one_by_one_in
from kcache.training.optimizer.schedule import make_schedule
from kcache.training.trainer import take_step

LEVERS: dict[str, dict[str, Any]] = {
    "accumulated": {"gradient_accumulation_steps": 2},
    "average": {"use_ema": True},
    "bf16": {"mixed_precision": "bf16"},
    "lora16-bf16": {"mixed_precision": "bf16", "lora_rank": 16},
    "lora16-average": {"use_ema": True, "lora_rank": 16},
    "checkpointing-accumulated-average": {
        "gradient_checkpointing": True,
        "gradient_accumulation_steps": 2,
        "use_ema": True,
    },
}
SMALL: dict[str, dict[str, Any]] = {
    "weights-bf16": {"mixed_precision": "bf16", "weights": "bf16"},
    "fused": {"fused_backward": True},
    "adafactor": {"optimizer": "adafactor"},
}
"""What takes less memory in training a whole network."""
OF_THE_PRIOR: dict[str, dict[str, Any]] = {
    "padded": {"packing": False},
    "draws4": {"noise_draws": 4},
}


def settings_of(size: str) -> dict[str, tuple[str, int, dict[str, Any]]]:
    """Name → stage, samples of a batch and settings: of the scale model, or six of the published networks."""
    found: dict[str, tuple[str, int, dict[str, Any]]] = {}
    if size == "full":
        for stage, batches in {"prior": (1, 16), "decoder": (1,)}.items():
            for batch, lean in product(batches, (False, True)):
                name = f"{stage}-lora16-b{batch}" + ("-checkpointing" if lean else "")
                found[name] = stage, batch, {"lora_rank": 16, "gradient_checkpointing": lean}
        return found
    for stage, batches in {"prior": (4, 16), "decoder": (1, 4)}.items():
        for batch, lora, lean in product(batches, (None, 16), (False, True)):
            words = [stage, f"b{batch}", *(["lora16"] if lora else []), *(["checkpointing"] if lean else [])]
            found["-".join(words)] = stage, batch, {"lora_rank": lora, "gradient_checkpointing": lean}
        levers = LEVERS | SMALL | (OF_THE_PRIOR if stage == "prior" else {})
        for name, lever in levers.items():
            found[f"{stage}-b{batches[1]}-{name}"] = stage, batches[1], lever
    return found


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-size", choices=("tiny", "full"), default="tiny")
    parser.add_argument("--only", nargs="+", help="names of settings, or how they begin")
    parser.add_argument("--resolution", type=int, help="of the decoder's pictures (default: 128, of the full one 256)")
    parser.add_argument("--output", type=Path, help="file, or folder, for the JSON")
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        results = list(compared(Path(folder), options))
    print(f"farthest off: {max((abs(each['ratio'] - 1) for each in results), default=0):.2%}")
    name = "forecast" if options.model_size == "tiny" else "forecast_full"
    write_outcome(options.output, name, vars(options), results)


def compared(folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rehearsed and real peak of each setting, and their ratio."""
    networks = read_configs(options.model_size)
    bases = {
        stage: write_base(folder / stage, stage, networks[PIPELINES[stage].network]) for stage in ("prior", "decoder")
    }
    resolution = options.resolution or (128 if options.model_size == "tiny" else 256)
    for name, (stage, size, settings) in settings_of(options.model_size).items():
        if options.only and not name.startswith(tuple(options.only)):
            continue
        config = TrainConfig(stage=stage, output_dir=str(folder / "run"), report_to="none", **settings)  # type: ignore[arg-type]
        begun = time.process_time()
        objective = load_objective(config, bases[stage], None, load=empty_network)
        batch = make_batch(objective, size, resolution, config.noise_draws)
        ledger = rehearse(objective, config, batch, torch.device("cpu"))
        seconds, foretold = time.process_time() - begun, ledger.peak - ledger.most["batch"]
        measured = real_peak(config, bases[stage], batch)
        result = {
            "setting": name,
            "resolution": resolution if stage == "decoder" else None,
            "foretold_bytes": foretold,
            "measured_bytes": measured,
            "ratio": round(foretold / measured, 4),
            "foretold_by_kind": dict(ledger.most),
            "rehearsal_processor_seconds": round(seconds, 1),
        }
        print(json.dumps(result), flush=True)
        yield result


def write_base(folder: Path, stage: str, network: dict[str, Any]) -> Repository:
    """A pipeline of configurations alone."""
    component = PIPELINES[stage].network
    (folder / component).mkdir(parents=True)
    (folder / component / "config.json").write_text(json.dumps(network))
    DDPMScheduler(beta_schedule="linear", beta_start=0.00085, beta_end=0.012).save_pretrained(folder / "scheduler")
    return Repository(name=stage, path=folder, revision=None)


def filled_network(stage: str, folder: Path) -> ModelMixin:
    """A network whose weights are all the same."""
    network = empty_network(stage, folder).to_empty(device="cpu")
    for tensor in network.state_dict().values():
        tensor.fill_(0.01)
    return network


def make_batch(objective: Objective, size: int, resolution: int, draws: int) -> dict[str, torch.Tensor]:
    """A batch on the meta device; its captions have 6 to 40 tokens."""
    config, side = objective.network.config, resolution // 8
    if objective.stage == "decoder":
        shapes = {"image_embeds": (size, config.encoder_hid_dim), "latents": (size, 4, side, side)}
        noise: tuple[int, ...] = (size, 4, side, side)
    else:
        lengths = torch.randint(6, 41, (size,), generator=torch.Generator().manual_seed(0))
        width, noise = config.embedding_dim, (size * draws, config.embedding_dim)
        shapes = {"image_embeds": (size, width), "text_embeds": (size, width)}
        shapes["text_encoder_hidden_states"] = int(lengths.sum()), width
    batch = {name: torch.empty(shape, dtype=torch.float16, device="meta") for name, shape in shapes.items()}
    if objective.stage == "prior":
        batch["text_offsets"] = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    batch["noise"] = torch.empty(noise, device="meta")
    return batch | {"timesteps": torch.zeros(noise[0], dtype=torch.int64)}


def real_peak(config: TrainConfig, base: Repository, batch: dict[str, torch.Tensor]) -> int:
    """Bytes at a time of weights, average, and what the allocator gives out in two of the trainer's steps."""
    accelerator = make_accelerator(config)
    raw = load_objective(config, base, None, load=filled_network)
    average = make_average(raw.network, config) if config.use_ema else None
    made = make_optimizer(raw.network, config, accelerator.device)
    objective, optimizer = accelerator.prepare(raw.train(), made)
    run: Any = SimpleNamespace(
        config=config,
        accelerator=accelerator,
        raw_objective=raw,
        objective=objective,
        optimizer=optimizer,
        lr_scheduler=make_schedule(optimizer, config, 2),
        average=average,
        one_by_one=one_by_one_in(optimizer),
        learning=list(trainable_parameters(raw.network).values()),
        loader=SimpleNamespace(consumed=0, weight=1.0),
        kept_on_failure=nullcontext,
        step=0,
    )
    given = {name: torch.zeros_like(each, device="cpu") if each.is_meta else each for name, each in batch.items()}
    standing = [*raw.parameters(), *raw.buffers(), *(average.shadow_params if average is not None else ())]
    batches = repeat(given)
    return sum(each.nbytes for each in standing) + allocated_peak(lambda: [take_step(run, batches) for _ in range(2)])


if __name__ == "__main__":
    main()
