"""Whether a run may write into its output directory: nothing there is to be lost or mixed with."""

import os
from collections.abc import Sequence
from pathlib import Path

from kcache.advice import already_in
from kcache.checkpoint import checkpoint_steps
from kcache.config import TrainConfig
from kcache.durable import shared, writing
from kcache.errors import RunError
from kcache.run_directory import CONFIG_FILE, METRICS_FILE, checkpoint_named

__all__ = ["check_output_dir", "check_place"]

_RESULT = (
    "README.md",
    "loss.png",
    "pictures",
    "raw",
    "pytorch_lora_weights.safetensors",
    "model_index.json",
    "prior",
    "image_encoder",
    "text_encoder",
    "tokenizer",
    "image_processor",
    "scheduler",
    "unet",
    "movq",
)
"""What a run leaves beside its settings, logs and checkpoints, in the place of whatever stands there."""


def check_output_dir(config: TrainConfig) -> None:
    """Check, before anything is loaded, that the run of `config` may write into its directory; in all processes.

    Refused is only where something would be lost or mixed: a file, a cache, a folder of pictures, one with names that a
    run writes over, and an earlier run that this one does not go on with. Whatever else is there may stay, as no run
    touches it: logs, scripts, notes. A start that ended before its first step left nothing to lose. Processes may not
    check when one of them may have begun. Raises RunError, CacheBusyError where another run still goes on, and
    CacheWriteError for what may not be looked into.
    """
    run_dir = Path(config.output_dir)
    with writing(run_dir):
        _check(run_dir, config.resume_from_checkpoint)


def _check(run_dir: Path, resume: str | None) -> None:
    steps, begun = checkpoint_steps(run_dir), (run_dir / METRICS_FILE).exists()
    check_place(run_dir, ours=begun or bool(steps))
    found = [name for name in _RESULT if os.path.lexists(run_dir / name)]
    if not begun and not steps:
        foreign = [name for name in (CONFIG_FILE, *found) if os.path.lexists(run_dir / name)]
        if foreign:
            raise RunError(
                f"{run_dir} holds {', '.join(foreign[:3])}, which a run would replace, and is no run directory; "
                "expected one of the run's own; give another --output-dir"
            )
        return
    if not _goes_on(run_dir, resume) and (steps or found or (run_dir / METRICS_FILE).stat().st_size):
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
