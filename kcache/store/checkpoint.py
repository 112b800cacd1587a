"""Checkpoints: all that a run needs to go on as if it had never stopped, in a folder that is whole or not there.

`checkpoint-500/` holds what the run writes there, and `state.json` with the rest of the run's state and with the size
and sha256 of every other file: it is written last and seals the folder. There are no random states: order, noise and
timesteps follow from seed and position.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kcache.decoration import decoration
from kcache.disk.durable import json_bytes, remove, replace, sync_folder, temporary_folder, writing
from kcache.disk.filesystems import sync
from kcache.disk.room import Reserve, write_file
from kcache.errors import RunError
from kcache.foreign import reason
from kcache.store.recipe import canonical_json, json_digest

logger = logging.getLogger(__name__)

CHECKPOINT_VERSION = 1
STATE_FILE = "state.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checkpoint whose files have all been compared with what was written."""

    path: Path
    step: int
    """Optimizer steps done."""
    state: Mapping[str, Any]
    """What the trainer put there: plain JSON values."""


def save_checkpoint(
    run_dir: Path,
    step: int,
    write: Callable[[Path], None],
    state: Mapping[str, Any],
    total_limit: int | None = None,
    reserve: Reserve | None = None,
) -> Path:
    """Write checkpoint-`step` into `run_dir` and only then remove the oldest beyond `total_limit`.

    `write` puts the files into the folder that it is given. `state` is what `Checkpoint.state` will return: JSON values
    only. A checkpoint of the same step is replaced. `reserve` may have room for STATE_FILE. Raises CacheWriteError when
    it cannot be written; an older one that cannot be removed is said.
    """
    final = run_dir / f"checkpoint-{step}"
    with temporary_folder(run_dir) as temporary:
        with writing(final):
            write(temporary)
            files = _sync_files(temporary)
        body = {"version": CHECKPOINT_VERSION, "step": step, "state": state, "files": files}
        body = json.loads(canonical_json(body))
        content = json_bytes({**body, "digest": json_digest(body)})
        with writing(final / STATE_FILE, len(content)):
            write_file(temporary / STATE_FILE, lambda: [content], reserve)
            sync_folder(temporary)
        replace(temporary, final)
    if total_limit is not None:
        others = [other for other in checkpoint_steps(run_dir) if other != step]
        for other in others[: max(0, len(others) + 1 - total_limit)]:
            with decoration(f"{run_dir / f'checkpoint-{other}'} could not be removed"):
                remove(run_dir / f"checkpoint-{other}")
    return final


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Steps of the checkpoints in `run_dir`, broken ones included, oldest first."""
    names = [path.name.removeprefix("checkpoint-") for path in run_dir.glob("checkpoint-*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdecimal())


def latest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The newest whole checkpoint in `run_dir`, or None if it has none at all; logs a warning for each broken one.

    Raises RunError when there are checkpoints and every one is broken.
    """
    steps = checkpoint_steps(run_dir)
    for step in reversed(steps):
        try:
            return open_checkpoint(run_dir / f"checkpoint-{step}")
        except RunError as error:
            logger.warning("skipping a broken checkpoint: %s", error)
    if steps:
        raise RunError(
            f"all {len(steps)} checkpoints in {run_dir} are broken; expected a whole one to resume from; "
            "restore one from a backup, or train in a new --output-dir"
        )
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`, every file compared with its sha256 before anything is loaded.

    Raises RunError for a file that is missing, cut or changed, and for what is no checkpoint.
    """
    try:
        body = json.loads((path / STATE_FILE).read_bytes())
        digest = body.pop("digest")
        version = body["version"]
    except OSError as error:
        raise RunError(
            f"{path} is not a checkpoint ({STATE_FILE}: {error.strerror}); expected a folder such as "
            'RUN/checkpoint-500; give its path, or "latest"'
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _broken(path, f"{STATE_FILE} cannot be read ({error!r})") from error
    if version != CHECKPOINT_VERSION:
        raise RunError(
            f"{path} has checkpoint version {version}; this kcache reads version {CHECKPOINT_VERSION}; "
            "resume with the kcache that wrote it"
        )
    if digest != json_digest(body):
        raise _broken(path, f"{STATE_FILE} differs from what was written")
    try:
        _check_files(path, body["files"])
        return Checkpoint(path=path, step=int(body["step"]), state=dict(body["state"]))
    except OSError as error:
        raise _broken(path, f"it cannot be read ({reason(error)})") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, RunError):
            raise
        raise _broken(path, f"{STATE_FILE} does not say what a checkpoint's does ({error!r})") from error


def _sync_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Bring all files in `folder` to the disk; size and sha256 of each, by relative path."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
            continue
        with path.open("rb") as file:
            sync(file.fileno())
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    return files


def _check_files(path: Path, expected: Mapping[str, Mapping[str, Any]]) -> None:
    # The folder is walked and its names looked up: names that stand in a file are never opened.
    found = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if not file.is_dir()}
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise _broken(path, f"{', '.join(missing)} missing")
    for name, record in expected.items():
        size = found[name].stat().st_size
        if size != record["bytes"]:
            raise _broken(path, f"{name} has {size} bytes instead of {record['bytes']}")
        if _sha256(found[name]) != record["sha256"]:
            raise _broken(path, f"{name} differs from what was written")


def _broken(path: Path, what: str) -> RunError:
    return RunError(
        f"checkpoint {path} is broken: {what}; expected every file as it was written; "
        'resume from another checkpoint: "latest" takes the newest whole one'
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
