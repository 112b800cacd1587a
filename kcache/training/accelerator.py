"""Where a run computes and what it is watched by: processes, device, precision and trackers, by accelerate."""

import atexit
import logging
import os
import platform
import warnings
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import GradientAccumulationPlugin

from kcache.config import TrainConfig
from kcache.errors import ConfigError, RunError
from kcache.machine import usable_cores

logger = logging.getLogger(__name__)

_SPLITTING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
"""What accelerate's launcher sets for the ways of training that give each process only a part of the weights."""


def machine_facts(accelerator: Accelerator) -> dict[str, str | int | None]:
    """On what a run computes: the device, the processes, the cores and system of this machine, Python's version."""
    device = accelerator.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": accelerator.num_processes,
        "cores": usable_cores(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator of a run: the launcher's processes and device, the precision and the trackers of `config`.

    Raises ConfigError for a precision that the device does not have, for a tracker that is not installed, and when the
    launcher was told to split the weights among the processes.
    """
    _check_whole_weights()
    trackers = choose_trackers(config.report_to)
    # accelerate keeps the first run's precision for the whole process, and refuses another one.
    AcceleratorState._reset_state(reset_partial_state=True)
    group_is_ours = not torch.distributed.is_initialized()
    accumulation = GradientAccumulationPlugin(num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False)
    try:
        accelerator = Accelerator(
            # Several processes on a machine without an accelerator: left to itself, each would think it was alone.
            cpu=not torch.accelerator.is_available(),
            mixed_precision=config.mixed_precision,
            gradient_accumulation_plugin=accumulation,
            log_with=trackers or None,
            project_dir=Path(config.output_dir) / config.logging_dir,
        )
        if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
            raise ValueError("on a CPU, accelerate would silently take float32")
    except ValueError as error:
        raise ConfigError(
            f"--mixed-precision {config.mixed_precision} cannot be used here: {error}; expected a device that has it; "
            "use bf16, or no for float32"
        ) from error
    if group_is_ours and torch.distributed.is_initialized():
        atexit.register(_leave_process_group)
    # Of a gradient of a 1×1 convolution, whose strides along the sides of length 1 may be any: it lies in memory as its
    # weight does.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    if config.deterministic:
        # cuBLAS is deterministic only with a workspace of fixed size, which it reads when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)
    if torch.distributed.is_initialized():
        _patient_group(torch.distributed.group.WORLD)  # which all have to make together
    return accelerator


def wait_for_all() -> None:
    """Wait until all processes of a run are here, however long one of them works by itself.

    Collectives have a bound on the time that one process waits for another: where one alone writes, draws or uploads,
    the others wait here before the next. Raises RunError as soon as another process has ended.
    """
    if not torch.distributed.is_initialized():
        return
    try:
        torch.distributed.barrier(group=_patient_group(torch.distributed.group.WORLD))
    except RuntimeError as error:
        raise _alone() from error


def check_others(error: Exception) -> None:
    """Raise RunError when `error` is what a collective makes of a process that has ended."""
    if isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
        raise _alone() from error


def _alone() -> RunError:
    return RunError("another process of this run has ended, upon which this one ends, too; what it said is the reason")


@lru_cache(maxsize=1)
def _patient_group(world: Any) -> Any:
    """A group of all processes beside `world`, which is a new one when the processes have come together anew."""
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(days=30))


def choose_trackers(report_to: str) -> list[str]:
    """accelerate's names of the trackers that `report_to` asks for: one, "all" that are installed, or "none".

    Without tensorboard, which is asked for when nothing else is, there is none. Raises ConfigError for another tracker
    that is not installed or not known.
    """
    installed = [str(tracker) for tracker in get_available_trackers()]
    if report_to == "all":
        return installed
    if report_to == "none" or report_to in installed:
        return [] if report_to == "none" else [report_to]
    if report_to == "tensorboard":
        logger.info("tensorboard is not installed; metrics.jsonl and loss.png are written all the same")
        return []
    known = ", ".join(sorted(map(str, LOGGER_TYPE_TO_CLASS)))
    raise ConfigError(
        f"--report-to is {report_to!r}; found {', '.join(installed) or 'no tracker'} installed; expected one of "
        f"{known}, all or none; install its package or choose another"
    )


def _check_whole_weights() -> None:
    asked = [name for variable, name in _SPLITTING.items() if os.environ.get(variable, "").lower() == "true"]
    if asked:
        raise ConfigError(
            f"accelerate is set up for {', '.join(asked)}, which gives each process a part of the weights; expected "
            "data parallelism, each process with all of them, as checkpoints are written from one; run `accelerate "
            "config` again and answer no to it, or launch with torchrun: torchrun --nproc-per-node 8 -m kcache_cli …"
        )


def _leave_process_group() -> None:
    # At exit, when nothing refers to a prepared objective any more: gloo's threads can deadlock with one that is freed
    # after its group. And not later: left to the interpreter's own end, they can abort the process.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
