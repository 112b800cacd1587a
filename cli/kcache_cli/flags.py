"""Flags from settings: one `--kebab-case` option per field of a frozen settings class; and a check that flags share."""

import inspect
import tempfile
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from types import GenericAlias
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer

from kcache.errors import ConfigError
from kcache.settings import marks_of
from kcache.urls import check_local

Command = TypeVar("Command", bound=Callable[..., None])


def with_flags(settings: type, stage: str | None = None) -> Callable[[Command], Command]:
    """Replace a command's `**settings` by one option per setting, those left out that are another stage's only.

    The name, the type, the default and the help of an option are the setting's own, so that the command line and the
    library cannot drift apart.
    """
    hints = get_type_hints(settings)
    defaults = {field.name: field.default for field in fields(settings)}
    options = [
        _option(name, hints[name], defaults[name], marks.help)
        for name, marks in marks_of(settings).items()
        if marks.flag and marks.only in (None, stage)
    ]

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command)
        written = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        command.__signature__ = signature.replace(parameters=[*written, *options])  # type: ignore[attr-defined]
        return command

    return decorate


def _option(name: str, hint: Any, default: Any, text: str) -> inspect.Parameter:
    metavar, flag = None, "--" + name.replace("_", "-")
    if switch := hint in (bool, bool | None):  # what a file of flags turns on, the command line can turn off
        flag += "/--no-" + flag.removeprefix("--")
    if get_origin(hint) is tuple:  # an option that may be repeated
        (item, *_) = get_args(hint)
        hint, metavar = GenericAlias(list, (item,)), f"<{item.__name__}>"
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is MISSING else default,
        annotation=Annotated[hint, typer.Option(flag, help=text, metavar=metavar, show_default=not switch)],
    )


def check_folder(flag: str, folder: Path) -> None:
    """Check that `folder`, which `flag` names, takes files, or could be made; nothing is left there.

    Raises ConfigError.
    """
    check_local(folder)
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
