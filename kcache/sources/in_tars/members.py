"""The members of a tar as samples: which share a key, which of them is the image, goes with it, or says something."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kcache.config import SourceConfig
from kcache.config.source import flag_of
from kcache.errors import InputRejected
from kcache.places import Place
from kcache.sources.archives import Member, text_of
from kcache.sources.further.asked import may_lack
from kcache.sources.listing import IMAGE_SUFFIXES
from kcache.sources.protocol import Request
from kcache.sources.reading import MAX_IMAGE_BYTES, MAX_TEXT_BYTES, caption_lines, caption_tuple, readable

SHOWN_COLUMNS = 20
"""Columns of .json members that are told."""
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_TEXTS = ("txt", "text", "caption")
"""What a member is called that is a caption, the first of them first."""


@dataclass(slots=True)
class Group:
    """The members of one key."""

    members: dict[str, Member] = field(default_factory=dict)
    """By all that follows the key and its dot, in lower case."""
    problem: str | None = None

    def add(self, suffix: str, member: Member, *, beside: bool) -> None:
        if suffix in self.members:
            self.problem = f"two members {member.name!a} in one tar; write the tar again with one of them"
        elif self.members and not beside:
            self.problem = f"{member.name!a} stands apart from the other members of its key; write them side by side"
        self.members.setdefault(suffix, member)


def groups_of(members: Sequence[Member], refused: list[tuple[str, str, int]]) -> dict[str, Group]:
    groups: dict[str, Group] = {}
    before = None
    for member in members:
        if _hidden(member.name):
            continue
        split = _KEY.fullmatch(member.name)
        if split is None:
            refused.append((member.name, "no extension; expected a name such as 0001.jpg", -1))
            continue
        key, suffix = split.groups()
        groups.setdefault(key, Group()).add(suffix.lower(), member, beside=key == before)
        before = key
    return groups


def _hidden(name: str) -> bool:
    """Whether a member does not belong to a sample: hidden, or __x__, where webdataset keeps notes about the tar."""
    base = name.rpartition("/")[2]
    return base.startswith(".") or re.match(r"__[^/]*__(/|$)", name) is not None


def images_of(key: str, group: Group, config: SourceConfig) -> tuple[Member, list[Member | None]]:
    """The image of a sample, and those that go with it, of the kinds that are asked for, None where it may lack it."""
    if group.problem is not None:
        raise InputRejected("source", group.problem)
    controls = [_control(key, group, name, column) for name, column in config.controls.items() if column is not None]
    column = config.image_column
    images = [suffix for suffix in group.members if suffix in IMAGE_SUFFIXES]
    images = [suffix for suffix in images if all(group.members[suffix] is not each for each in controls)]
    if column is not None:
        images = [suffix for suffix in group.members if suffix == _suffix(column)]
    if len(images) != 1:
        what = "several images" if images else "no image" if column is None else f"no .{column}"
        advice = "name one with --image-column, such as jpg" if images else "a key ends at the first dot"
        suffixes = ascii(", ".join(images or group.members))[1:-1][:60]
        raise InputRejected("source", f"{what} among its members ({suffixes}); {advice}")
    return _checked(group.members[images[0]], MAX_IMAGE_BYTES), controls


def _control(key: str, group: Group, name: str, column: str) -> Member | None:
    """The member KEY.depth.png, or of any image suffix, that a column depth means; or KEY.depth, or KEY.png of png."""
    wanted = _suffix(column)
    found = [suffix for suffix in group.members if suffix == wanted or _is_called(suffix, wanted)]
    if len(found) == 1:
        return _checked(group.members[found[0]], MAX_IMAGE_BYTES)
    if found:
        names = " and ".join(ascii(group.members[suffix].name) for suffix in found)
        raise InputRejected("source", f"{names} are both its {column}; expected one; write the tar again without")
    if may_lack(name):
        return None
    held, base = ascii(", ".join(group.members))[1:-1][:60], key.rpartition("/")[2]
    expected = f"{base}.{wanted}" if wanted in IMAGE_SUFFIXES else f"{base}.{wanted}.png"
    raise InputRejected("source", f"there is no {expected!a} among its members ({held}), for {flag_of(name)}; add it")


def _is_called(suffix: str, column: str) -> bool:
    called, _, kind = suffix.rpartition(".")
    return called == column and kind in IMAGE_SUFFIXES


def _suffix(column: str) -> str:
    """What follows the key in the name of a member that a column means."""
    return column.lower().removeprefix(".")


def _checked(member: Member, limit: int) -> Member:
    if member.problem is not None:
        raise InputRejected("source", f"{member.name!a}: {member.problem}")
    if member.size > limit:
        raise InputRejected("source", f"{member.name!a} has {member.size:,} bytes, more than {limit:,}")
    return member


def json_row(path: Place, group: Group, config: SourceConfig, columns: dict[str, None]) -> dict[str, object]:
    """What the .json member of a sample holds, as far as it is needed; its columns are noted in `columns`."""
    about, texts = group.members.get("json"), _TEXTS if config.caption_column is None else ()
    if about is None or (any(name in group.members for name in texts) and not config.counts):
        return {}
    _checked(about, MAX_TEXT_BYTES)
    row = _json_object(about.name, text_of(path, about))
    columns.update(dict.fromkeys(row) if len(columns) < SHOWN_COLUMNS else {})
    return row


def captions_of(path: Place, group: Group, request: Request, row: Mapping[str, object]) -> tuple[tuple[str, ...], str]:
    """The captions of a sample whose .json member holds `row`, and where they stood."""
    asked = request.config.caption_column
    texts: tuple[str, ...] = _TEXTS if asked is None else ()
    if asked is not None and asked not in row:
        texts = (_suffix(asked),)
    suffix = next((name for name in texts if name in group.members and name != "json"), None)
    if suffix is not None:
        text = _checked(group.members[suffix], MAX_TEXT_BYTES)
        return caption_lines(text_of(path, text), text.name), f".{suffix} members"
    wanted = ("text", "caption") if asked is None else (asked,)
    # A column without a value gives way to one that has one.
    column = max((name for name in wanted if name in row), key=lambda name: row[name] is not None, default=None)
    if column is not None:
        return caption_tuple(row[column], needed=request.need_captions), f".json members, {column!r}"
    if request.need_captions:
        held = f" (its .json member holds {readable(', '.join(list(row)[:10]))}: --caption-column)" if row else ""
        member = ".txt" if asked is None else f".{texts[0]}"
        either = " or ".join(map(repr, wanted))
        reason = f"no captions: no {member} member beside it, and no .json member with {either}{held}"
        raise InputRejected("source", reason)
    return (), ""


def _json_object(name: str, content: bytes) -> dict[str, object]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputRejected("source", f"{name!a} is not JSON: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise InputRejected("source", f"{name!a} holds no JSON object")
    return value
