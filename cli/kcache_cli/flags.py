"""Flags from settings: one `--kebab-case` option per field of a frozen settings class."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from types import GenericAlias
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer

Command = TypeVar("Command", bound=Callable[..., None])


def with_flags(settings: type, helps: Mapping[str, str]) -> Callable[[Command], Command]:
    """Replace a command's `**settings` by one option per field that `helps` explains, each in a full sentence.

    The name, the type and the default of an option are the field's own, so that the command line and the library cannot
    drift apart.
    """
    hints = get_type_hints(settings)
    defaults = {field.name: field.default for field in fields(settings)}
    options = [_option(name, hints[name], defaults[name], text) for name, text in helps.items()]

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command)
        written = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        command.__signature__ = signature.replace(parameters=[*written, *options])  # type: ignore[attr-defined]
        return command

    return decorate


def _option(name: str, hint: Any, default: Any, text: str) -> inspect.Parameter:
    metavar, flag = None, "--" + name.replace("_", "-")
    if hint is bool:  # what a file of flags turns on, the command line can turn off
        flag += "/--no-" + flag.removeprefix("--")
    if get_origin(hint) is tuple:  # an option that may be repeated
        (item, *_) = get_args(hint)
        hint, metavar = GenericAlias(list, (item,)), f"<{item.__name__}>"
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is MISSING else default,
        annotation=Annotated[hint, typer.Option(flag, help=text, metavar=metavar, show_default=hint is not bool)],
    )
