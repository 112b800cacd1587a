"""What a run is judged by while it goes on: the loss on held-out samples, pictures of fixed prompts, and its curves."""

import math

from kcache.curves import plot_run
from kcache.export import COMPONENTS
from kcache.optimizer import averaged
from kcache.pictures import PromptPictures, save_pictures
from kcache.repositories import Repository, find_repository
from kcache.run_directory import append_validation
from kcache.run_log import RunLog
from kcache.training_run import TrainingRun
from kcache.validation import Validation

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
        self._pictures = None
        if config.validation_prompts and accelerator.is_main_process:
            self._pictures = PromptPictures(
                config, run.base, _find_counterpart(run), _picture_side(run), accelerator.device
            )
            self._pictures.prepare()

    def is_due(self, step: int) -> bool:
        """Whether to look after optimizer step `step`; the same in all processes."""
        asked = self._validation is not None or bool(self._run.config.validation_prompts)
        return asked and (step % self._every == 0 or step == self._run.max_steps)

    def judge(self, step: int) -> None:
        """Look at the run after optimizer step `step`; in all processes. It tells validation.jsonl and loss.png."""
        run, network = self._run, self._run.network
        with averaged(run.average, network):
            if self._validation is not None:
                with run.accelerator.autocast():
                    totals = self._validation.totals()
                entry = {"step": step, **self._validation.summary(run.accelerator.reduce(totals, "sum"))}
                self._log.track(entry)
                if run.accelerator.is_main_process:
                    append_validation(run.output_dir, entry)
            if self._pictures is not None:
                drawn = self._pictures.draw(network)
                save_pictures(run.output_dir, step, drawn, self._pictures.prompts)
                self._log.track_pictures(step, drawn)
        if run.accelerator.is_main_process:
            plot_run(run.output_dir)


def _find_counterpart(run: TrainingRun) -> Repository:
    half, components = ("decoder", "unet") if run.config.stage == "prior" else ("prior", "prior")
    origin = run.cache.models.get(half, {})
    # A --revision is of the repository that is trained, and names nothing in this one.
    revision = origin.get("revision") if origin.get("name") == run.counterpart else None
    return find_repository(run.counterpart, revision, COMPONENTS[components], run.config.cache_dir)


def _picture_side(run: TrainingRun) -> int:
    """The resolution that is trained at, in pixels; for a prior that of the cache's latents, if it has any."""
    sides = [int(table.removeprefix("latents-")) for table in run.cache.recipes if table.startswith("latents-")]
    return run.config.resolution or (max(sides) if sides else RESOLUTION)
