"""Where and with what a benchmark was run: every result says so."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

import kcache

__all__ = ["machine"]


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


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _affinity() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
