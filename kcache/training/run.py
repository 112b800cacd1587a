"""A training run: all that the loop works with, what a checkpoint keeps of it, and how it is taken back.

Only the objective and the optimizer are handed to accelerate, for the device, mixed precision and data parallelism. A
prepared loader would repeat samples to fill its last batch, and a prepared schedule would step once per process.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from diffusers.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

import kcache
from kcache.config import TrainConfig
from kcache.decoration import decoration
from kcache.disk.durable import exclusive, remove_temporary, writing
from kcache.disk.room import Reserve
from kcache.encoders.repositories import Configuration, Repository
from kcache.errors import CacheWriteError, KcacheError, RunError
from kcache.foreign import reason
from kcache.loader.batches import CacheLoader
from kcache.objectives.losses import Objective
from kcache.stopping import shielded
from kcache.store.cache import Cache
from kcache.store.checkpoint import STATE_FILE, Checkpoint, checkpoint_steps, save_checkpoint
from kcache.store.recipe import LATENTS, table_name
from kcache.store.run_directory import AVERAGE_FILE, LORA_FILE, logger, set_aside, start_run
from kcache.tally import counted
from kcache.training.accelerator import check_others, machine_facts
from kcache.training.network.saved import network_bytes, save_network, save_tensors
from kcache.training.optimizer.average import restore_average
from kcache.training.optimizer.kept import optimizer_tensors, restore_optimizer
from kcache.training.optimizer.learning import trainable_parameters
from kcache.training.optimizer.libraries import state_bytes
from kcache.training.optimizer.one_by_one import OneByOne, one_by_one_in
from kcache.training.optimizer.schedule import go_on
from kcache.training.preservation.rows import ClassRows, keep_rows

OPTIMIZER_FILE = "optimizer.safetensors"


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
    lr_scheduler: torch.optim.lr_scheduler.LambdaLR
    loader: CacheLoader
    global_batch: int
    """Samples per optimizer step, of all processes and accumulated batches; fewer of shapes that have more pixels."""
    max_steps: int
    counterpart_name: str
    """The repository of the half that does not learn."""
    counterpart: Repository | None = None
    """That repository, when there are prompts to draw with it."""
    average: EMAModel | None = None
    """The moving average of what learns, when one is kept."""
    held_out: Cache | None = None
    """The samples that are validated on and never trained on."""
    adapted: Mapping[str, str] | None = None
    """The network that adapters are trained on, by name and weights; None where all weights learn."""
    class_rows: ClassRows | None = None
    """What the prior drew before it was trained, and joins every batch."""
    new_order: Mapping[str, int | None] | None = None
    """How many samples the order has that begins with this start, and the one before had; None where it goes on."""
    base_facts: Mapping[str, Configuration]
    """The configurations of the base's components, read before the first step: the base may move meanwhile."""
    first_step: int = 0
    """Optimizer steps done by earlier starts of the run."""
    step: int = 0
    """Optimizer steps done, those included."""
    reserve: Reserve | None = None
    """Room for the last checkpoint, when it is kept back."""
    links: bool = True
    """Whether the run directory takes links to the base's other components."""
    _said: set[str] = field(default_factory=set)
    _saved: int = 0
    """The last step that there is a checkpoint of."""

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

    @cached_property
    def one_by_one(self) -> OneByOne | None:
        """What moves the parameters one after the other, where they are moved so."""
        return one_by_one_in(self.optimizer)

    @contextmanager
    def run_directory_held(self) -> Iterator[None]:
        """Have the run directory, made where it is not there, for the main process alone while the block runs.

        Raises CacheBusyError when another run has it, CacheWriteError when it cannot be made.
        """
        if not self.accelerator.is_main_process:
            yield
            return
        with writing(self.output_dir):
            self.output_dir.mkdir(parents=True, exist_ok=True)
        with exclusive(self.output_dir):
            remove_temporary(self.output_dir)  # also for the room that it takes
            yield

    def begin(self) -> None:
        """Write down what this run is, and forget what is later than its first step; for the main process."""
        if self.config.resume_from_checkpoint == "latest" and self.step == 0:
            logger.warning("no checkpoint in %s: starting at step 0", self.output_dir)
        if self.config.resume_from_checkpoint != "latest":
            self._leave_later_checkpoints()
        self._say_shapes()
        if (turns := self.loader.turns) != (samples := len(self.cache)):
            logger.warning("%s turns an epoch of %s, as some have repeats", f"{turns:,}", counted(samples, "sample"))
        if self.loader.is_weighted:
            logger.warning("samples have weights: the loss is the mean of weight × loss, validation is unweighted")
        told = {} if self.new_order is None else {"new_order": dict(self.new_order)}
        start_run(self.config, self._facts(), self.first_step, told)
        if self.class_rows is not None:
            with self.decoration("class rows could not be kept for going on"):
                keep_rows(self.class_rows, self.output_dir)

    def _say_shapes(self) -> None:
        """Say what batches of several shapes there are, and that pictures are mirrored."""
        for each in self.loader.shapes:
            height, width = each["shape"]
            passes = each.get("turns", each["samples"]) / each["batch"]
            said = "%s high, %s wide: %s, %s at a time, %.1f passes an epoch"
            logger.warning(said, height, width, counted(each["samples"], "sample"), each["batch"], passes)
        if self.cache.flip:
            logger.warning("half of the turns take the mirrored picture; --no-flip leaves these out")

    def _leave_later_checkpoints(self) -> None:
        """Rename what this run does not go on with, or "latest" would take it: the checkpoints after its first step."""
        for step in checkpoint_steps(self.output_dir):
            if step > self.first_step:
                path = self.output_dir / f"checkpoint-{step}"
                with writing(path):
                    left = set_aside(path, "left")
                logger.warning("going on from step %d: %s, which is later, is now %s", self.first_step, path, left.name)

    def decoration(self, what: str) -> AbstractContextManager[None]:
        """`kcache.decoration.decoration`; `what` is said once in a run."""
        return decoration(what, self._said)

    def _facts(self) -> dict[str, Any]:
        """What config.json tells of a run beside its settings."""
        cache, base = self.cache, self.base
        return {
            "cache": {
                "path": str(cache.path.resolve()),
                "samples": len(cache),
                "tables": dict(self.tables),
                "rows": {table_name(LATENTS, shape): count for shape, count in cache.held.shapes().items()},
            },
            "base": {"name": base.name, "revision": base.revision},
            "counterpart": self.counterpart_name,
            "global_batch": self.global_batch,
            "max_steps": self.max_steps,
            **({"shapes": shapes} if (shapes := self.loader.shapes) else {}),
            **({"turns": turns} if (turns := self.loader.turns) != len(cache) else {}),
            **({"mirrored": True} if self.cache.flip else {}),
            "residency": self.loader.residency,
            "machine": machine_facts(self.accelerator),
            "versions": {"kcache": kcache.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
        }

    @property
    def checkpoint_files(self) -> dict[str, int]:
        """The files of a checkpoint and about how many bytes each has, before the optimizer has made its state."""
        adapts, learning = self.config.lora_rank is not None, sum(parameter.nbytes for parameter in self.learning)
        files = (
            {LORA_FILE: learning} if adapts else {SAFETENSORS_WEIGHTS_NAME: network_bytes(self.network), CONFIG_NAME: 0}
        )
        files |= {
            OPTIMIZER_FILE: state_bytes(self.learning, self.config),
            STATE_FILE: 0,
            **({} if self.average is None else {AVERAGE_FILE: 4 * sum(each.numel() for each in self.learning)}),
        }
        # Of each there are headers and names, too.
        names = sum(map(len, trainable_parameters(self.network))) + 256 * len(self.learning)
        return {name: size + 4 * names + (1 << 14) for name, size in files.items()}

    @contextmanager
    def kept_on_failure(self) -> Iterator[None]:
        """Save a checkpoint of the last whole step where the block fails, which changes nothing of what learns.

        Unless what learns is no longer finite. What goes wrong with that is said, and the failure raised all the same;
        of another process that has ended as a RunError.
        """
        standing = self.loader.standing
        try:
            yield
        except BaseException as error:
            self.loader.standing = standing  # the batches of a step that was not made
            if not isinstance(error, Exception):  # whoever stops says what is kept
                raise
            self.keep("something failed")
            check_others(error)
            raise

    def keep(self, why: str) -> None:
        """Save a checkpoint in the main process, where what learns is finite, and say `why`, or why there is none."""
        if not self.accelerator.is_main_process or self._saved == self.step:
            return
        try:
            if self.one_by_one is not None and self.one_by_one.midway:
                logger.warning("NO CHECKPOINT after step %d: some of the weights are those of the next", self.step)
            elif all(bool(torch.isfinite(parameter).all()) for parameter in self.learning):
                self.save(last=True)
                logger.warning("%s, and checkpoint-%d holds all that was learned until then", why, self.step)
        except Exception as error:  # noqa: BLE001 - the device may be gone as well
            logger.warning("NO CHECKPOINT after step %d: %s", self.step, reason(error))

    def save_if_possible(self, *, stopping: bool) -> None:
        """`save`; where that fails the run goes on, unless it is about to stop: it may still end well."""
        last = self.step == self.max_steps
        try:
            self.save(last=last or stopping)
        except CacheWriteError as error:
            if stopping:
                raise
            rest = "the run goes on; a crash would cost what is not saved"
            if last:
                rest = "the result is written all the same"
            logger.warning("NO CHECKPOINT after step %d: %s; %s", self.step, error, rest)

    def have_place(self) -> None:
        """Make the run directory once more where it was moved or removed meanwhile; raises CacheWriteError."""
        if self.output_dir.is_dir():
            return
        logger.warning("%s was moved or removed: it is made anew, and gets what comes now", self.output_dir)
        if self.reserve is not None:
            self.reserve.give_back()  # it may lie on another file system
        with writing(self.output_dir):
            self.output_dir.mkdir(parents=True)
        self.begin()

    def save(self, *, last: bool = False) -> None:
        """Write a checkpoint of the steps done, unless there is one; in the main process. No signal interrupts it.

        The `last` one of a start takes the room that was kept back for it. Raises CacheWriteError.
        """
        if not self.accelerator.is_main_process or self._saved == self.step:
            return
        scaler, reserve = self.accelerator.scaler, self.reserve if last else None
        state = {
            "config": asdict(self.config),
            "global_batch": self.global_batch,
            "max_steps": self.max_steps,
            # Of a folder the whole path: a checkpoint may be used from elsewhere.
            "base": {
                "name": self.base.name if self.base.revision else str(self.base.path),
                "revision": self.base.revision,
            },
            "noise_schedule": self.base_facts["scheduler"].digest,
            "samples_seen": self.loader.consumed,
            "tables": dict(self.tables),
            "adapted": self.adapted,
            **({} if self.class_rows is None else {"class_rows": self.class_rows.digest}),
            "loader": self.loader.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "grad_scaler": None if scaler is None else scaler.state_dict(),
        }
        with shielded():
            self.have_place()
            write, limit = partial(self._write_tensors, reserve=reserve), self.config.checkpoints_total_limit
            save_checkpoint(self.output_dir, self.step, write, state, limit, reserve)
            self._saved = self.step

    def _write_tensors(self, folder: Path, reserve: Reserve | None) -> None:
        save_network(self.config.stage, self.network, folder, reserve)
        save_tensors(optimizer_tensors(self.optimizer, self.network), folder / OPTIMIZER_FILE, reserve=reserve)
        if self.average is not None:
            names = trainable_parameters(self.network)
            averages = dict(zip(names, self.average.shadow_params, strict=True))
            save_tensors(averages, folder / AVERAGE_FILE, reserve=reserve)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take back from `checkpoint` what `save` put there; network and loader have theirs already.

        Raises RunError when something of it is missing or does not fit.
        """
        state = checkpoint.state
        restore_optimizer(checkpoint.path / OPTIMIZER_FILE, self.optimizer, self.network)
        if self.average is not None:
            restore_average(checkpoint.path / AVERAGE_FILE, self.average, self.network, checkpoint.step)
        try:
            self.lr_scheduler.load_state_dict(dict(state["lr_scheduler"]))
            go_on(self.lr_scheduler, self.optimizer, checkpoint.step)
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["grad_scaler"])
        except KcacheError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunError(
                f"{checkpoint.path} does not hold the state of such a run ({error!r}); expected what a run with these "
                "settings writes; resume from another checkpoint"
            ) from error
        if self.one_by_one is not None:
            self.one_by_one.steps = checkpoint.step
        self.first_step = self.step = self._saved = checkpoint.step
