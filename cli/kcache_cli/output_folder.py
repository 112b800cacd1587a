"""The folder that a command is to write into, looked at before the command's long work."""

import tempfile
from pathlib import Path

from kcache.errors import ConfigError


def check_folder(flag: str, folder: Path) -> None:
    """Check that `folder`, which `flag` names, takes files, or could be made; nothing is left there.

    Raises ConfigError.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(
            f"{flag} is {folder}, but {existing} is a file; expected a folder, or a path where one can be made; choose "
            "another"
        )
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ConfigError(
            f"{flag} is {folder}, but nothing can be written into {existing} ({error.strerror}); expected a folder "
            "that takes files, or a path where one can be made; choose another"
        ) from error
