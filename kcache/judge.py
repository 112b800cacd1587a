"""What a run is judged by while it goes on: the loss on held-out samples, pictures of fixed prompts, and its curves."""

import math
from typing import TYPE_CHECKING

from kcache.compilation import uncompiled
from kcache.curves import plot_run
from kcache.optimizer import averaged
from kcache.run_directory import append_validation
from kcache.run_log import RunLog
from kcache.training_run import TrainingRun
from kcache.validation import Validation

if TYPE_CHECKING:
    from kcache.pictures import PromptPictures

__all__ = ["Judge"]

BATCH_SIZE = 8
"""Held-out samples at a time, at least: without gradients they need little memory."""
RESOLUTION = 512
"""Side of the pictures, in pixels, when the cache says none: what the pipelines draw unasked."""


class Judge:
    """Looks at a run every so many steps and at its end; with a moving average of the weights, at that."""

    def __init__(self, run: TrainingRun, log: RunLog) -> None:
        """Makes ready; raises the KcacheError of pictures that cannot be drawn, before the first step."""
        self._run = run
        self._log = log
        config, accelerator = run.config, run.accelerator
        epochs = math.ceil(config.validation_epochs * len(run.cache) / run.global_batch)
        self._every = config.validation_steps or epochs
        self._validation = None
        if run.held_out is not None:
            self._validation = Validation(
                run.held_out,
                run.raw_objective,
                batch_size=max(config.train_batch_size, BATCH_SIZE),
                seed=config.seed,
                device=accelerator.device,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
            )
        self._pictures = _make_pictures(run)

    def is_due(self, step: int) -> bool:
        """Whether to look after optimizer step `step`; the same in all processes."""
        asked = self._validation is not None or bool(self._run.config.validation_prompts)
        return asked and (step % self._every == 0 or step == self._run.max_steps)

    def judge(self, step: int) -> None:
        """Look at the run after optimizer step `step`; in all processes. It tells validation.jsonl and loss.png."""
        run, network = self._run, self._run.network
        with averaged(run.average, network), uncompiled(run.config.compile):
            if self._validation is not None:
                with run.accelerator.autocast():
                    totals = self._validation.totals()
                entry = {"step": step, **self._validation.summary(run.accelerator.reduce(totals, "sum"))}
                self._log.track(entry)
                if run.accelerator.is_main_process:
                    append_validation(run.output_dir, entry)
            if self._pictures is not None:
                from kcache.pictures import save_pictures

                drawn = self._pictures.draw(network)
                save_pictures(run.output_dir, step, drawn, self._pictures.prompts)
                self._log.track_pictures(step, drawn)
        if run.accelerator.is_main_process:
            plot_run(run.output_dir)


def _make_pictures(run: TrainingRun) -> "PromptPictures | None":
    if run.counterpart is None or not run.accelerator.is_main_process:
        return None
    # Not at the top: the pipelines bring the encoders' libraries with them, which few runs need.
    from kcache.pictures import PromptPictures

    pictures = PromptPictures(run.config, run.base, run.counterpart, _picture_side(run), run.accelerator.device)
    pictures.prepare()
    return pictures


def _picture_side(run: TrainingRun) -> int:
    """The resolution that is trained at, in pixels; for a prior that of the cache's latents, if it has any."""
    sides = [int(table.removeprefix("latents-")) for table in run.cache.recipes if table.startswith("latents-")]
    return run.config.resolution or (max(sides) if sides else RESOLUTION)
