"""The parts of a training run, found, checked and loaded before the first step: made fresh, or taken from a checkpoint.

Only the objective and the optimizer are handed to accelerate, for the device, mixed precision and data parallelism. A
prepared loader would repeat samples to fill its last batch, and a prepared schedule would step once per process.
"""

import atexit
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin
from diffusers import DDPMScheduler, PriorTransformer, UNet2DConditionModel
from diffusers.optimization import get_scheduler

import kcache
from kcache.cache import Cache
from kcache.checkpoint import Checkpoint, restore_optimizer, save_checkpoint, trainable_parameters
from kcache.config import TrainConfig
from kcache.contract import check_contract
from kcache.errors import ConfigError
from kcache.export import COMPONENTS
from kcache.loader import CacheLoader, RowReader
from kcache.noise import draw_noise, draw_timesteps
from kcache.objectives import DecoderObjective, Objective, PriorObjective
from kcache.online import OnlineEncoders
from kcache.repositories import Repository, find_repository
from kcache.run_directory import check_same_run, checkpoint_to_resume, start_run
from kcache.sources import open_source

__all__ = ["TrainingRun", "prepare_run"]


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
    first_step: int = 0
    """Optimizer steps done by earlier starts of the run."""

    @property
    def output_dir(self) -> Path:
        """The run directory."""
        return Path(self.config.output_dir)

    def save(self, step: int) -> None:
        """Write a checkpoint after optimizer step `step`; for the main process."""
        scaler = self.accelerator.scaler
        state = {
            "config": asdict(self.config),
            "global_batch": self.global_batch,
            "tables": dict(self.tables),
            "loader": self.loader.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "grad_scaler": None if scaler is None else scaler.state_dict(),
        }
        save_checkpoint(
            self.output_dir,
            step,
            network_name=self.raw_objective.network_name,
            network=self.raw_objective.network,
            optimizer=self.optimizer,
            state=state,
            total_limit=self.config.checkpoints_total_limit,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take back from `checkpoint` what `save` put there; the network was loaded from it already."""
        state = checkpoint.state
        check_same_run(checkpoint, self.config, self.global_batch, self.tables)
        restore_optimizer(checkpoint, self.optimizer, self.raw_objective.network)
        self.loader.load_state_dict(state["loader"])
        self.lr_scheduler.load_state_dict(dict(state["lr_scheduler"]))
        for group, lr in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = lr
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["grad_scaler"])
        self.first_step = checkpoint.step


def prepare_run(cache_path: str, config: TrainConfig) -> TrainingRun:
    """Find, check and load everything that training from `cache_path` needs, and make the run directory.

    Raises the KcacheError of whatever is missing or does not fit together.
    """
    checkpoint = checkpoint_to_resume(config)
    accelerator = _make_accelerator(config)
    cache = Cache.open(cache_path, config.resolution)
    if config.where is not None:
        cache = cache.where(config.where)
    base = _find_base(cache, config)
    objective = _load_objective(config, base, checkpoint)
    check_contract(cache, objective, base)

    global_batch = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    max_steps = config.max_train_steps or math.ceil(config.num_train_epochs * len(cache) / global_batch)
    prepared, optimizer = accelerator.prepare(objective.train(), _make_optimizer(objective, config, accelerator))
    run = TrainingRun(
        config=config,
        cache=cache,
        tables={name: cache.recipes[name].fingerprint for name in map(cache.table_of, objective.row_shapes)},
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
    )
    if checkpoint is not None:
        run.restore(checkpoint)
    if accelerator.is_main_process:
        start_run(config, _facts(run), run.first_step)
    return run


def _make_accelerator(config: TrainConfig) -> Accelerator:
    # accelerate keeps the first run's precision for the whole process, and refuses another one.
    AcceleratorState._reset_state(reset_partial_state=True)
    group_is_ours = not torch.distributed.is_initialized()
    accumulation = GradientAccumulationPlugin(num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False)
    try:
        accelerator = Accelerator(mixed_precision=config.mixed_precision, gradient_accumulation_plugin=accumulation)
        if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
            raise ValueError("on a CPU, accelerate would silently take float32")
    except ValueError as error:
        raise ConfigError(
            f"--mixed-precision {config.mixed_precision} cannot be used here: {error}; expected a device that has it; "
            "use bf16, or no for float32"
        ) from error
    if group_is_ours and torch.distributed.is_initialized():
        atexit.register(_leave_process_group)
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    if config.deterministic:
        # cuBLAS is deterministic only with a workspace of fixed size, which it reads when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)
    return accelerator


def _leave_process_group() -> None:
    # At exit, when nothing refers to a prepared objective any more: gloo's threads can deadlock with one that is freed
    # after its group. And not later: left to the interpreter's own end, they can abort the process.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _find_base(cache: Cache, config: TrainConfig) -> Repository:
    """The repository whose network is trained: the one named, else the one that the cache was built with."""
    if config.stage == "prior":
        name, components = config.pretrained_prior_model_name_or_path, COMPONENTS["prior"]
    else:
        name, components = config.pretrained_decoder_model_name_or_path, COMPONENTS["unet"]
        cache.table_of("latents")
    if name is not None:
        return find_repository(name, config.revision, components)
    origin = cache.models[config.stage]
    return find_repository(str(origin["name"]), config.revision or origin["revision"], components)


def _load_objective(config: TrainConfig, repository: Repository, checkpoint: Checkpoint | None) -> Objective:
    folder = repository.path if checkpoint is None else checkpoint.path
    settings = {"use_safetensors": True, "local_files_only": True}
    if config.stage == "prior":
        return PriorObjective(PriorTransformer.from_pretrained(folder, subfolder="prior", **settings))
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", **settings)
    scheduler = DDPMScheduler.from_pretrained(repository.path, subfolder="scheduler", local_files_only=True)
    return DecoderObjective(unet, scheduler)


def _make_optimizer(objective: Objective, config: TrainConfig, accelerator: Accelerator) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        trainable_parameters(objective.network).values(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=accelerator.device.type == "cuda",
    )


def _make_loader(cache: Cache, objective: Objective, config: TrainConfig, accelerator: Accelerator) -> CacheLoader:
    fields = tuple(objective.row_shapes)
    noise_shape = cache.field(objective.noised_field).shape
    num_train_timesteps = objective.scheduler.config.num_train_timesteps

    def draws(turns: np.ndarray) -> dict[str, np.ndarray]:
        return {
            "noise": draw_noise(config.seed, turns, noise_shape),
            "timesteps": draw_timesteps(config.seed, turns, num_train_timesteps),
        }

    rows: RowReader = cache
    if config.online is not None:
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
        "global_batch": run.global_batch,
        "max_steps": run.max_steps,
        "residency": run.loader.residency,
        "versions": {"kcache": kcache.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
    }
