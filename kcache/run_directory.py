"""A run directory: what a run was told, and how it went.

config.json holds the settings, metrics.jsonl one line per optimizer step, validation.jsonl one per validation,
starts.jsonl one per start of the run.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kcache.checkpoint import Checkpoint, latest_checkpoint, open_checkpoint
from kcache.config import TrainConfig
from kcache.durable import remove_temporary, write_bytes, write_json
from kcache.errors import CacheMismatchError, RunError

__all__ = [
    "CONFIG_FILE",
    "METRICS_FILE",
    "append_metrics",
    "append_validation",
    "check_same_base",
    "check_same_run",
    "checkpoint_named",
    "checkpoint_to_resume",
    "read_config",
    "read_metrics",
    "read_starts",
    "read_validation",
    "start_run",
]

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
VALIDATION_FILE = "validation.jsonl"
STARTS_FILE = "starts.jsonl"

_SETTLED = (
    "stage",
    "seed",
    "shuffle",
    "learning_rate",
    "lr_scheduler",
    "lr_warmup_steps",
    "adam_beta1",
    "adam_beta2",
    "adam_weight_decay",
    "adam_epsilon",
    "max_grad_norm",
    "snr_gamma",
    "noise_draws",
    "mixed_precision",
    "val_fraction",
    "caption_dropout",
    "image_dropout",
    "use_8bit_adam",
    "use_ema",
    "ema_decay",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
)
"""Settings that decide the course of a run; a run that goes on must keep them."""


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
    try:
        begun = {name: checkpoint.state["config"][name] for name in _SETTLED}
    except (KeyError, TypeError) as error:
        raise _unknown(checkpoint, error) from error
    asked = json.loads(json.dumps({name: getattr(config, name) for name in _SETTLED}))
    changed = [f"{name}: {begun[name]} → {asked[name]}" for name in _SETTLED if begun[name] != asked[name]]
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


def check_same_run(checkpoint: Checkpoint, global_batch: int, tables: Mapping[str, str]) -> None:
    """Check that going on from `checkpoint` reads what was read before.

    `tables` maps each table that is read to its fingerprint. `global_batch` is in samples per optimizer step; another
    number of processes may change it, which is said in a warning. Raises CacheMismatchError for other tables, RunError
    when the checkpoint does not say.
    """
    try:
        begun_batch, begun_tables = int(checkpoint.state["global_batch"]), dict(checkpoint.state["tables"])
        int(checkpoint.state["samples_seen"])
    except (KeyError, TypeError, ValueError) as error:
        raise _unknown(checkpoint, error) from error
    if begun_tables != tables:
        raise CacheMismatchError(
            f"{checkpoint.path} was trained from tables {_short(begun_tables)}; this cache has "
            f"{_short(tables)}; resume with the cache it was begun with, or start a new run"
        )
    if begun_batch != global_batch:
        logger.warning(
            "%s was made with %d samples per step, this run takes %d: the samples go on in their order, but a step is "
            "another; to keep it, choose --train-batch-size and --gradient-accumulation-steps that, times the number "
            "of processes, give what it was",
            checkpoint.path,
            begun_batch,
            global_batch,
        )


def check_same_base(checkpoint: Checkpoint, config: TrainConfig, adapted: Mapping[str, str] | None) -> None:
    """Check that adapters go on with the weights that they were trained on, wherever these lie now.

    `adapted` is what `find_adapted` found, None where all weights learn: those are in the checkpoint. A checkpoint from
    before this was recorded does not say, and is taken. Raises RunError for other weights.
    """
    begun = checkpoint.state.get("adapted")
    if begun is None or adapted is None:
        return
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


def start_run(config: TrainConfig, facts: Mapping[str, Any], first_step: int) -> None:
    """Make the run directory: write config.json, and keep of the lines of earlier starts those up to `first_step`.

    Says so when there was no latest checkpoint to go on from: the directory may be another than was meant.
    """
    run_dir = Path(config.output_dir)
    if config.resume_from_checkpoint == "latest" and first_step == 0:
        logger.warning("no checkpoint in %s: starting at step 0", run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    remove_temporary(run_dir)
    for name in (METRICS_FILE, VALIDATION_FILE, STARTS_FILE):
        kept = [entry for entry in _read(run_dir / name) if entry["step"] <= first_step]
        write_bytes(run_dir / name, _lines(kept).encode())
    # After metrics.jsonl, by which a run directory is told from another folder with a file of this name.
    write_json(run_dir / CONFIG_FILE, {**facts, "config": asdict(config)})
    began = datetime.now(UTC).isoformat(timespec="seconds")
    _append(run_dir / STARTS_FILE, [{"step": first_step, "time": began}])


def read_config(run_dir: Path) -> dict[str, Any]:
    """What config.json says: the settings under "config", and what the run found; RunError where there is none."""
    try:
        told: dict[str, Any] = json.loads((run_dir / CONFIG_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(
            f"{run_dir / CONFIG_FILE} cannot be read ({error}); expected what a training run writes; give the "
            "directory of a run"
        ) from error
    return told


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says of each optimizer step, in order; a last line that was cut off is left out."""
    return _read(run_dir / METRICS_FILE)


def read_validation(run_dir: Path) -> list[dict[str, Any]]:
    """What validation.jsonl says of each validation, in order; a last line that was cut off is left out."""
    return _read(run_dir / VALIDATION_FILE)


def read_starts(run_dir: Path) -> list[dict[str, Any]]:
    """When the run was begun or resumed, and after which step, in order; a last line that was cut off is left out."""
    return _read(run_dir / STARTS_FILE)


def append_metrics(run_dir: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Add a line per entry to metrics.jsonl."""
    _append(run_dir / METRICS_FILE, entries)


def append_validation(run_dir: Path, entry: Mapping[str, Any]) -> None:
    """Add a line to validation.jsonl."""
    _append(run_dir / VALIDATION_FILE, [entry])


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def _append(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    with path.open("a") as file:
        file.write(_lines(entries))


def _lines(entries: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def _short(tables: Mapping[str, str]) -> str:
    return ", ".join(f"{name}-{fingerprint[:8]}" for name, fingerprint in sorted(tables.items()))
