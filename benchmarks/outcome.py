"""Writing down what a benchmark measured, with where it was measured and how."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from device import device_kind, facts

__all__ = ["write_outcome"]


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
        "command": " ".join(["python", *sys.argv]),
        "settings": plain,
        "results": results,
    }
    path.write_text(json.dumps(report, indent=2, default=str) + "\n")
