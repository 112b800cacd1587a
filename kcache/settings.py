"""A setting: all that is said of it in one place, the check of its value, and its value from a TOML table."""

import codecs
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from kcache.errors import ConfigError

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Marks:
    """What is said of a setting beside its type and its default."""

    help: str
    """What it means, in full sentences: the command line shows them."""
    least: float = -math.inf
    """The smallest number that is taken."""
    above: float = -math.inf
    """What a number must be above."""
    below: float = math.inf
    """What a number must be below."""
    share: bool = False
    """Whether a number is 0 to 1, both of them included."""
    kept: bool = False
    """Whether it decides the course of a run, so that a run that goes on must keep it."""
    shown: Literal["always", "changed", "never"] = "changed"
    """When a model card shows it: "changed" is where it is not the default, "never" where the card says it elsewhere or
    it does not change what is learned."""
    swept: bool = True
    """Whether the runs of a sweep may differ in it."""
    beside: tuple[str, ...] = ()
    """Settings of which one must be set for this one to mean anything: without them, setting it is refused."""
    lenient: bool = False
    """Whether it is only said then: command lines of the diffusers scripts have it without effect, too."""
    flag: bool = True
    """Whether the command line has a flag for it."""
    only: str | None = None
    """The stage whose command has the flag; None for every stage."""

    @property
    def range(self) -> str:
        """The numbers that are taken, in words; "" where there is no limit."""
        if self.share:
            return "a probability, 0 to 1"
        limits = {"{} or more": self.least, "a number above {}": self.above, "less than {}": self.below}
        return ", and ".join(text.format(limit) for text, limit in limits.items() if math.isfinite(limit))

    def takes(self, number: float) -> bool:
        """Whether `number` is within the limits, as NaN and infinity never are."""
        return 0 <= number <= 1 if self.share else self.least <= number and self.above < number < self.below


def marked(help: str, **marks: Any) -> dict[str, Marks]:
    """The metadata of a settings class's field: its help and its other `Marks`."""
    return {"marks": Marks(help=help, **marks)}


def setting(default: Any, help: str, **marks: Any) -> Any:
    """A settings class's field with a default, see `marked`."""
    return field(default=default, metadata=marked(help, **marks))


def marks_of(settings: Any) -> dict[str, Marks]:
    """Name → marks of every setting of a settings class, or of an instance of one."""
    return {each.name: each.metadata["marks"] for each in fields(settings)}


def check(settings: Any) -> None:
    """Raise ConfigError for the first setting that is none of its type's choices, outside its range, or without effect.

    Without effect is one whose `beside` are all off or at their defaults. What is off itself always passes.
    """
    hints = get_type_hints(type(settings))
    for name, marks in marks_of(settings).items():
        value = getattr(settings, name)
        if value is None and type(None) in get_args(hints[name]):
            continue
        choices = [choice for kind in _kinds(hints[name]) if get_origin(kind) is Literal for choice in get_args(kind)]
        expected = "one of " + ", ".join(choices) if choices else marks.range
        flag = "--" + name.replace("_", "-") if marks.flag else name
        if value is None:
            raise ConfigError(f"{flag} is None; expected {expected if choices else _expected(hints[name])}")
        for item in value if isinstance(value, tuple | list) else (value,):
            if expected and not (item in choices if choices else marks.takes(item)):
                raise ConfigError(f"{flag} is {item!r}; expected {expected}")
    for name, reason in idle(settings).items():
        if not marks_of(settings)[name].lenient:
            raise ConfigError(f"{reason}; add that, or leave {reason.split()[0]} out")


def idle(settings: Any) -> dict[str, str]:
    """The settings that are set and change nothing, as their `beside` are all off or at their defaults; and why.

    A switch that is on by default is set when it is off.
    """
    values = {each.name: (getattr(settings, each.name), each.default) for each in fields(settings)}
    off = {name for name, (value, default) in values.items() if not value or value == default}
    switched_off = {name for name, (value, default) in values.items() if value is False and default is True}
    found = {}
    for name, marks in marks_of(settings).items():
        if marks.beside and (name not in off or name in switched_off) and off.issuperset(marks.beside):
            flag = ("--no-" if name in switched_off else "--") + name.replace("_", "-")
            others = ["--" + other.replace("_", "-") for other in marks.beside]
            found[name] = f"{flag} changes nothing without {' or '.join(others)}; expected that beside it"
    return found


def read_toml(path: Path) -> dict[str, Any]:
    """What the TOML file at `path` says; raises ConfigError, naming the line, when it cannot be read."""
    import tomllib  # not at the top: few commands have a use for it

    try:
        content = path.read_bytes()
        encoding = "utf-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
        return tomllib.loads(content.decode(encoding))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); expected a TOML file; correct the path"
        ) from error
    except (ValueError, RecursionError) as error:  # also of bytes that are not UTF-8
        raise ConfigError(
            f'{path} is not TOML: {error}; expected lines such as learning_rate = 1e-5 or where = "width >= 512"'
        ) from error


def settings_from(table: Mapping[str, Any], settings: type, allowed: Collection[str], *, where: str) -> dict[str, Any]:
    """The settings that `table` gives, by their names in the dataclass `settings`.

    Keys may be spelt as flags are, with dashes. Numbers without a fraction pass for a float, lists become tuples, a
    whole number passes for a list of one, and nothing else is converted. Raises ConfigError, which begins with `where`,
    for a key that is not `allowed`, for one that is given twice, and for a value of another type.
    """
    import difflib  # not at the top: few commands have a use for it

    hints = get_type_hints(settings)
    given: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in allowed:
            close = difflib.get_close_matches(name, sorted(allowed))
            expected = "the name of a flag" + (f", perhaps {' or '.join(close)}" if close else "")
            raise ConfigError(f"{where}: {key!r} is no setting; expected {expected}; correct it or take it out")
        if name in given:
            raise ConfigError(f"{where}: {name} is given twice, with dashes and with underscores; take one out")
        if not _fits(value, hints[name]):
            raise ConfigError(f"{where}: {name} is {value!r}; expected {_expected(hints[name])}")
        given[name] = _as_declared(value, hints[name])
    return given


def _kinds(hint: Any) -> list[Any]:
    """The types that a hint allows, None left out: TOML cannot say it, leaving the key out does."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return [kind for kind in kinds if kind is not type(None)]


def _fits(value: Any, hint: Any) -> bool:
    for kind in _kinds(hint):
        if get_origin(kind) is Literal:
            fits = value in get_args(kind)
        elif get_origin(kind) is tuple:
            items = value if isinstance(value, list) else [value] if type(value) is int else [None]
            fits = all(_fits(item, get_args(kind)[0]) for item in items)
        elif isinstance(value, bool):  # which is an int to Python
            fits = kind is bool
        else:
            fits = isinstance(value, (int, float) if kind is float else kind)
        if fits:
            return True
    return False


def _as_declared(value: Any, hint: Any) -> Any:
    if any(get_origin(kind) is tuple for kind in _kinds(hint)):
        return tuple(value) if isinstance(value, list) else (value,)
    return float(value) if float in _kinds(hint) else value


def _expected(hint: Any) -> str:
    (kind, *_) = _kinds(hint)
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(f'"{choice}"' for choice in get_args(kind))
    if get_origin(kind) is tuple:
        return f"a list, each item {_WORDS[get_args(kind)[0]]}"
    return _WORDS[kind]
