"""The training loop, one for both stages: batches of cached rows in, a trained network out."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from kcache.config import DECODER_REPO, PRIOR_REPO, TrainConfig
from kcache.errors import RunError
from kcache.export import export_run
from kcache.run_directory import append_metrics
from kcache.training_run import TrainingRun, prepare_run

__all__ = ["Progress", "TrainResult", "train"]

LOG_STEPS = 10
"""Optimizer steps for which losses wait on the device: fetching them makes the host wait until it is done."""


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


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run came to."""

    output_dir: str
    step: int
    """Optimizer steps done, those of earlier starts of the run included."""
    loss: float | None
    """Mean over the last steps reported; None when nothing was left to do."""
    seconds: float
    """Time in the loop, checkpoints included."""
    samples_per_second: float
    """Of all processes together, over `seconds`."""


def train(cache: str, config: TrainConfig, *, report: Callable[[Progress], None] | None = None) -> TrainResult:
    """Train the prior or the decoder from the cache at `cache`, as `config` says, into `config.output_dir`.

    `report` is called every few optimizer steps, in the main process. On SIGINT or SIGTERM the step is finished and a
    checkpoint saved, then KeyboardInterrupt or SystemExit(143) raised. Raises a KcacheError for what does not fit
    together, all checked before the first step, and RunError when a loss or gradient is no longer finite.
    """
    run = prepare_run(cache, config)
    accelerator, objective, optimizer, lr_scheduler = run.accelerator, run.objective, run.optimizer, run.lr_scheduler
    step, progress, begun = run.first_step, None, time.perf_counter()
    log = _Log(run)

    with closing(run.loader.forever()) as batches, _caught_signals() as caught:
        while step < run.max_steps:
            losses = []
            for _ in range(config.gradient_accumulation_steps):
                batch = next(batches)
                with accelerator.accumulate(objective):
                    loss = objective(batch, batch["noise"], batch["timesteps"], config.snr_gamma)
                    accelerator.backward(loss)
                losses.append(loss.detach())
            grad_norm = accelerator.clip_grad_norm_(objective.parameters(), config.max_grad_norm)
            lr = float(lr_scheduler.get_last_lr()[0])
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            step += 1
            log.add(step, lr, torch.stack(losses).mean(), grad_norm)

            due = step % config.checkpointing_steps == 0
            stopping = False
            if due or step % LOG_STEPS == 0 or step == run.max_steps or (caught and accelerator.num_processes == 1):
                progress = log.fetch()
                stopping = _any_process(accelerator, caught)
                if report is not None and accelerator.is_main_process:
                    report(progress)
            if (due or stopping) and accelerator.is_main_process:
                run.save(step)
                log.restart_clock()
            if stopping:
                raise KeyboardInterrupt if signal.SIGINT in caught else SystemExit(128 + signal.SIGTERM)

    seconds = time.perf_counter() - begun
    if accelerator.is_main_process:
        _export(run, step)
    accelerator.wait_for_everyone()
    return TrainResult(
        output_dir=config.output_dir,
        step=step,
        loss=None if progress is None else progress.loss,
        seconds=seconds,
        samples_per_second=(step - run.first_step) * run.global_batch / seconds,
    )


class _Log:
    """Losses and gradient norms, which wait on the device until they are fetched and written together."""

    def __init__(self, run: TrainingRun) -> None:
        self._run = run
        self._steps: list[tuple[int, float]] = []
        self._values: list[torch.Tensor] = []
        self._since = time.perf_counter()

    def add(self, step: int, lr: float, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """Keep a step's values: 0-dimensional tensors, of this process alone."""
        self._steps.append((step, lr))
        self._values.append(torch.stack([loss, grad_norm]))

    def restart_clock(self) -> None:
        """Leave the time since the last fetch out of the speed."""
        self._since = time.perf_counter()

    def fetch(self) -> Progress:
        """Write the steps kept to metrics.jsonl, averaged over all processes.

        Raises RunError at one that is not finite.
        """
        accelerator = self._run.accelerator
        values = accelerator.reduce(torch.stack(self._values), "mean").tolist()
        now = time.perf_counter()
        rate = len(values) * self._run.global_batch / (now - self._since)
        entries = [
            {"step": step, "loss": loss, "grad_norm": norm, "lr": lr, "samples_per_second": rate}
            for (step, lr), (loss, norm) in zip(self._steps, values, strict=True)
        ]
        self._steps, self._values, self._since = [], [], now
        for entry in entries:
            _check_finite(entry, scaled=accelerator.scaler is not None)
        if accelerator.is_main_process:
            append_metrics(self._run.output_dir, entries)
        return Progress(
            step=int(entries[-1]["step"]),
            max_steps=self._run.max_steps,
            loss=sum(entry["loss"] for entry in entries) / len(entries),
            lr=entries[-1]["lr"],
            samples_per_second=rate,
        )


def _check_finite(entry: dict[str, Any], scaled: bool) -> None:
    # With scaled gradients an overflow is expected now and then: the scaler skips that step and scales less.
    if math.isfinite(entry["loss"]) and (scaled or math.isfinite(entry["grad_norm"])):
        return
    raise RunError(
        f"at step {entry['step']} the loss is {entry['loss']} and the gradient's norm {entry['grad_norm']}; expected "
        "finite values; the checkpoints before it are good: resume from the latest, or start a new run with a lower "
        "--learning-rate or another --mixed-precision"
    )


def _any_process(accelerator: Any, caught: list[int]) -> bool:
    return bool(accelerator.reduce(torch.tensor(len(caught), device=accelerator.device)))


@contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM are added to instead of ending the process; a second one acts as it would have."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def catch(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        signal.signal(number, previous[signal.Signals(number)])

    for number in previous:
        signal.signal(number, catch)
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _export(run: TrainingRun, step: int) -> None:
    config, models = run.config, run.cache.models
    if config.stage == "prior":
        half, given, default = "decoder", config.pretrained_decoder_model_name_or_path, DECODER_REPO
    else:
        half, given, default = "prior", config.pretrained_prior_model_name_or_path, PRIOR_REPO
    counterpart = given or str(models.get(half, {}).get("name") or default)
    facts = {
        "cache": f"{len(run.cache)} samples of {run.cache.path}",
        "tables": ", ".join(f"{name} {fingerprint[:8]}" for name, fingerprint in run.tables.items()),
        "steps": f"{step} of {run.global_batch} samples",
        "settings": "config.json",
    }
    export_run(
        run.output_dir,
        run.raw_objective.network_name,
        run.raw_objective.network,
        run.base,
        counterpart=counterpart,
        copy=config.export_pipeline,
        facts=facts,
    )
