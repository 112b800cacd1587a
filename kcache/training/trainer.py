"""The training loop, one for both stages: batches of cached rows in, a trained network out.

Every so many steps it saves a checkpoint, validates on held-out samples, draws pictures of fixed prompts and plots.
"""

import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator

from kcache.config import TrainConfig
from kcache.loader.batches import Batch
from kcache.loader.chance import draw_seed
from kcache.machine import kept_to_groups
from kcache.stopping import signal_asked, stop_here, stopped_when_safe
from kcache.store.cache import Cache
from kcache.training.accelerator import wait_for_all
from kcache.training.log import Progress, RunLog
from kcache.training.network.limits import within_run_memory
from kcache.training.publish import check_publishing, publish_run
from kcache.training.result import room_kept, write_result
from kcache.training.resume import check_output_dir
from kcache.training.run import TrainingRun
from kcache.training.setup import prepare_run
from kcache.training.validation import Evaluation

logger = logging.getLogger(__name__)

_ALONE_SECONDS = 10.0
"""For which one of several processes that is to stop waits for a batch, before it stops by itself in the middle of a
step: at the end of one they stop together, but launchers kill what has not ended after 30 seconds."""


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
    address: str | None = None
    """Where the result was uploaded to."""


def train(
    cache: str | Path | Cache, config: TrainConfig, *, report: Callable[[Progress], None] | None = None
) -> TrainResult:
    """Train the prior or the decoder from `cache`, opened or its path, as `config` says, into `config.output_dir`.

    `report` is called every few optimizer steps, in the main process; what it raises is logged. On any of
    `STOP_SIGNALS` the step is finished and a checkpoint saved, or the result after the last step, then
    KeyboardInterrupt or SystemExit(128 + its number) raised. A checkpoint of the last step is saved before the result,
    and one of the last whole step where something fails.
    torch's global generators are seeded at each step. Raises a KcacheError for what does not fit together, all checked
    before the first step; RunError when a loss or gradient is no longer finite, when the result cannot be written, and
    when one that is whole could not be uploaded; MemoryShortError, with the settings that take less, when memory runs
    out; CacheBusyError when another run goes on in that directory.
    """
    with within_run_memory(config):
        check_publishing(config)
        check_output_dir(config)
        run = prepare_run(cache, config)
        with run.run_directory_held(), room_kept(run):
            return _train(run, report)


def _train(run: TrainingRun, report: Callable[[Progress], None] | None) -> TrainResult:
    config, accelerator = run.config, run.accelerator
    if accelerator.is_main_process:
        run.begin()
    log = RunLog(run)
    evaluation = Evaluation(run, log)
    wait_for_all()
    log.restart_clock()
    progress, begun, seen = None, time.perf_counter(), run.loader.consumed

    with closing(log), closing(run.loader.forever()) as batches, stopped_when_safe() as caught, _waits_ended(run, log):
        while run.step < run.max_steps:
            lr = float(run.lr_scheduler.get_last_lr()[0])
            with kept_to_groups(accelerator.device.type):
                loss, grad_norm = take_step(run, batches)
            step = run.step
            log.add(step, lr, loss, grad_norm)

            last = step == run.max_steps
            save, evaluate, stopping = last or step % config.checkpointing_steps == 0, evaluation.is_due(step), 0
            if save or evaluate or log.is_due(step) or (caught and accelerator.num_processes == 1):
                with run.kept_on_failure():
                    progress, stopping = log.fetch(), _stop_asked(accelerator)
                if report is not None and accelerator.is_main_process:
                    with run.decoration("progress could not be shown"):
                        report(progress)
            if save or stopping:
                run.save_if_possible(stopping=bool(stopping))
            if evaluate and not stopping:
                stopping = _look(run, evaluation)
            if save or evaluate or stopping:
                wait_for_all()
                log.restart_clock()
            if stopping:
                _stop(run, stopping)

        seconds = time.perf_counter() - begun
        if accelerator.is_main_process:
            write_result(run)
        wait_for_all()
        stop_here()
    publishes = config.push_to_hub and accelerator.is_main_process
    address = publish_run(run.output_dir, config.hub_model_id) if publishes else None
    wait_for_all()
    return TrainResult(
        output_dir=config.output_dir,
        step=run.step,
        loss=None if progress is None else progress.loss,
        seconds=seconds,
        samples_per_second=(run.loader.consumed - seen) / seconds,
        address=address,
    )


class _EndOfWait(BaseException):
    """A process that waits for a batch was asked to stop."""


@contextmanager
def _waits_ended(run: TrainingRun, log: RunLog) -> Iterator[None]:
    """In the block, whoever is asked to stop does not wait for a batch any longer, but stops after the last whole step.

    One of several processes waits for `_ALONE_SECONDS` before, and then takes no others with it: these fail as soon as
    they miss it, and keep what they have.
    """
    alone = run.accelerator.num_processes == 1

    def end(seconds: float) -> None:
        if signal_asked() and (alone or seconds >= _ALONE_SECONDS):
            raise _EndOfWait

    run.loader.while_waiting = end
    try:
        yield
    except _EndOfWait:
        if alone:
            with run.kept_on_failure():
                if log.has_unfetched:
                    log.fetch()
            run.save_if_possible(stopping=True)
        else:
            run.keep("stopped while waiting")
        _stop(run, signal_asked() or 0)


def _look(run: TrainingRun, evaluation: Evaluation) -> int:
    """Evaluate, and give the signal that a process was asked to stop by meanwhile, upon which a checkpoint is saved."""
    with run.kept_on_failure():
        evaluation.look(run.step)
        wait_for_all()
    if stopping := _stop_asked(run.accelerator):
        run.save_if_possible(stopping=True)
    return stopping


def take_step(run: TrainingRun, batches: Iterator[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step: what is logged of this process's batches, and the gradient's norm before it was clipped.

    The first is their mean loss, or several parts of it, (logged,). Nothing here waits for the device that both are on.
    """
    config, accelerator, losses = run.config, run.accelerator, []
    with run.kept_on_failure():
        for _ in range(config.gradient_accumulation_steps):
            batch = next(batches)
            # For dropout, which draws from torch's own generator. On the CPU that one alone: for those of other devices
            # torch notes each time who asks, which takes as long as a tiny step.
            seed = torch.default_generator.manual_seed if accelerator.device.type == "cpu" else torch.manual_seed
            seed(draw_seed(config.seed, run.loader.consumed + accelerator.process_index))
            with accelerator.accumulate(run.objective):
                loss = run.objective(batch, batch["noise"], batch["timesteps"], config.snr_gamma)
                loss = loss * run.loader.weight  # a sample of a rare shape counts as much as any other
                accelerator.backward(loss)
            losses.append(run.raw_objective.told(loss))
        if run.one_by_one is not None and config.fused_backward:
            grad_norm = run.one_by_one.take_norm()
        else:
            grad_norm = accelerator.clip_grad_norm_(run.objective.parameters(), config.max_grad_norm)
    run.optimizer.step()
    run.lr_scheduler.step()
    run.optimizer.zero_grad()
    if run.average is not None:
        run.average.step(run.learning)
    run.step += 1
    return torch.stack(losses).mean(0), grad_norm


def _stop_asked(accelerator: Accelerator) -> int:
    """The signal that one of the processes was asked to stop by, 0 when none was: all of them stop together."""
    return int(accelerator.gather(torch.tensor([signal_asked() or 0], device=accelerator.device)).max())


def _stop(run: TrainingRun, number: int) -> NoReturn:
    if run.accelerator.is_main_process:
        name = signal.Signals(number).name
        logger.warning("stopped by %s; go on with: --resume-from-checkpoint latest", name)
    stop_here()
    raise SystemExit(128 + number)  # another process was asked
