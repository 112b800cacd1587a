"""What a run is looked at by: the loss on samples that are never trained on, pictures of fixed prompts, curves.

Held-out samples are always met at the same noise and timesteps, so that what changes their loss is learning.

Which images those are is decided by each image's key alone, so that every run holds out the same ones.
"""

import hashlib
import math
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import wait
from contextlib import closing
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from kcache.decoration import drawing
from kcache.errors import ConfigError
from kcache.loader.batches import POLL_SECONDS
from kcache.loader.turns import draw_turns
from kcache.objectives.blocks import evaluating, uncompiled
from kcache.objectives.errors import Batch
from kcache.objectives.hinting import hint_field
from kcache.objectives.losses import Objective
from kcache.report.drawn.sizes import shown_shapes
from kcache.report.figures import plot_run
from kcache.stopping import Crew, signal_asked
from kcache.store.cache import Cache
from kcache.store.digests import KEY_BYTES
from kcache.store.formats.columns import packed
from kcache.store.run_directory import CURVES_FILE, VALIDATION_FILE, append_validation
from kcache.training.log import RunLog
from kcache.training.optimizer.average import averaged
from kcache.training.run import TrainingRun

if TYPE_CHECKING:
    from kcache.report.held_out import HeldOutPictures
    from kcache.report.pictures import PromptPictures

MAX_SAMPLES = 1024
"""Samples looked at, however many are held out: their mean is known to 3 % (1 / √1024) of the spread of one."""
BANDS = 4
"""Equal parts of the timesteps: the loss of nearly clean samples and that of nearly pure noise move differently."""


def split_by_key(cache: Cache, fraction: float) -> tuple[Cache, Cache]:
    """The samples to train on, and those held out: of all images about `fraction`, 0 to 1, each with all its samples.

    An image is held out when its `key_numbers` is below `fraction` × 2⁶⁴. It is on the same side in every run, whatever
    joins the cache or leaves it, and what a smaller fraction holds out a larger one does too. Raises ConfigError when
    either side is empty.
    """
    held_out = key_numbers(cache) < int(fraction * 2**64)
    if held_out.all() or not held_out.any():
        images = len({*chain.from_iterable(part["image_key"].to_pylist() for _, part in cache.parts(["image_key"]))})
        raise ConfigError(
            f"--val-fraction {fraction} holds out {'all' if held_out.any() else 'none'} of the {images:,} images of "
            f"{cache.path}; expected some to train on and some to validate with; give another fraction or more images"
        )
    return cache.select(np.flatnonzero(~held_out)), cache.select(np.flatnonzero(held_out))


def key_numbers(cache: Cache) -> np.ndarray:
    """A number for each sample, (N,) uint64: the first eight bytes, big-endian, of the sha256 of its image's key."""
    numbers = np.empty(len(cache), np.uint64)
    for samples, part in cache.parts(["image_key"]):
        keys = packed(part["image_key"]).tobytes()
        starts = range(0, len(keys), KEY_BYTES)
        digests = b"".join([hashlib.sha256(keys[start : start + KEY_BYTES]).digest() for start in starts])
        numbers[samples] = np.frombuffer(digests, ">u8")[::4]
    return numbers


class Validation:
    """Measures an objective on held-out samples; equal weights give equal numbers, however often it is asked.

    Of `cache`, which holds the held-out samples only, the first 1,024 in order of their `key_numbers` are taken, each
    with its first caption and nothing dropped. A sample meets one noise and one timestep of each band, the same place
    in every band; both follow from `seed` and the image's key, so they are the same in every run and beside any other
    samples. Of several resolutions a picture has the same place at each, so that they are compared at equal timesteps,
    and noise from one stream of numbers, laid out as its rows are. Process `rank` of `world_size` measures its share.
    """

    def __init__(
        self,
        cache: Cache,
        objective: Objective,
        *,
        batch_size: int,
        seed: int,
        device: str | torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._objective = objective
        self._parts = [
            _Share(part, samples[rank::world_size], turns[rank::world_size])
            for part, samples, turns in _looked_at(cache, tuple(objective.row_shapes))
        ]
        self._resolutions = sorted({part.cache.resolution or 0 for part in self._parts})
        self._batch_size = batch_size
        self._seed = seed
        self._device = torch.device(device)
        self._width = objective.scheduler.config.num_train_timesteps // BANDS

    def totals(self) -> Tensor:
        """What this process's samples add up to, (bands, 1 + measures) float32 on the device: a count, then the sums.

        There are BANDS bands for each resolution.

        Added up over all processes it is what `summary` wants. The network runs without gradients in evaluation mode,
        and is left as it was; no generator of random numbers is touched. Precision is the caller's, by autocast.
        Where a signal asks to stop they are NaN at once: nobody waits that long.
        """
        totals, seen = (
            torch.zeros(len(self._resolutions) * BANDS, 1 + len(self._objective.measures), device=self._device),
            0,
        )
        with torch.no_grad(), evaluating(self._objective), closing(self._batches()) as batches:
            for resolution, batch, noise, places in batches:
                seen += len(places)
                for band in range(BANDS):
                    row = self._resolutions.index(resolution) * BANDS + band
                    totals[row, 0] += len(places)
                    totals[row, 1:] += self._objective.measure(batch, noise, places + band * self._width).sum(1)
        return totals if seen == sum(len(part.samples) for part in self._parts) else totals.fill_(math.nan)

    def summary(self, totals: Tensor) -> dict[str, float]:
        """Means by name: val_loss, val_loss_t000_249 and so on for each band of timesteps, and val_cosine of the prior.

        The loss is the mean squared error over whole rows, unweighted; val_loss is its mean over all bands. Of several
        resolutions there is val_loss_768px, too, for each. val_cosine is the mean cosine of the angle between
        the image embedding that the prior predicts and the true one, and val_hole the loss where a mask has its hole.
        """
        names = self._objective.measures
        each = totals.double().cpu().reshape(-1, BANDS, 1 + len(names))
        sides = self._resolutions if len(self._resolutions) > 1 else []
        resolutions = {
            f"val_loss_{side}px": (of[:, 1 + names.index("loss")] / of[:, 0]).mean().item()
            for side, of in zip(sides, each, strict=False)
        }
        counts, sums = each.sum(0).split([1, len(names)], dim=1)
        means = dict(zip(names, (sums / counts).T, strict=True))
        last = BANDS * self._width - 1
        bands = {
            f"val_loss_t{band * self._width:0{len(str(last))}}_{(band + 1) * self._width - 1}": loss
            for band, loss in enumerate(means["loss"].tolist())
        }
        return {"val_loss": means["loss"].mean().item(), **bands, **resolutions} | {
            f"val_{name}": means[name].mean().item() for name in names if name != "loss"
        }

    def _batches(self) -> Generator[tuple[int, Batch, Tensor, Tensor], None, None]:
        """Batches: their resolution, rows, noise, and places in a band, which are timesteps from 0 to the width of one.

        They end where a signal asks to stop, also while a store is silent.
        """
        fields = tuple(self._objective.row_shapes)
        parts = [
            (part, slice(start, start + self._batch_size))
            for part in self._parts
            for start in range(0, len(part.samples), self._batch_size)
        ]
        with closing(Crew(1, "kcache-validation")) as crew:
            for part, some in parts:
                shape = part.cache.field(self._objective.noised_field).shape
                reading = crew.submit(part.cache.read, part.samples[some], fields)
                while not wait([reading], POLL_SECONDS).done:
                    if signal_asked():
                        return
                if signal_asked():
                    return
                # Holes as they are met in use, however they are trained: grown.
                turns, of = part.turns[some], self._objective
                drawn = draw_turns(self._seed, turns, shape, self._width, drawn=of.drawn, own_share=of.own_share)
                rows = reading.result() | drawn
                batch = {name: torch.from_numpy(array).to(self._device) for name, array in rows.items()}
                yield part.cache.resolution or 0, batch, batch.pop("noise"), batch.pop("timesteps")


def first_looked_at(cache: Cache, fields: tuple[str, ...], count: int) -> list[tuple[Cache, int, int]]:
    """The first `count` images that are looked at: of each one sample, its number in a part of `cache`, and its turn.

    Of several resolutions each image is taken at the largest.
    """
    found: dict[int, tuple[Cache, int]] = {}
    for part, samples, turns in _looked_at(cache, fields):  # by resolution
        found |= {turn: (part, sample) for sample, turn in zip(samples.tolist(), turns.tolist(), strict=True)}
    return [(*found[turn], turn) for turn in sorted(found)[:count]]


class _Share(NamedTuple):
    """What one process looks at of the held-out samples of one shape."""

    cache: Cache
    samples: np.ndarray
    turns: np.ndarray


def _looked_at(cache: Cache, fields: tuple[str, ...]) -> Iterator[tuple[Cache, np.ndarray, np.ndarray]]:
    """The samples of each shape that are looked at, (n,), and the turns that they have, (n,) int64."""
    last = np.sort(key_numbers(cache))[:MAX_SAMPLES][-1]
    for part in cache.by_shape(*fields):
        numbers = key_numbers(part)
        samples = np.argsort(numbers, kind="stable")[:MAX_SAMPLES]
        samples = samples[numbers[samples] <= last]
        # Far above the turns of training, so that no noise is met there too; one bit less, to be an int64.
        yield part, samples, (numbers[samples] >> np.uint64(1)).astype(np.int64)


HELD_OUT_BATCH_SIZE = 8
"""Held-out samples at a time, at least: without gradients they need little memory."""
HELD_OUT_PICTURES = 4
"""Held-out pictures that are drawn anew, unless told: as many as stand on a screen."""
RESOLUTION = 512
"""Side of the pictures, in pixels, when the cache says none: what the pipelines draw unasked."""


class Evaluation:
    """What a run is looked at by, every so many steps and at its end; all processes call each method together."""

    def __init__(self, run: TrainingRun, log: RunLog) -> None:
        """Makes ready; raises the KcacheError of pictures that cannot be drawn, before the first step."""
        self._run, self._log = run, log
        config, accelerator = run.config, run.accelerator
        passes = config.validation_epochs * run.loader.passes_of_epoch
        self._every = config.validation_steps or math.ceil(passes / config.gradient_accumulation_steps)
        self._validation = None
        if run.held_out is not None:
            self._validation = Validation(
                run.held_out,
                run.raw_objective,
                batch_size=max(config.train_batch_size, HELD_OUT_BATCH_SIZE),
                seed=config.seed,
                device=accelerator.device,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
            )
        self._pictures = _make_pictures(run)
        if accelerator.is_main_process:
            with run.decoration("no curves can be drawn of this run"):  # said now, not after hours
                drawing()

    def is_due(self, step: int) -> bool:
        """Whether to look after optimizer step `step`; the same in all processes."""
        asked = self._validation is not None or bool(self._run.config.validation_prompts)
        return asked and (step % self._every == 0 or step == self._run.max_steps)

    def look(self, step: int) -> None:
        """Measure, draw and plot what would be left as the result."""
        run = self._run
        with averaged(run.average, run.network), uncompiled(run.config.compile):
            self.validate(step, self.draw(step))
        if run.accelerator.is_main_process:
            with run.decoration(f"{run.output_dir / CURVES_FILE} could not be drawn"):
                plot_run(run.output_dir)

    def validate(self, step: int, scores: Mapping[str, float] | None = None) -> None:
        """Measure the network on the held-out samples, and tell validation.jsonl and the trackers, also of `scores`."""
        scores = scores or {}
        if self._validation is None:
            if scores:
                self._log.track({"step": step, **scores})
            return
        accelerator = self._run.accelerator
        with accelerator.autocast():
            totals = accelerator.reduce(self._validation.totals(), "sum")
        if totals[0, 0].isnan():  # a process was asked to stop
            return
        entry = {"step": step, **self._validation.summary(totals), **scores}
        self._log.track(entry)
        if accelerator.is_main_process:
            with self._run.decoration(f"{self._run.output_dir / VALIDATION_FILE} could not be written"):
                append_validation(self._run.output_dir, entry)

    def draw(self, step: int) -> Mapping[str, float]:
        """Have the network draw the prompts, and put the pictures into pictures/ and before the trackers.

        Returns their scores, where they were asked for.
        """
        if self._pictures is None:
            return {}
        from kcache.report.grid import save_pictures

        with self._run.decoration(f"the pictures of step {step} could not be drawn"):
            drawn = self._pictures.draw(self._run.network)
            self._log.track_pictures(step, drawn)
            save_pictures(self._run.output_dir, step, drawn, self._pictures.prompts, self._pictures.files)
            if self._run.config.validation_clip_score:
                with self._run.decoration(f"the pictures of step {step} could not be scored"):
                    return cast("PromptPictures", self._pictures).scores(drawn)
        return {}


def _make_pictures(run: TrainingRun) -> "PromptPictures | HeldOutPictures | None":
    """What draws, in the main process; what nobody asked for costs nothing but itself where it cannot be drawn."""
    if not run.accelerator.is_main_process:
        return None
    if run.counterpart is None:
        with run.decoration("no held-out pictures can be drawn of this run"):
            return _make_held_out(run)
        return None
    # Not at the top: the pipelines bring the encoders' libraries with them, which few runs need.
    from kcache.report.pictures import PromptPictures

    # A prior is trained at no resolution: its pictures are as large as the cache's, if it has some.
    shapes = shown_shapes(run.cache.held.shapes()) or [(RESOLUTION, RESOLUTION)]
    pictures = PromptPictures(run.config, run.base, run.counterpart, shapes, run.accelerator.device)
    pictures.prepare()
    return pictures


def _make_held_out(run: TrainingRun) -> "HeldOutPictures | None":
    config, objective = run.config, run.raw_objective
    count = HELD_OUT_PICTURES if config.num_validation_images is None else config.num_validation_images
    if run.held_out is None or not (config.inpaint or config.hint is not None) or count == 0:
        return None
    from kcache.report.held_out import HeldOutPictures, read_held_out

    hint = None if config.hint is None else hint_field(config.hint)
    # At the noise and the masks that they are measured with.
    chosen = first_looked_at(run.held_out, tuple(objective.row_shapes), count)
    own = objective.own_share
    samples = [read_held_out(part, sample, turn, config.seed, hint, own) for part, sample, turn in chosen]
    return HeldOutPictures(samples, config, run.base, objective.scheduler, run.accelerator.device)
