"""Whether a run may write into its output directory, and go on from what an earlier start left there."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path

from kcache.config import TrainConfig
from kcache.disk.durable import shared, writing
from kcache.encoders.repositories import COMPONENTS, Repository
from kcache.errors import CacheMismatchError, RunError
from kcache.hints import already_in
from kcache.loader.batches import CacheLoader
from kcache.loader.state import changed_samples, changed_shapes
from kcache.settings import marks_of
from kcache.store.cache import Cache
from kcache.store.checkpoint import Checkpoint, checkpoint_steps, latest_checkpoint, open_checkpoint
from kcache.store.run_directory import CONFIG_FILE, METRICS_FILE, RESULT, logger

_RESULT = (*RESULT, *COMPONENTS)
"""What a run leaves beside its settings, logs and checkpoints, in the place of whatever stands there."""


def check_output_dir(config: TrainConfig) -> None:
    """Check, before anything is loaded, that the run of `config` may write into its directory; in all processes.

    Only what would lose or mix files is refused: a file, a cache, a folder of pictures, one with names that a
    run writes over, and an earlier run that this one does not go on with. Whatever else is there may stay, as no run
    touches it: logs, scripts, notes. A start that ended before its first step left nothing to lose. Processes may not
    check when one of them may have begun. Raises RunError, CacheBusyError where another run still goes on, and
    CacheWriteError for what may not be looked into.
    """
    run_dir, resume = Path(config.output_dir), config.resume_from_checkpoint
    with writing(run_dir):
        steps, begun = checkpoint_steps(run_dir), os.path.lexists(run_dir / METRICS_FILE)
        check_place(run_dir, ours=begun or bool(steps))
        found = [name for name in _RESULT if os.path.lexists(run_dir / name)]
        if not begun and not steps:
            foreign = [name for name in (CONFIG_FILE, *found) if os.path.lexists(run_dir / name)]
            if foreign:
                raise RunError(
                    f"{run_dir} holds {', '.join(foreign[:3])}, which a run would replace, and is no run directory; "
                    "expected one of the run's own; give another --output-dir"
                )
        elif not _goes_on(run_dir, resume) and (steps or found or _has_entries(run_dir / METRICS_FILE)):
            with shared(run_dir):  # a run that is still going on is not to be removed
                raise _not_alone(run_dir, steps, found)


def check_place(folder: Path, *, ours: bool) -> None:
    """Check that `folder` is, or can be made, a folder to write into: no file, no cache and no pictures but `ours`.

    Raises RunError.
    """
    place = folder.absolute()
    standing = next(path for path in (place, *place.parents) if os.path.lexists(path))
    if not standing.is_dir():
        shown, kind = folder if standing == place else standing, "a file" if standing.exists() else "a broken link"
        raise RunError(
            f"{shown} is {kind}; expected a folder, or a path where nothing is yet; give another --output-dir, such as "
            "runs/prior"
        )
    what = already_in(folder) if standing == place else None
    if what == "a cache" or (what is not None and not ours):
        raise RunError(
            f"{folder} is {what}, with which the files of a run would mix; expected a folder of the run's own; give "
            "another --output-dir, such as runs/prior"
        )


def _goes_on(run_dir: Path, name: str | None) -> bool:
    """Whether a run that resumes from `name` goes on with the one in `run_dir`."""
    if name is None or name == "latest":
        return name is not None
    path = checkpoint_named(run_dir, name)
    # What is not there is refused when it is opened.
    return not path.exists() or path.resolve().parent == run_dir.resolve()


def _has_entries(log: Path) -> bool:
    """Whether there is anything to lose in a log: one that is no file, or cannot be looked at, may hold something."""
    return not log.is_file() or log.stat().st_size > 0


def _not_alone(run_dir: Path, steps: Sequence[int], found: Sequence[str]) -> RunError:
    if steps:
        return RunError(
            f"{run_dir} holds checkpoint-{steps[-1]} of an earlier run; expected a directory without checkpoints; "
            "go on with that run by --resume-from-checkpoint latest, or choose another --output-dir"
        )
    return RunError(
        f"{run_dir} holds {', '.join([METRICS_FILE, *found][:3])} of an earlier run, and no checkpoint; expected a "
        "directory without a run; choose another --output-dir or remove this one, or put a run from step 0 in its "
        "place by --resume-from-checkpoint latest"
    )


def checkpoint_named(run_dir: Path, name: str) -> Path:
    """Where the checkpoint `name` is, or would be: it may be a path, or the name of one in the run directory."""
    path = Path(name)
    return run_dir / path if not path.exists() and (run_dir / path).is_dir() else path


def checkpoint_to_resume(config: TrainConfig) -> Checkpoint | None:
    """The checkpoint that `config` names, or None to start fresh: "latest" starts fresh where there is none yet.

    Raises RunError for a checkpoint that is broken, of a run with other settings or past the last step.
    """
    run_dir, name = Path(config.output_dir), config.resume_from_checkpoint
    if name == "latest":
        checkpoint = latest_checkpoint(run_dir)
    else:
        checkpoint = None if name is None else open_checkpoint(checkpoint_named(run_dir, name))
    if checkpoint is not None:
        _check_settings(checkpoint, config)
    return checkpoint


def _check_settings(checkpoint: Checkpoint, config: TrainConfig) -> None:
    """Check that `config` gives the run that was begun, and asks for no step before the checkpoint."""
    kept = [name for name, marks in marks_of(config).items() if marks.kept]
    # Settings that came after the checkpoint have what they did then as their default.
    defaults = {each.name: each.default for each in fields(config) if each.default is not MISSING}
    try:
        told = defaults | dict(checkpoint.state["config"])
        begun = {name: told[name] for name in kept}
    except (KeyError, TypeError, ValueError) as error:
        raise _unknown(checkpoint, error) from error
    begun, asked = (json.loads(json.dumps(each)) for each in (begun, {name: getattr(config, name) for name in kept}))
    changed = [f"{name}: {begun[name]} → {asked[name]}" for name in kept if begun[name] != asked[name]]
    if changed:
        raise RunError(
            f"{checkpoint.path} was made with other settings ({', '.join(changed)}); expected those it was begun with; "
            "resume with them, or start a new run from the trained network of that one"
        )
    if config.max_train_steps is not None and config.max_train_steps < checkpoint.step:
        raise RunError(
            f"{checkpoint.path} comes after step {checkpoint.step}; expected one no later than --max-train-steps "
            f"{config.max_train_steps}; resume from an earlier one, or ask for more steps"
        )


def _unknown(checkpoint: Checkpoint, error: Exception) -> RunError:
    return RunError(
        f"{checkpoint.path} does not say how its run was set up ({error!r}); expected the settings of this version of "
        "kcache; resume with the one that wrote it"
    )


_SELECTION = {
    "prior": "the cache, --where, --flip",
    "decoder": "the cache, --where, --resolution, --aspect-ratio-buckets, --flip",
}
"""What decides, of each stage, which samples there are."""

NewOrder = Mapping[str, int | None]
"""{"samples", "before"}: how many samples a new order has, and the one before had; None where that is not recorded."""


def check_same_samples(
    checkpoint: Checkpoint | None, cache: Cache, parts: Sequence[Cache], config: TrainConfig
) -> NewOrder | None:
    """Check that going on from `checkpoint` trains on the same samples, or with --new-order what is new of them.

    The same are those of the same shapes, which `parts` have, and mirrored or not as before. Raises
    CacheMismatchError for others without --new-order, RunError when the checkpoint does not say.
    """
    if checkpoint is None:
        return None
    try:
        state = checkpoint.state["loader"]
        changed, before = changed_samples(state, cache) or changed_shapes(state, parts), state.get("samples")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unknown(checkpoint, error) from error
    if changed is None:
        if config.new_order:
            logger.warning("--new-order: the samples are those of %s, and go on in their order", checkpoint.path)
        return None
    if not config.new_order:
        raise CacheMismatchError(
            f"{checkpoint.path} was trained on other samples than there are now ({changed}): their order would be "
            "another; expected the same cache and selection; go on from its weights, optimizer and schedule in a new "
            f"order with --new-order, or give what it was begun with ({_SELECTION[config.stage]})"
        )
    logger.warning(
        "%s: %s; the run goes on from its weights, in a new order of these samples", checkpoint.path, changed
    )
    return {"samples": len(cache), "before": before}


def take_place(loader: CacheLoader, checkpoint: Checkpoint, new_order: NewOrder | None) -> None:
    """Have `loader` go on where it stood in `checkpoint`, or begin a new order there.

    Raises RunError when the checkpoint does not say, CacheMismatchError for another order.
    """
    try:
        state = checkpoint.state["loader"]
        if new_order is None:
            loader.load_state_dict(state)
        else:
            loader.begin_new_order(state, int(checkpoint.state["samples_seen"]))
    except CacheMismatchError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unknown(checkpoint, error) from error


def last_step(batches_until: Callable[[int], int], config: TrainConfig, checkpoint: Checkpoint | None) -> int:
    """The optimizer step that the run ends with, those before `checkpoint` counted as they were.

    `batches_until` says how many batches are left before an epoch, as the loader's method does.
    Where that is another than the run was begun with, a schedule that leads there goes on as that of a run which had
    always been so long; it is said. Raises RunError when the checkpoint does not say.
    """
    step = 0 if checkpoint is None else checkpoint.step
    left = batches_until(config.num_train_epochs)
    last = config.max_train_steps or step + math.ceil(left / config.gradient_accumulation_steps)
    if checkpoint is None or config.lr_scheduler in ("constant", "constant_with_warmup"):
        return last
    state = checkpoint.state
    begun = state.get("max_steps") or state["config"].get("max_train_steps")
    if begun != last:
        logger.warning(
            "%s is of a run of %s steps, this one has %s: from step %s on, the learning rate is that of a %s schedule "
            "over %s steps",
            checkpoint.path,
            "an unknown number of" if begun is None else f"{begun:,}",
            f"{last:,}",
            f"{step + 1:,}",
            config.lr_scheduler,
            f"{last:,}",
        )
    return last


def check_same_run(checkpoint: Checkpoint, global_batch: int, tables: Mapping[str, str], new_order: bool) -> None:
    """Check that going on from `checkpoint` reads what was read before.

    `tables` maps each table that is read to its fingerprint; with `new_order` they may be others, which is said.
    `global_batch` is in samples per optimizer step; another number of processes may change it, which is said in a
    warning. Raises CacheMismatchError for other tables, RunError when the checkpoint does not say.
    """
    try:
        begun_batch, begun_tables = int(checkpoint.state["global_batch"]), dict(checkpoint.state["tables"])
        int(checkpoint.state["samples_seen"])
    except (KeyError, TypeError, ValueError) as error:
        raise _unknown(checkpoint, error) from error
    if begun_tables != tables and not new_order:
        raise CacheMismatchError(
            f"{checkpoint.path} was trained from tables {_short(begun_tables)}; this cache has "
            f"{_short(tables)}; expected the same; resume with the cache it was begun with, or go on from its weights "
            "with these rows: --new-order"
        )
    if begun_tables != tables:
        was, now = _short(begun_tables), _short(tables)
        logger.warning("%s was trained from tables %s, and goes on with %s", checkpoint.path, was, now)
    if begun_batch != global_batch:
        logger.warning(
            "%s was made with %d samples per step, this run takes %d: the samples go on in their order, but a step is "
            "another; to keep it, choose --train-batch-size and --gradient-accumulation-steps that, times the number "
            "of processes, give what it was",
            checkpoint.path,
            begun_batch,
            global_batch,
        )


def adapted_weights(checkpoint: Checkpoint) -> str | None:
    """Digest (hex) of the weights that a checkpoint's adapters were trained on; None where it does not say."""
    adapted = checkpoint.state.get("adapted")
    return str(adapted.get("weights")) if isinstance(adapted, dict) else None


def check_same_base(
    checkpoint: Checkpoint | None, config: TrainConfig, base: Repository, adapted: Mapping[str, str] | None
) -> None:
    """Check that adapters go on with the weights, and a decoder with the noise schedule, that they were trained on.

    Both lie in `base`, wherever it is now. `adapted` is what `find_adapted` found, None where all weights learn: those
    are in the checkpoint. A checkpoint from before either was recorded does not say, and is taken. Raises RunError for
    other ones.
    """
    if checkpoint is None:
        return
    schedule = checkpoint.state.get("noise_schedule")
    if config.stage == "decoder" and schedule not in (None, base.read("scheduler").digest):
        raise RunError(
            f"{checkpoint.path} was trained with another noise schedule than {base.name} has in "
            "scheduler/scheduler_config.json; expected the same, in whatever folder; give the pipeline it was begun "
            "from by --pretrained-decoder-model-name-or-path, or start a new run in another --output-dir"
        )
    if adapted is None or checkpoint.state.get("adapted") is None:
        return
    begun = checkpoint.state["adapted"]
    try:
        name, weights = str(begun["name"]), str(begun["weights"])
    except (KeyError, TypeError) as error:
        raise _unknown(checkpoint, error) from error
    if weights != adapted["weights"]:
        raise RunError(
            f"{checkpoint.path} has adapters trained on the network of {name}, weights {weights[:12]}…; found that of "
            f"{adapted['name']}, weights {adapted['weights'][:12]}…; expected the same weights, in whatever folder; "
            f"give these by --pretrained-{config.stage}-model-name-or-path, or start a new run in another --output-dir"
        )


def _short(tables: Mapping[str, str]) -> str:
    return ", ".join(f"{name}-{fingerprint[:8]}" for name, fingerprint in sorted(tables.items()))
