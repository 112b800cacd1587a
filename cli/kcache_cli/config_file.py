"""`--config run.toml`: flags from a file; those on the command line win over them."""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import typer

from kcache.config import TrainConfig
from kcache.errors import ConfigError
from kcache.settings import read_toml, settings_from
from kcache_cli.upstream_flags import TRANSLATED, refusal

_NOT_SETTINGS = {"config", "sweep", "help"}


def read_config(path: Path, command: str, allowed: Collection[str]) -> dict[str, Any]:
    """The settings that a TOML file gives to `command`, and "cache", the folder of the cache, if it names one.

    Raises ConfigError for a file that cannot be read, a key that is not among `allowed` and a value of another type.
    """
    table = read_toml(path)
    for key in table:
        flag = "--" + key.replace("_", "-")
        if flag in TRANSLATED:
            raise ConfigError(f"{path}: {key} is spelt otherwise here: write {TRANSLATED[flag].removeprefix('--')}")
        # The value is not repeated: it may be a token.
        reason = refusal(command, flag)
        if reason is not None:
            raise ConfigError(f"{path}: {key} was given to {command}; {reason}")
    cache = {"cache": table.pop("cache")} if "cache" in table else {}
    if not all(isinstance(value, str) for value in cache.values()):
        raise ConfigError(f"{path}: cache is {cache['cache']!r}; expected a string, the folder of the cache")
    return cache | settings_from(table, TrainConfig, allowed, where=str(path))


def _take(context: typer.Context, path: Path | None) -> Path | None:
    """Make what the file says the defaults of the command, before any other flag is looked at."""
    if path is not None:
        allowed = {str(parameter.name) for parameter in context.command.params} - _NOT_SETTINGS - {"cache"}
        context.default_map = read_config(path, str(context.info_name), allowed)
    return path


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        is_eager=True,
        callback=_take,
        help="TOML file of flags, such as learning_rate = 1e-5; those on the command line win over it.",
    ),
]
