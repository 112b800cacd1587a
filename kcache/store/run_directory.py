"""A run directory: what a run was told, how it went, and the names of what it leaves.

config.json holds the settings, metrics.jsonl one line per optimizer step, validation.jsonl one per validation,
starts.jsonl one per start of the run. Checkpoints lie beside them (see `kcache.store.checkpoint`), and in the end the
result: a pipeline's folders or a LoRA, its card, its curves and the pictures that were drawn.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kcache.config import TrainConfig
from kcache.durable import write_bytes, write_json
from kcache.errors import RunError

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
VALIDATION_FILE = "validation.jsonl"
STARTS_FILE = "starts.jsonl"

CARD_FILE = "README.md"
CURVES_FILE = "loss.png"
PICTURES_FOLDER = "pictures"
RAW_FOLDER = "raw"
"""Where the weights as they were at the last step lie, when the result is their average."""
LORA_FILE = "pytorch_lora_weights.safetensors"
"""Adapters, by diffusers' name."""
PIPELINE_FILE = "model_index.json"
"""What makes the directory a pipeline: written last."""
RESULT = (CARD_FILE, CURVES_FILE, PICTURES_FOLDER, RAW_FOLDER, LORA_FILE, PIPELINE_FILE)
"""What a run leaves beside its settings, logs and checkpoints, but for the components of a pipeline."""


def start_run(config: TrainConfig, facts: Mapping[str, Any], first_step: int) -> None:
    """Make the run directory: write config.json, and keep of the lines of earlier starts those up to `first_step`.

    Says so when there was no latest checkpoint to go on from: the directory may be another than was meant.
    """
    run_dir = Path(config.output_dir)
    if config.resume_from_checkpoint == "latest" and first_step == 0:
        logger.warning("no checkpoint in %s: starting at step 0", run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
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
    with path.open("ab", buffering=0) as file:
        before, rest = os.fstat(file.fileno()).st_size, _lines(entries).encode()
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            with suppress(OSError):  # the lines after it are not to go on in the middle of one
                file.truncate(before)
            raise


def _lines(entries: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)
