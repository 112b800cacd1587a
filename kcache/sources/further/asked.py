"""Which settings mean anything for a kind of source, and what it answers of control images that it was not told of."""

from collections.abc import Mapping
from dataclasses import fields
from typing import TypeVar

from kcache.config import SourceConfig
from kcache.config.source import flag_of, is_said
from kcache.errors import SourceError

_Column = TypeVar("_Column")


def may_lack(control: str) -> bool:
    """Whether a sample may be without a control image of a kind called so: without a mask, but not without its hint."""
    return not control.startswith("hint-")


def column_of(controls: Mapping[str, _Column], name: str) -> _Column:
    """That of a kind of control images, of those that were asked for; raises SourceError for another one."""
    if name not in controls:
        raise SourceError(
            f"the source was not told where {name} are; expected what the cache was built with; give {flag_of(name)}"
        )
    return controls[name]


CONTROLS = ("hint_column", "mask_column", "loss_mask_column")
"""Settings that say where control images are: what they are called where they are files, a column elsewhere."""
COLUMNS = ("image_column", "caption_column", "weight_column", "repeats_column", *CONTROLS)
"""Settings that name columns, or members of tars."""
_ANYWHERE = ("loss_mask_alpha",)
"""Settings that are of the pictures, wherever these are."""


def refuse_unused(config: SourceConfig, what: str, *used: str) -> None:
    """Raise SourceError for a setting that was given and means nothing for `what`, a kind that has the `used` ones."""
    for each in fields(SourceConfig):
        value = getattr(config, each.name)
        if is_said(value) and each.name not in (*used, *_ANYWHERE):
            flag = f"--{each.name.replace('_', '-')}"
            has = ", ".join(f"--{name.replace('_', '-')}" for name in used) or "no such flag"
            raise SourceError(
                f"{flag} {value!a} was given, but means nothing for {what}; expected {has}; leave {flag} out"
            )
