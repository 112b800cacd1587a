"""The parts of a training run, found, checked and loaded before the first step: made fresh, or taken from a checkpoint.

Only the objective and the optimizer are handed to accelerate, for the device, mixed precision and data parallelism. A
prepared loader would repeat samples to fill its last batch, and a prepared schedule would step once per process.
"""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file

import kcache
from kcache.accelerator import machine_facts, make_accelerator
from kcache.attention import check_attention
from kcache.cache import Cache
from kcache.checkpoint import Checkpoint, save_checkpoint
from kcache.compilation import check_compiler
from kcache.config import DECODER_REPO, PRIOR_REPO, TrainConfig
from kcache.contract import check_contract
from kcache.durable import exclusive, writing
from kcache.errors import KcacheError, RunError
from kcache.export import COMPONENTS
from kcache.heldout import split_by_key
from kcache.loader import CacheLoader, RowReader
from kcache.network import find_adapted, load_objective, save_network
from kcache.noise import draw_noise, draw_timesteps
from kcache.objectives import Objective
from kcache.optimizer import (
    check_optimizer,
    make_average,
    make_optimizer,
    optimizer_tensors,
    restore_average,
    restore_optimizer,
    trainable_parameters,
)
from kcache.repositories import Repository, find_repository
from kcache.run_directory import check_same_base, check_same_run, checkpoint_to_resume, start_run
from kcache.sources import open_source

__all__ = ["TrainingRun", "prepare_run"]

OPTIMIZER_FILE = "optimizer.safetensors"
AVERAGE_FILE = "ema.safetensors"


@dataclass(kw_only=True)
class TrainingRun:
    """All that the training loop works with."""

    config: TrainConfig
    cache: Cache
    tables: Mapping[str, str]
    """Each table that is read, and its fingerprint."""
    base: Repository
    """Where the network comes from, and the pipeline that it goes back into."""
    accelerator: Accelerator
    raw_objective: Objective
    """The objective and its network, as they are saved."""
    objective: torch.nn.Module
    """The objective as accelerate prepared it: what the loop calls."""
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    loader: CacheLoader
    global_batch: int
    """Samples per optimizer step, of all processes and accumulated batches."""
    max_steps: int
    counterpart: Repository | None = None
    """The half that does not learn, when there are prompts to draw with it."""
    average: EMAModel | None = None
    """The moving average of what learns, when one is kept."""
    held_out: Cache | None = None
    """The samples that are validated on and never trained on."""
    adapted: Mapping[str, str] | None = None
    """The network that adapters are trained on, by name and weights; None where all weights learn."""
    first_step: int = 0
    """Optimizer steps done by earlier starts of the run."""

    @property
    def output_dir(self) -> Path:
        """The run directory."""
        return Path(self.config.output_dir)

    @property
    def network(self) -> ModelMixin:
        """The network that learns, as it is saved."""
        return self.raw_objective.network

    @cached_property
    def learning(self) -> list[torch.nn.Parameter]:
        """The parameters that learn."""
        return list(trainable_parameters(self.network).values())

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Have the run directory, made and ready, for the main process alone while the block runs.

        Raises CacheBusyError when another run has it, CacheWriteError when it cannot be made.
        """
        if not self.accelerator.is_main_process:
            yield
            return
        with writing(self.output_dir):
            self.output_dir.mkdir(parents=True, exist_ok=True)
        with exclusive(self.output_dir):
            start_run(self.config, _facts(self), self.first_step)
            yield

    def save(self, step: int) -> None:
        """Write a checkpoint after optimizer step `step`; for the main process."""
        scaler = self.accelerator.scaler
        state = {
            "config": asdict(self.config),
            "global_batch": self.global_batch,
            "samples_seen": self.loader.consumed,
            "tables": dict(self.tables),
            "adapted": self.adapted,
            "loader": self.loader.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "grad_scaler": None if scaler is None else scaler.state_dict(),
        }
        save_checkpoint(self.output_dir, step, self._write_tensors, state, self.config.checkpoints_total_limit)

    def _write_tensors(self, folder: Path) -> None:
        save_network(self.network, self.raw_objective.network_name, folder)
        save_file(optimizer_tensors(self.optimizer, self.network), folder / OPTIMIZER_FILE)
        if self.average is not None:
            names = trainable_parameters(self.network)
            save_file(dict(zip(names, self.average.shadow_params, strict=True)), folder / AVERAGE_FILE)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take back from `checkpoint` what `save` put there; the network was loaded from it already.

        Raises RunError when something of it is missing or does not fit.
        """
        state = checkpoint.state
        restore_optimizer(checkpoint.path / OPTIMIZER_FILE, self.optimizer, self.network)
        if self.average is not None:
            restore_average(checkpoint.path / AVERAGE_FILE, self.average, self.network, checkpoint.step)
        try:
            self.loader.load_state_dict(state["loader"])
            self.lr_scheduler.load_state_dict(dict(state["lr_scheduler"]))
            for group, lr in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
                group["lr"] = lr
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["grad_scaler"])
        except KcacheError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunError(
                f"{checkpoint.path} does not hold the state of such a run ({error!r}); expected what a run with these "
                "settings writes; resume from another checkpoint"
            ) from error
        self.first_step = checkpoint.step


def prepare_run(cache: str | Path | Cache, config: TrainConfig) -> TrainingRun:
    """Find, check and load everything that training from `cache` needs; what is quickly refused comes first.

    Raises the KcacheError of whatever is missing or does not fit together.
    """
    check_optimizer(config)
    check_attention(config.attention, config.stage)
    accelerator = make_accelerator(config)
    if config.compile:
        check_compiler(accelerator.device)
    cache, held_out = _choose_samples(cache, config)
    base = _find_base(cache, config)
    counterpart = _find_counterpart(cache, config) if config.validation_prompts else None
    checkpoint, adapted = _find_beginning(config, base)
    objective = load_objective(config, base, None if checkpoint is None else checkpoint.path)
    check_contract(cache, objective, base)
    tables = {name: cache.recipes[name].fingerprint for name in map(cache.table_of, objective.row_shapes)}

    global_batch = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    if checkpoint is not None:
        check_same_run(checkpoint, global_batch, tables)
    max_steps = config.max_train_steps or _steps_until(config.num_train_epochs * len(cache), global_batch, checkpoint)
    objective.to(accelerator.device)
    # Made where the weights lie, and before the objective is wrapped.
    average = make_average(objective.network, config) if config.use_ema else None
    made = make_optimizer(objective.network, config, accelerator.device)
    prepared, optimizer = accelerator.prepare(objective.train(), made)
    run = TrainingRun(
        config=config,
        cache=cache,
        tables=tables,
        base=base,
        accelerator=accelerator,
        raw_objective=objective,
        objective=prepared,
        optimizer=optimizer,
        # Warm-up and total are counted in optimizer steps, whatever the accumulation and the number of processes.
        lr_scheduler=get_scheduler(
            config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=max_steps
        ),
        loader=_make_loader(cache, objective, config, accelerator),
        global_batch=global_batch,
        max_steps=max_steps,
        counterpart=counterpart,
        average=average,
        held_out=held_out,
        adapted=adapted,
    )
    if checkpoint is not None:
        run.restore(checkpoint)
    return run


def _choose_samples(cache: str | Path | Cache, config: TrainConfig) -> tuple[Cache, Cache | None]:
    """The samples to train on, and those held out, if any."""
    opened = cache if isinstance(cache, Cache) else Cache.open(cache, config.resolution)
    if config.where is not None:
        opened = opened.where(config.where)
    return split_by_key(opened, config.val_fraction) if config.val_fraction else (opened, None)


def _find_beginning(config: TrainConfig, base: Repository) -> tuple[Checkpoint | None, dict[str, str] | None]:
    """The checkpoint to go on from, if any, and the network that adapters are trained on, checked to be its own."""
    checkpoint, adapted = checkpoint_to_resume(config), find_adapted(config, base)
    if checkpoint is not None:
        check_same_base(checkpoint, config, adapted)
    return checkpoint, adapted


def _steps_until(samples: int, global_batch: int, checkpoint: Checkpoint | None) -> int:
    """Optimizer steps until `samples` have been seen, those before the checkpoint counted as they were."""
    if checkpoint is None:
        return math.ceil(samples / global_batch)
    return checkpoint.step + math.ceil(max(0, samples - checkpoint.state["samples_seen"]) / global_batch)


def _find_base(cache: Cache, config: TrainConfig) -> Repository:
    """The repository whose network is trained: the one named, else the one that the cache was built with."""
    if config.stage == "prior":
        name, components = config.pretrained_prior_model_name_or_path, COMPONENTS["prior"]
    else:
        name, components = config.pretrained_decoder_model_name_or_path, COMPONENTS["unet"]
        cache.table_of("latents")
    if name is not None:
        return find_repository(name, config.revision, components, config.cache_dir)
    origin = cache.models[config.stage]
    return find_repository(str(origin["name"]), config.revision or origin["revision"], components, config.cache_dir)


def _find_counterpart(cache: Cache, config: TrainConfig) -> Repository:
    half, components = ("decoder", "unet") if config.stage == "prior" else ("prior", "prior")
    name, origin = _counterpart_name(cache, config), cache.models.get(half, {})
    # A --revision is of the repository that is trained, and names nothing in this one.
    revision = origin.get("revision") if origin.get("name") == name else None
    return find_repository(name, revision, COMPONENTS[components], config.cache_dir)


def _counterpart_name(cache: Cache, config: TrainConfig) -> str:
    """The repository of the half that does not learn: the one named, the cache's, or the published one."""
    if config.stage == "prior":
        half, given, published = "decoder", config.pretrained_decoder_model_name_or_path, DECODER_REPO
    else:
        half, given, published = "prior", config.pretrained_prior_model_name_or_path, PRIOR_REPO
    return given or str(cache.models.get(half, {}).get("name") or published)


def _make_loader(cache: Cache, objective: Objective, config: TrainConfig, accelerator: Accelerator) -> CacheLoader:
    fields = tuple(objective.row_shapes)
    noise_shape = cache.field(objective.noised_field).shape
    num_train_timesteps = objective.scheduler.config.num_train_timesteps

    def draws(turns: np.ndarray) -> dict[str, np.ndarray]:
        return {
            "noise": draw_noise(config.seed, turns, noise_shape, config.noise_draws),
            "timesteps": draw_timesteps(config.seed, turns, num_train_timesteps, config.noise_draws),
        }

    rows: RowReader = cache
    if config.online is not None:
        # Not at the top: a run from a cache needs neither encoders nor what reads a source.
        from kcache.online import OnlineEncoders

        source = open_source(
            config.online,
            image_column=config.image_column,
            caption_column=config.caption_column,
            need_captions=False,
        )
        rows = OnlineEncoders(cache, source, fields, accelerator.device)
    return CacheLoader(
        rows,
        fields,
        config.train_batch_size,
        seed=config.seed,
        shuffle=config.shuffle,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        device=accelerator.device,
        residency=config.residency,
        caption_dropout=config.caption_dropout,
        image_dropout=config.image_dropout,
        draws=draws,
    )


def _facts(run: TrainingRun) -> dict[str, Any]:
    return {
        "cache": {"path": os.fspath(run.cache.path.resolve()), "samples": len(run.cache), "tables": dict(run.tables)},
        "base": {"name": run.base.name, "revision": run.base.revision},
        "counterpart": _counterpart_name(run.cache, run.config),
        "global_batch": run.global_batch,
        "max_steps": run.max_steps,
        "residency": run.loader.residency,
        "machine": machine_facts(run.accelerator),
        "versions": {"kcache": kcache.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
    }
