"""A run planned: found possible, its order known and its steps counted; what each way of doing it takes of memory."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kcache.config import TrainConfig
from kcache.forecast.largest import LargestBatch, largest_batch
from kcache.forecast.ledger import KINDS
from kcache.forecast.rehearsal import empty_network, rehearse
from kcache.loader.batches import PREFETCH_BATCHES
from kcache.loader.parts import Part, parts_of
from kcache.loader.residency import choose_residency
from kcache.loader.schedule import Schedule, Standing
from kcache.loader.state import States, epoch_after
from kcache.objectives.inpainting import OWN_MASKS
from kcache.objectives.losses import Objective
from kcache.store.cache import Cache
from kcache.training.choice import Choice, check_cache_fits, choose_run, tables_read
from kcache.training.network.objective import load_objective
from kcache.training.optimizer.learning import trainable_parameters
from kcache.training.publish import check_publishing
from kcache.training.resume import check_output_dir, check_same_run, last_step


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A run before anything of it is loaded."""

    choice: Choice
    stage: str
    steps: int
    """Optimizer steps to do."""
    epochs: float
    """Passes over the samples in these."""
    global_batch: int
    """Samples per optimizer step."""
    residency: str
    row_bytes: int
    """Of all rows that are read."""
    rows_on_device: int
    """Those of them that lie on the device, where it is counted for this one."""
    weighted: bool
    """Whether batches have the weights of their samples."""
    elsewhere: bool
    """Whether memory is counted for another device than this one."""

    def objective(self, config: TrainConfig) -> Objective:
        """The objective of a run with these settings, its network without weights."""
        return _objective(self.choice, config)

    @property
    def loading(self) -> int:
        """Bytes of all weights, float32."""
        network = empty_network(self.stage, self.choice.base.path)
        return sum(parameter.nbytes for parameter in network.parameters())

    def memory(self, config: TrainConfig) -> tuple[Mapping[str, int], LargestBatch]:
        """Bytes on the device when there are most, by kind, of a run with these settings; and in which batch."""
        objective, accelerator = self.objective(config), self.choice.accelerator
        largest = largest_batch(objective, self.choice.parts, config, weighted=self.weighted)
        ledger = rehearse(objective, config, largest.tensors, accelerator.device, elsewhere=self.elsewhere)
        found = {kind: ledger.most.get(kind, 0) for kind in KINDS}
        found["batch"] *= 1 + PREFETCH_BATCHES  # those that wait ready lie on the device, too
        if accelerator.num_processes > 1:
            found["gradients"] += sum(each.nbytes for each in trainable_parameters(objective.network).values())
        return found | {"rows": self.rows_on_device}, largest


def plan_run(cache: str | Path | Cache, config: TrainConfig, *, elsewhere: bool = False) -> RunPlan:
    """Find out what a run will do, by what is known without its weights and rows.

    Raises the KcacheError of whatever is missing or does not fit together.
    """
    check_publishing(config)
    check_output_dir(config)
    choice = choose_run(cache, config, unread=True)
    objective, accelerator = _objective(choice, config), choice.accelerator
    check_cache_fits(choice.cache, objective, choice.base, unread=True)
    processes, device = accelerator.num_processes, accelerator.device
    global_batch = config.train_batch_size * config.gradient_accumulation_steps * processes
    if choice.checkpoint is not None and not config.class_prompt:
        check_same_run(choice.checkpoint, global_batch, tables_read(choice.parts, objective), config.new_order)
    fields = tuple(objective.row_shapes)
    parts = parts_of(
        choice.cache, fields, config.train_batch_size, seed=config.seed, shuffle=config.shuffle, stream=None,
        dropouts={},
    )  # fmt: skip
    schedule = Schedule([len(part.course) for part in parts], [part.batch for part in parts], config.seed, processes)
    standing = _standing(choice, schedule, parts, config)
    last = last_step(lambda epoch: schedule.steps_until(epoch, standing), config, choice.checkpoint)
    steps = max(0, last - (0 if choice.checkpoint is None else choice.checkpoint.step))
    residency = _residency(choice.cache, fields, config, processes, device)
    row_bytes = sum(part.resident_bytes(fields) for part in choice.parts)
    lie_there = residency == "gpu" or (residency == "ram" and device.type == "cpu")
    return RunPlan(
        choice=choice,
        stage=config.stage,
        steps=steps,
        epochs=float(steps * config.gradient_accumulation_steps / schedule.passes_of_epoch),
        global_batch=global_batch,
        residency=residency,
        row_bytes=row_bytes,
        rows_on_device=row_bytes if lie_there and not elsewhere else 0,
        weighted=any(part.is_weighted for part in parts),
        elsewhere=elsewhere,
    )


def _objective(choice: Choice, config: TrainConfig) -> Objective:
    """As the run's own, without weights. Nothing is compiled; adapters that a run goes on with are as new ones."""
    saved = None if choice.checkpoint is None or config.lora_rank is not None else choice.checkpoint.path
    return load_objective(
        replace(config, compile=False, attention="sdpa"),
        choice.base,
        saved,
        own_masks=OWN_MASKS in choice.controls,
        load=empty_network,
    )


def _residency(cache: Cache, fields: tuple[str, ...], config: TrainConfig, processes: int, device: torch.device) -> str:
    if config.online is not None:
        return "online"
    return choose_residency(config.residency, cache, fields, processes, device, config.shuffle)


def _standing(choice: Choice, schedule: Schedule, parts: list[Part], config: TrainConfig) -> Standing:
    """Where the run begins: at the start, or where its checkpoint stood."""
    if choice.checkpoint is None:
        return schedule.begin()
    state: Any = choice.checkpoint.state
    if choice.new_order is not None:
        return schedule.begin(int(state["samples_seen"]), epoch_after(state["loader"]))
    return States(choice.cache, parts, config.seed, config.shuffle).read(state["loader"])
