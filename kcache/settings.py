"""Settings from TOML tables: every key is the name of a setting, every value of that setting's type."""

import difflib
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from kcache.errors import ConfigError

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


def read_toml(path: Path) -> dict[str, Any]:
    """What the TOML file at `path` says; raises ConfigError, naming the line, when it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); expected a TOML file; correct the path"
        ) from error
    except ValueError as error:  # also of bytes that are not UTF-8
        raise ConfigError(
            f'{path} is not TOML: {error}; expected lines such as learning_rate = 1e-5 or where = "width >= 512"'
        ) from error


def settings_from(table: Mapping[str, Any], settings: type, allowed: Collection[str], *, where: str) -> dict[str, Any]:
    """The settings that `table` gives, by their names in the dataclass `settings`.

    Keys may be spelt as flags are, with dashes. Numbers without a fraction pass for a float, lists become tuples, and
    nothing else is converted. Raises ConfigError, which begins with `where`, for a key that is not `allowed`, for one
    that is given twice, and for a value of another type.
    """
    hints = get_type_hints(settings)
    given: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in allowed:
            raise ConfigError(f"{where}: {key!r} is no setting{_guess(name, allowed)}; correct it or take it out")
        if name in given:
            raise ConfigError(f"{where}: {name} is given twice, with dashes and with underscores; take one out")
        if not _fits(value, hints[name]):
            raise ConfigError(f"{where}: {name} is {value!r}; expected {_expected(hints[name])}")
        given[name] = _as_declared(value, hints[name])
    return given


def _guess(name: str, allowed: Collection[str]) -> str:
    close = difflib.get_close_matches(name, sorted(allowed), n=3)
    return f"; expected the name of a flag, perhaps {' or '.join(close)}" if close else "; expected the name of a flag"


def _kinds(hint: Any) -> list[Any]:
    """The types that a hint allows, None left out: TOML cannot say it, leaving the key out does."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return [kind for kind in kinds if kind is not type(None)]


def _fits(value: Any, hint: Any) -> bool:
    for kind in _kinds(hint):
        if get_origin(kind) is Literal:
            fits = value in get_args(kind)
        elif get_origin(kind) is tuple:
            fits = isinstance(value, list) and all(_fits(item, get_args(kind)[0]) for item in value)
        elif isinstance(value, bool):  # which is an int to Python
            fits = kind is bool
        else:
            fits = isinstance(value, (int, float) if kind is float else kind)
        if fits:
            return True
    return False


def _as_declared(value: Any, hint: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return float(value) if float in _kinds(hint) else value


def _expected(hint: Any) -> str:
    (kind, *_) = _kinds(hint)
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(f'"{choice}"' for choice in get_args(kind))
    if get_origin(kind) is tuple:
        return f"a list, each item {_WORDS[get_args(kind)[0]]}"
    return _WORDS[kind]
