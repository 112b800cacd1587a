"""What a run will take: what learns, memory by kind, steps, disk; found from configurations and indexes alone."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from kcache.config import TrainConfig
from kcache.forecast.advice import Advice, least_change
from kcache.forecast.plan import RunPlan, plan_run
from kcache.machine import free_memory
from kcache.store.cache import Cache
from kcache.store.run_directory import read_metrics
from kcache.training.network.saved import checkpoint_files
from kcache.training.optimizer.learning import trainable_parameters


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a run will take. Memory is of one process, in bytes."""

    parameters: int
    """Numbers in the network and its adapters."""
    learning: int
    """Those of them that learn."""
    memory: Mapping[str, int]
    """What there is on the device when there is most: weights, gradients, optimizer, average, batch, activations, rows.
    """
    peak: int
    """All of it."""
    loading: int
    """What the host's memory holds while the weights are loaded, in float32."""
    device: str
    available: int | None
    """What the device has for this process; None where nobody says."""
    fits: bool | None
    advice: Advice | None
    """The least change of flags by which it would fit; None where it does, or nothing helps."""
    samples: int
    """Of the largest batch, whose memory that is."""
    shape: tuple[int, int] | None
    """Height and width of its pictures, in pixels; None where none are read."""
    tokens: int | None
    """Tokens of its captions; None where none are read."""
    residency: str
    row_bytes: int
    """Of all rows that are read."""
    steps: int
    """Optimizer steps to do."""
    epochs: float
    """Passes over the samples in these."""
    global_batch: int
    """Samples per optimizer step, of all processes and accumulated batches."""
    processes: int
    checkpoints: int
    """How many there are in the end."""
    checkpoint_bytes: int
    """Of each."""
    step_seconds: float | None
    """As an earlier start of the run took; None where there was none."""
    notes: tuple[str, ...]
    """What is not counted."""


def forecast_run(cache: str | Path | Cache, config: TrainConfig, *, device_memory: int | None = None) -> Forecast:
    """What training from `cache` by `config` will take; nothing is written, and neither weights nor rows are read.

    `device_memory` is what a GPU has that is not this device, in bytes. Raises the KcacheError that
    `kcache.training.train` raises before its first step, but for what it finds out from weights and rows.
    """
    plan = plan_run(cache, config, elsewhere=device_memory is not None)
    device, processes = plan.choice.accelerator.device, plan.choice.accelerator.num_processes
    network = plan.objective(config).network
    memory, largest = plan.memory(config)
    on_host = device.type == "cpu" and device_memory is None
    available = _free(device, processes) if device_memory is None else device_memory
    peak = sum(memory.values())
    least = plan.loading if on_host else 0  # whatever the settings are
    fits = None if available is None else max(peak, least) <= available
    advice = None
    if available is not None and peak > available >= least:
        advice = least_change(config, available, lambda changed: sum(plan.memory(changed)[0].values()), on_host=on_host)
    saved = math.ceil(plan.steps / config.checkpointing_steps)
    return Forecast(
        parameters=sum(each.numel() for each in network.parameters()),
        learning=sum(each.numel() for each in trainable_parameters(network).values()),
        memory=memory,
        peak=peak,
        loading=plan.loading,
        device=_name(device) if device_memory is None else "another device",
        available=available,
        fits=fits,
        advice=advice,
        samples=largest.samples,
        shape=largest.shape,
        tokens=largest.tokens,
        residency=plan.residency,
        row_bytes=plan.row_bytes,
        steps=plan.steps,
        epochs=plan.epochs,
        global_batch=plan.global_batch,
        processes=processes,
        checkpoints=saved if config.checkpoints_total_limit is None else min(saved, config.checkpoints_total_limit),
        checkpoint_bytes=sum(checkpoint_files(config, network).values()),
        step_seconds=_step_seconds(config, plan.global_batch),
        notes=tuple(_notes(config, on_host, plan)),
    )


def _free(device: torch.device, processes: int) -> int | None:
    """Bytes for each process: of a GPU its own, of the host's memory a share."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return (free_memory() // processes or None) if device.type == "cpu" else None


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _step_seconds(config: TrainConfig, global_batch: int) -> float | None:
    """What a step took in an earlier start of the run."""
    if config.resume_from_checkpoint is None:
        return None
    rates = [entry.get("samples_per_second") for entry in read_metrics(Path(config.output_dir))]
    known = [rate for rate in rates if isinstance(rate, int | float) and rate > 0]
    return global_batch / known[-1] if known else None


def _notes(config: TrainConfig, on_host: bool, plan: RunPlan) -> Iterator[str]:
    if on_host:
        yield "Python and its libraries take about 1 GB beside it"
    else:
        yield "CUDA itself takes about half a GB beside it, and cuDNN some room to work in: on no GPU was this compared"
    if plan.choice.accelerator.num_processes > 1:
        yield "gradients are counted twice, as several processes exchange copies of them"
    if config.compile:
        yield "counted as without --compile, which keeps other activations"
    if config.chosen_optimizer in ("adamw-8bit", "prodigy"):
        yield f"of --optimizer {config.chosen_optimizer} the state is counted, not what a step of it takes beside that"
    if config.attention == "xformers":
        yield "counted with torch's own attention in place of xformers"
    if config.validation_prompts:
        yield "the frozen networks that draw --validation-prompts, loaded for that, are not counted"
    if config.online is not None:
        yield "the frozen encoders of --online are not counted"
