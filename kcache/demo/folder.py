"""The folder of a demo: taken empty, or refused. Loads nothing heavy, so that a refusal is not waited for."""

import shutil
from pathlib import Path

from kcache.errors import ConfigError

_MARKER = ".kcache-demo"
"""File that says that a folder is a demo's own, to be emptied by the next."""


def take_folder(output: Path) -> None:
    """Make `output` an empty folder of a demo; raises ConfigError where it holds anything else."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file; expected a folder for the demo, or a path where nothing is")
    if output.is_dir() and any(output.iterdir()):
        if not (output / _MARKER).exists():
            raise ConfigError(f"{output} is not empty and not an earlier demo's; give another folder: --output DIR")
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / _MARKER).touch()
