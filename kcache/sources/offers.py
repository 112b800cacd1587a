"""What one tar offers: its members grouped into samples, in columns, and why the others are none.

That depends on the tar and on how it is to be read, so that it is remembered, and found out anywhere.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Self

import numpy as np
import pyarrow as pa

from kcache.disk.memo import DigestMemo
from kcache.errors import InputRejected
from kcache.places import Place
from kcache.plainly import plainly_at
from kcache.sources.archives import Member, TarListing, listing_of, text_of
from kcache.sources.listing import IMAGE_SUFFIXES
from kcache.sources.protocol import Request
from kcache.sources.reading import MAX_IMAGE_BYTES, MAX_TEXT_BYTES, caption_lines, caption_tuple, readable
from kcache.store.digests import KEY_BYTES, content_key
from kcache.store.formats.checksums import crc32c

OFFERED = pa.schema(
    {
        "key": pa.binary(),  # of the sample, which need not be UTF-8: see `key_text`
        "offset": pa.int64(),  # of its image in the tar
        "size": pa.int64(),
        "captions": pa.list_(pa.string()),
        "image_key": pa.binary(KEY_BYTES),  # where it is known already, of a tar in a bucket
    }
)
NO_KEY = bytes(KEY_BYTES)
"""Stands for the key of an image that could not be read, in the memo; no content has this key."""
SHOWN_COLUMNS = 20
"""Columns of .json members that are told."""
_FORM = 2
"""Of what is remembered: another number for another one."""
_NOTES = b"kcache"
_SUM_BYTES = 4
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_TEXTS = ("txt", "text", "caption")
"""What a member is called that is a caption, the first of them first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """The samples of a tar, in order, and what is to be said of them."""

    table: pa.Table
    """With the columns `OFFERED`."""
    refused: Sequence[tuple[str, str, int]]
    """Key or member, "" for the tar itself, why it is refused, and how many samples come before it; -1 of the tar."""
    origins: Mapping[str, int]
    """Where captions came from, and how many samples come before the first one."""
    columns: Sequence[str]
    """What .json members hold, as far as it was looked at."""
    groups: int
    """Keys that were looked at."""

    def head(self, count: int) -> Self:
        """What it would be if no more than `count` samples, which are not all, had been looked for."""
        return replace(
            self,
            table=self.table.slice(0, count),
            refused=[each for each in self.refused if each[2] < count],
            origins={text: first for text, first in self.origins.items() if first < count},
        )

    def packed(self) -> bytes:
        """The same as bytes."""
        notes = json.dumps([self.refused, self.origins, self.columns, self.groups]).encode()
        sink = pa.BufferOutputStream()
        table = self.table.replace_schema_metadata({_NOTES: notes})
        with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
            writer.write_table(table)
        content = bytes(sink.getvalue())
        return crc32c(content).to_bytes(_SUM_BYTES) + content

    @classmethod
    def unpacked(cls, packed: bytes) -> Self:
        """What was `packed`; raises ValueError for what is not as it was."""
        content = packed[_SUM_BYTES:]
        if crc32c(content) != int.from_bytes(packed[:_SUM_BYTES]):
            raise ValueError("its checksum is that of something else")
        with pa.ipc.open_stream(content) as reader:
            table = reader.read_all()
        refused, origins, columns, groups = json.loads(table.schema.metadata[_NOTES])
        table = table.replace_schema_metadata(None)
        return cls(table=table, refused=[*map(tuple, refused)], origins=origins, columns=columns, groups=groups)


NOTHING = Offer(table=OFFERED.empty_table(), refused=(), origins={}, columns=(), groups=0)
"""What is offered by a tar that cannot be read."""


def offer_of(path: Place, request: Request, memo: DigestMemo) -> Offer:
    """What a tar offers, as far as `memo` knows it; raises InputRejected for what is none, OSError, StoreError."""

    def packed(rehash: bool) -> bytes:
        return memo.digest(path, offer_part(request), lambda: _found_in(path, request, memo).packed(), rehash)

    content = packed(request.rehash)
    try:
        return Offer.unpacked(content)
    except ValueError:  # it was damaged where it is kept
        return Offer.unpacked(packed(True))


def offer_part(request: Request) -> str:
    """What the memo calls what a tar offers."""
    settings = [request.config.image_column, request.config.caption_column, request.need_captions]
    return f"what the tar offers, {_FORM}, kcache {version('kcache')}, {json.dumps(settings)}"


def keys_part(offsets: np.ndarray, sizes: np.ndarray) -> str:
    """What the memo calls the keys of the images at `offsets` (n,) int64 of a tar, of `sizes` (n,) int64."""
    places = content_key(offsets.astype("<i8").tobytes() + sizes.astype("<i8").tobytes()).hex()
    return f"content_key of each of {len(offsets)} images, {places}"


def joined_keys(read: Callable[[int], bytes], numbers: Iterable[int]) -> bytes:
    """The keys of images behind each other, `NO_KEY` for those that `read` rejects; raises what else it raises."""

    def key_of(number: int) -> bytes:
        try:
            return content_key(read(number))
        except InputRejected:
            return NO_KEY

    return b"".join(map(key_of, numbers))


def key_text(key: bytes) -> str:
    """A key of a sample, as it stands in columns."""
    return key.decode("utf-8", "surrogatepass")


@dataclass(slots=True)
class _Group:
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


def _found_in(path: Place, request: Request, memo: DigestMemo) -> Offer:
    if path.suffix.lower() != ".tar":
        raise InputRejected("source", "a compressed tar; expected a plain .tar; unpack it, e.g. with gunzip")
    listing = listing_of(path, memo)
    _check_whole(path, listing)
    refused, columns = list[tuple[str, str, int]](), dict[str, None]()
    samples, origins = list[tuple[object, ...]](), dict[str, int]()
    groups = _groups(listing.members, refused)
    if listing.damage is not None:
        last = next(reversed(groups), None)
        refused.append(("", f"damaged or cut short ({listing.damage}); what followed {last!a} is lost", -1))
        if last is not None:
            groups[last].problem = "may be incomplete, as the tar is damaged or cut short behind it"
    for key, group in groups.items():
        try:
            image = _image(group, request.config.image_column)
            captions, origin = _captions(path, group, request, columns)
        except InputRejected as rejection:
            refused.append((key, rejection.reason, len(samples)))
            continue
        if captions:
            origins.setdefault(origin, len(samples))
        samples.append((key.encode("utf-8", "surrogatepass"), image.offset, image.size, captions, image.key))
    columns_of = zip(*samples, strict=True) if samples else [()] * len(OFFERED)
    arrays = [pa.array(values, each.type) for each, values in zip(OFFERED, columns_of, strict=True)]
    table = pa.table(arrays, schema=OFFERED)
    return Offer(table=table, refused=refused, origins=origins, columns=list(columns), groups=len(groups))


def _check_whole(path: Place, listing: TarListing) -> None:
    if listing.damage is not None and not listing.members:
        what = plainly_at(path)
        told = f"not a plain tar: it is {what}" if what and not what.startswith("a tar") else "damaged from the start"
        raise InputRejected("source", f"{told} ({listing.damage})")


def _groups(members: Sequence[Member], refused: list[tuple[str, str, int]]) -> dict[str, _Group]:
    groups: dict[str, _Group] = {}
    before = None
    for member in members:
        if _hidden(member.name):
            continue
        split = _KEY.fullmatch(member.name)
        if split is None:
            refused.append((member.name, "no extension; expected a name such as 0001.jpg", -1))
            continue
        key, suffix = split.groups()
        groups.setdefault(key, _Group()).add(suffix.lower(), member, beside=key == before)
        before = key
    return groups


def _hidden(name: str) -> bool:
    """Whether a member does not belong to a sample: hidden, or __x__, where webdataset keeps notes about the tar."""
    base = name.rpartition("/")[2]
    return base.startswith(".") or re.match(r"__[^/]*__(/|$)", name) is not None


def _image(group: _Group, column: str | None) -> Member:
    if group.problem is not None:
        raise InputRejected("source", group.problem)
    images = [suffix for suffix in group.members if suffix in IMAGE_SUFFIXES]
    if column is not None:
        images = [suffix for suffix in group.members if suffix == column.lower().removeprefix(".")]
    if len(images) != 1:
        what = "several images" if images else "no image" if column is None else f"no .{column}"
        advice = "name one with --image-column, such as jpg" if images else "a key ends at the first dot"
        suffixes = ascii(", ".join(images or group.members))[1:-1][:60]
        raise InputRejected("source", f"{what} among its members ({suffixes}); {advice}")
    return _checked(group.members[images[0]], MAX_IMAGE_BYTES)


def _checked(member: Member, limit: int) -> Member:
    if member.problem is not None:
        raise InputRejected("source", f"{member.name!a}: {member.problem}")
    if member.size > limit:
        raise InputRejected("source", f"{member.name!a} has {member.size:,} bytes, more than {limit:,}")
    return member


def _captions(path: Place, group: _Group, request: Request, columns: dict[str, None]) -> tuple[tuple[str, ...], str]:
    """The captions of a sample, and where they stood; the columns of its .json member are noted in `columns`."""
    asked = request.config.caption_column
    texts: tuple[str, ...] = _TEXTS if asked is None else ()
    row: dict[str, object] = {}
    if (about := group.members.get("json")) is not None and not any(name in group.members for name in texts):
        _checked(about, MAX_TEXT_BYTES)
        row = _json_object(about.name, text_of(path, about))
        columns.update(dict.fromkeys(row) if len(columns) < SHOWN_COLUMNS else {})
    if asked is not None and asked not in row:
        texts = (asked.lower().removeprefix("."),)
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
