"""Timing the user's own copy of diffusers' training script, as it is.

It runs in a process of its own, and its progress bar says when which step is done: the second half of the steps is
timed. What happens after the last step does not matter; the script may ask the Hub for a pipeline there, and fail.

It has the best of several `--dataloader_num_workers`: where cores are few, worker processes take them from the step.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from measuring.workload import Workload


def time_upstream(
    arguments: argparse.Namespace, workload: Workload, resolution: int, batch_size: int
) -> dict[str, Any]:
    """Images per second of the script at `arguments.upstream_script`, with the same settings; or why it failed.

    Without worker processes, with two and with `arguments.workers`: what is told is of the fastest, and which it was.
    """
    torch.cuda.empty_cache()
    steps, milliseconds = arguments.steps, {}
    with tempfile.TemporaryDirectory(dir=workload.folder) as scratch:
        pictures = Path(scratch) / "pictures"
        _repeat(workload.pictures, pictures, -(-2 * steps * batch_size // workload.images))
        command = [
            sys.executable, arguments.upstream_script, "--train_data_dir", pictures, "--output_dir", scratch,
            "--pretrained_prior_model_name_or_path", workload.prior,
            "--pretrained_decoder_model_name_or_path", workload.decoder,
            "--resolution", resolution, "--train_batch_size", batch_size, "--checkpointing_steps", 10**9,
            "--mixed_precision", arguments.mixed_precision, "--max_train_steps", 2 * steps,
        ]  # fmt: skip
        command += ["--rank", arguments.lora_rank] if arguments.lora_rank else []
        command += ["--gradient_checkpointing"] if arguments.gradient_checkpointing else []
        for workers in sorted({0, 2, arguments.workers}):
            try:
                half, whole = _times([*command, "--dataloader_num_workers", workers], (steps, 2 * steps), Path(scratch))
            except RuntimeError as error:
                return {"failed": str(error)}
            milliseconds[workers] = (whole - half) / steps * 1e3
    return fastest(milliseconds, batch_size)


def fastest(milliseconds: Mapping[int, float], batch_size: int) -> dict[str, Any]:
    """What is told of steps that took so long with so many worker processes."""
    best = min(milliseconds, key=lambda workers: milliseconds[workers])
    rates = {str(workers): round(batch_size / each * 1e3, 2) for workers, each in milliseconds.items()}
    return {
        "images_per_second": rates[str(best)], "step_milliseconds": round(milliseconds[best], 2),
        "dataloader_num_workers": best, "images_per_second_by_workers": rates,
    }  # fmt: skip


def _times(command: list[Any], steps: tuple[int, int], home: Path) -> list[float]:
    """When the progress bar of `command` first said that each of `steps` was done, in seconds."""
    told = {"HF_DATASETS_CACHE": str(home / "datasets"), "TQDM_MININTERVAL": "0", "TQDM_MINITERS": "1"}
    times: dict[int, float] = {}
    lines: deque[str] = deque(maxlen=3)
    with subprocess.Popen(
        [str(word) for word in command], env=os.environ | told, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None  # noqa: S101
        for line in process.stderr:
            lines.append(line.strip())
            for step in steps:
                if f" {step}/{steps[1]} [" in line:
                    times.setdefault(step, time.perf_counter())
    if len(times) < len(steps):
        raise RuntimeError(" ".join(lines))
    return [times[step] for step in steps]


def _repeat(pictures: Path, folder: Path, times: int) -> None:
    """An imagefolder with each picture `times` times: upstream starts its workers anew in every epoch."""
    folder.mkdir()
    lines = []
    for row in map(json.loads, (pictures / "metadata.jsonl").read_text().splitlines()):
        for turn in range(times):
            name = f"{turn}-{row['file_name']}"
            (folder / name).hardlink_to(pictures / row["file_name"])
            lines.append(json.dumps(row | {"file_name": name}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
