"""What a step of training the whole decoder takes in memory, with what takes less of it, and that it learns.

    python benchmarks/small_training.py
    python benchmarks/small_training.py --model-size full --resolution 64 --ways "bf16, adamw-8bit" \\
        "bf16, adamw-8bit, fused backward" --output benchmarks/results

Each way takes a few steps on one sample, one noise and one timestep, with random weights and gradient checkpointing, so
that the loss must fall. Weights and states are counted tensor by tensor; the peak of a step, activations included, is
the allocator's own. On a CPU convolutions in bfloat16 take room of their own for it, which a GPU's do not.
"""

import argparse
import gc
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from measuring.allocated import allocated_peak
from measuring.device import device_kind, synchronize
from measuring.models import SIZES, make_network, read_configs
from measuring.record import write_outcome

from kcache.config import TrainConfig
from kcache.objectives.blocks import recompute_blocks
from kcache.objectives.losses import DecoderObjective
from kcache.training.optimizer.libraries import make_optimizer
from kcache.training.optimizer.one_by_one import OneByOne

BF16: dict[str, Any] = {"weights": "bf16", "mixed_precision": "bf16"}
WAYS: dict[str, dict[str, Any]] = {
    "fp32, adamw": {},
    "fp32, adamw-8bit": {"optimizer": "adamw-8bit"},
    "fp32, adafactor": {"optimizer": "adafactor"},
    "bf16, adamw": BF16,
    "bf16, adamw-8bit": BF16 | {"optimizer": "adamw-8bit"},
    "bf16, adamw-8bit, fused backward": BF16 | {"optimizer": "adamw-8bit", "fused_backward": True},
    "bf16, adafactor, fused backward": BF16 | {"optimizer": "adafactor", "fused_backward": True},
}


def make_objective(size: str, config: TrainConfig, device: str) -> DecoderObjective:
    """The decoder of `size` as a run with `config` has it: its weights in their dtype, recomputing its blocks."""
    network = make_network("unet", read_configs(size)["unet"], device)
    if config.weights == "bf16":
        for parameter in network.parameters():
            parameter.data = parameter.data.bfloat16()
    recompute_blocks(network)
    scheduler = DDPMScheduler(beta_schedule="linear", beta_start=0.00085, beta_end=0.012)
    return DecoderObjective(network.train(), scheduler)


def make_batch(objective: DecoderObjective, side: int, device: str) -> dict[str, torch.Tensor]:
    """One sample, its noise and its timestep."""
    generator = torch.Generator().manual_seed(0)
    width = objective.network.config.encoder_hid_dim
    batch = {
        "image_embeds": torch.randn(1, width, generator=generator),
        "latents": torch.randn(1, 4, side, side, generator=generator),
        "noise": torch.randn(1, 4, side, side, generator=generator),
        "timesteps": torch.tensor([500]),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def take_step(
    objective: DecoderObjective,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, torch.Tensor],
    config: TrainConfig,
    device: str,
) -> float:
    """What the trainer's step does; the loss."""
    with torch.autocast(device, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
        loss = objective(batch, batch["noise"], batch["timesteps"], None)
    loss.backward()
    if isinstance(optimizer, OneByOne) and config.fused_backward:
        optimizer.take_norm()
    else:
        torch.nn.utils.clip_grad_norm_(objective.parameters(), config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def peak_of(work: Any, held: int) -> tuple[float, int]:
    """What `work` returns, and the most bytes that tensors took meanwhile, `held` of them from the beginning."""
    if device_kind() == "gpu":
        torch.cuda.reset_peak_memory_stats()
        loss = work()
        synchronize()
        return loss, torch.cuda.max_memory_allocated()
    losses: list[float] = []
    peak = held + allocated_peak(lambda: losses.append(work()))
    return losses[0], peak


def measure(size: str, way: str, side: int, steps: int, rate: float) -> dict[str, Any]:
    """Losses, seconds, and bytes of weights, states and the peak of the last step."""
    device = "cuda" if device_kind() == "gpu" else "cpu"
    config = TrainConfig(stage="decoder", output_dir="none", learning_rate=rate, **WAYS[way])
    objective = make_objective(size, config, device)
    batch = make_batch(objective, side, device)
    optimizer = make_optimizer(objective.network, config, torch.device(device))
    step = partial(take_step, objective, optimizer, batch, config, device)
    losses, seconds = [], 0.0
    for _ in range(steps - 1):
        start = time.perf_counter()
        losses.append(step())
        synchronize()
        seconds = time.perf_counter() - start
    weights = sum(parameter.nbytes for parameter in objective.network.parameters())
    values = [value for state in optimizer.state.values() for value in state.values()]
    # bitsandbytes shares its tables between parameters.
    states = sum({value.data_ptr(): value.nbytes for value in values if isinstance(value, torch.Tensor)}.values())
    loss, peak = peak_of(step, weights + states)
    return {
        "losses": [*losses, loss],
        "weights_bytes": weights,
        "state_bytes": states,
        "peak_bytes": peak,
        "step_seconds": round(seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-size", choices=SIZES, default="tiny")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--resolution", type=int, default=64, help="side of the picture in pixels")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--output", type=Path, help="a folder or a file for the JSON")
    arguments = parser.parse_args()
    results = {}
    for way in arguments.ways:
        results[way] = row = measure(
            arguments.model_size, way, arguments.resolution // 8, arguments.steps, arguments.learning_rate
        )
        gc.collect()
        sizes = ", ".join(f"{name} {row[f'{name}_bytes'] / 1e9:.2f} GB" for name in ("weights", "state", "peak"))
        losses = " ".join(f"{loss:.4f}" for loss in row["losses"])
        print(f"{way}: losses {losses}; {sizes}; {row['step_seconds']} s a step", flush=True)
    write_outcome(arguments.output, "small_training", vars(arguments), results)


if __name__ == "__main__":
    main()
