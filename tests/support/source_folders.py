"""Folders for the tests of sources, and what a source says of them."""

import json
from pathlib import Path
from typing import Any

from kcache.sources import Source


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    """Write files; an image is any bytes, because no source may open one."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def metadata(*rows: dict[str, Any]) -> str:
    """JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def offered(source: Source) -> dict[str, tuple[str, ...]]:
    """The captions of each sample, by its name."""
    return {source.name(i): source.captions(i) for i in range(len(source))}


def reasons(source: Source) -> dict[str, str]:
    """Why each refused input is, by its name."""
    assert {refusal.stage for refusal in source.refused} <= {"source"}
    return {refusal.name: refusal.reason for refusal in source.refused}
