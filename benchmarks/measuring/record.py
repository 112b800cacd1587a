"""Writing down what a benchmark measured, with where it was measured and with what: every result says so."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kcache
from measuring.device import device_kind


def machine() -> dict[str, str]:
    """Where and with what this was measured."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    here = Path(__file__).parent
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    return {
        "cpu": f"{cpu or platform.machine()}, {len(_affinity())} cores",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "kcache": kcache.__version__,
        "numpy": np.__version__,
        "torch": torch.__version__,
    }


def facts() -> dict[str, str]:
    """Where and with what this was measured: `machine`, and what decides the speed of a network."""
    found = machine() | {
        "torch_threads": str(torch.get_num_threads()),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "not set"),
    }
    if device_kind() == "gpu":
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        found["gpu"] = f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB, CUDA {torch.version.cuda}"
    return found


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _affinity() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def write_outcome(
    output: Path | None, benchmark: str, settings: Mapping[str, Any], results: Any, part: str = ""
) -> None:
    """Write the JSON of `benchmark` to the file `output`, if one is given.

    In a folder it is named after the benchmark, the part of it that was measured and the device: train_step-prior-gpu.
    """
    if output is None:
        return
    name = "-".join(word for word in (benchmark, part, device_kind()) if word)
    path = output / f"{name}.json" if output.is_dir() else output
    plain = {name: value for name, value in settings.items() if name not in ("output", "folder")}
    report = {
        "benchmark": benchmark,
        "machine": facts(),
        "command": shlex.join(["python", *sys.argv]),
        "settings": plain,
        "results": results,
    }
    path.write_text(json.dumps(report, indent=2, default=str) + "\n")
