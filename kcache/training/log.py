"""How a run goes, step by step: fetched from the device now and then, written to metrics.jsonl and to the trackers."""

import math
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kcache.errors import RunError
from kcache.store.run_directory import METRICS_FILE, append_metrics
from kcache.training.run import TrainingRun

if TYPE_CHECKING:
    from PIL import Image

LOG_STEPS = 10
"""Optimizer steps for which losses wait on the device: fetching them makes the host wait until it is done."""
SLOW_SECONDS = 0.5
"""What a step takes where that wait is nothing beside it, and ten steps are long to wait: for a first sign of life, and
for a checkpoint after a signal, as launchers kill what has not ended after 30 seconds."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run has come."""

    step: int
    """Optimizer steps done, those of earlier starts of the run included."""
    max_steps: int
    loss: float
    """Mean over the steps since the last report."""
    lr: float
    """Learning rate of the last step."""
    samples_per_second: float
    """Of all processes together, since the last report."""
    waits: Mapping[str, float]
    """Shares of the time since the last report (0 to 1) that this process waited for streamed rows, by what for: the
    "store", "verification" and "copying"; empty where rows are not streamed."""


class RunLog:
    """Losses and gradient norms, which wait on the device until they are fetched and written together."""

    def __init__(self, run: TrainingRun) -> None:
        self._run = run
        self._steps: list[tuple[int, float]] = []
        self._values: list[torch.Tensor] = []
        self.restart_clock()
        self._slow, self._step_seconds = True, SLOW_SECONDS  # until that is known
        # Trackers take plain values only.
        plain = {
            name: value for name, value in asdict(run.config).items() if isinstance(value, bool | int | float | str)
        }
        accelerator, begun = run.accelerator, []
        for name in list(accelerator.log_with):
            with run.decoration(f"{name} could not be begun"):
                accelerator.log_with, accelerator.trackers = [name], []
                accelerator.init_trackers(run.config.tracker_project_name, config=plain)
                begun += accelerator.trackers
        accelerator.trackers = begun

    def track(self, entry: Mapping[str, Any]) -> None:
        """Tell the trackers; `entry` has the step and the values."""
        values = {name: value for name, value in entry.items() if name != "step"}
        for tracker in self._run.accelerator.trackers:
            with self._run.decoration(f"{tracker.name} could not be told"):
                tracker.log(values, step=entry["step"])

    def track_pictures(self, step: int, pictures: "Sequence[Image.Image]") -> None:
        """Show pictures to those trackers that take some: tensorboard, those of each size together, and wandb."""
        sizes = dict.fromkeys(picture.size for picture in pictures)
        for tracker in self._run.accelerator.trackers:
            with self._run.decoration(f"{tracker.name} could not be shown the pictures"):
                if tracker.name == "tensorboard":
                    for size in sizes:
                        alike = [np.asarray(each.convert("RGB")) for each in pictures if each.size == size]
                        name = "validation" if len(sizes) == 1 else "validation {1}x{0}".format(*size)
                        tracker.log_images({name: np.stack(alike)}, step=step, dataformats="NHWC")
                elif tracker.name == "wandb":
                    tracker.log_images({"validation": list(pictures)}, step=step)

    def close(self) -> None:
        """Let the trackers finish what they have."""
        # Not the accelerator's end_training, which takes the process group from the next run in these processes.
        for tracker in self._run.accelerator.trackers:
            with self._run.decoration(f"{tracker.name} could not finish"):
                tracker.finish()

    def add(self, step: int, lr: float, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """Keep a step's values: what the objective has `logged`, and a 0-dimensional norm, of this process alone."""
        self._steps.append((step, lr))
        self._values.append(torch.cat([loss.reshape(-1), grad_norm.reshape(1)]))

    def is_due(self, step: int) -> bool:
        """Whether to fetch after optimizer step `step`; the same in all processes."""
        return self._slow or step % LOG_STEPS == 0 or step == self._run.max_steps

    @property
    def has_unfetched(self) -> bool:
        """Whether there is something to fetch."""
        return bool(self._values)

    def restart_clock(self) -> None:
        """Leave the time since the last fetch out of the speed."""
        self._since, self._waited = time.perf_counter(), self._run.loader.waited
        self._waits, self._consumed = self._run.loader.waits, self._run.loader.consumed

    def fetch(self) -> Progress:
        """Write the steps kept to metrics.jsonl, averaged over all processes.

        Raises RunError at one that is not finite.
        """
        accelerator = self._run.accelerator
        # With them goes what this process knows of its speed: all have to agree on when to fetch.
        speed = torch.full_like(self._values[0], self._step_seconds)
        *values, (seconds, *_) = accelerator.reduce(torch.stack([*self._values, speed]), "mean").tolist()
        now = time.perf_counter()
        self._slow, self._step_seconds = seconds >= SLOW_SECONDS, (now - self._since) / len(values)
        rate = (self._run.loader.consumed - self._consumed) / (now - self._since)
        waits = self._shares_of_waiting(now - self._since)
        use = {"samples_per_second": rate, **self._use(now - self._since)}
        use |= {f"wait_{name}": share for name, share in waits.items()}
        names = self._run.raw_objective.logged
        entries = [
            {"step": step, **dict(zip(names, losses, strict=True)), "grad_norm": norm, "lr": lr, **use}
            for (step, lr), (*losses, norm) in zip(self._steps, values, strict=True)
        ]
        self._steps, self._values, self._since, self._consumed = [], [], now, self._run.loader.consumed
        for entry in entries:
            _check_finite(entry, scaled=accelerator.scaler is not None)
        if accelerator.is_main_process:
            with self._run.decoration(f"{self._run.output_dir / METRICS_FILE} could not be written"):
                append_metrics(self._run.output_dir, entries)
        for entry in entries:
            self.track(entry)
        return Progress(
            step=int(entries[-1]["step"]),
            max_steps=self._run.max_steps,
            loss=sum(entry["loss"] for entry in entries) / len(entries),
            lr=entries[-1]["lr"],
            samples_per_second=rate,
            waits=waits,
        )

    def _shares_of_waiting(self, seconds: float) -> dict[str, float]:
        """What this process has waited for in the last `seconds`, as shares of them, where rows are streamed."""
        waits, before = self._run.loader.waits, self._waits
        self._waits = waits
        return {name: min(1.0, (total - before.get(name, 0.0)) / seconds) for name, total in waits.items()}

    def _use(self, seconds: float) -> dict[str, float]:
        """What this process has used of the last `seconds` to wait for batches, a share, and of memory, at most."""
        waited, self._waited = self._run.loader.waited - self._waited, self._run.loader.waited
        device = self._run.accelerator.device
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(device)
        else:  # all that the process had, which the system counts in kilobytes, but for macOS
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"loader_wait": min(1.0, waited / seconds), "peak_memory_bytes": memory}


def _check_finite(entry: dict[str, Any], scaled: bool) -> None:
    # With scaled gradients an overflow is expected now and then: the scaler skips that step and scales less.
    if math.isfinite(entry["loss"]) and (scaled or math.isfinite(entry["grad_norm"])):
        return
    raise RunError(
        f"at step {entry['step']} the loss is {entry['loss']} and the gradient's norm {entry['grad_norm']}; expected "
        "finite values; the checkpoints before it are good: resume from the latest, or start a new run with a lower "
        "--learning-rate or another --mixed-precision"
    )
