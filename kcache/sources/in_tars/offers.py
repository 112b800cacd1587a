"""What one tar offers: its members grouped into samples, in columns, and why the others are none.

That depends on the tar and on how it is to be read, so that it is remembered, and found out anywhere.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import chain
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kcache.config import SourceConfig
from kcache.disk.memo import DigestMemo
from kcache.errors import InputRejected
from kcache.places import Place
from kcache.plainly import plainly_at
from kcache.sources.archives import TarListing, listing_of
from kcache.sources.further.numbers import number_fields, numbers_in
from kcache.sources.in_tars.members import captions_of, groups_of, images_of, json_row
from kcache.sources.protocol import Request
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
"""What a sample is said by that has neither further images nor numbers."""
IMAGE = ("offset", "size", "image_key")
NO_KEY = bytes(KEY_BYTES)
"""Stands for the key of an image that could not be read, in the memo; no content has this key."""
_FORM = 2
"""Of what is remembered: another number for another one."""
_NOTES = b"kcache"
_SUM_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """The samples of a tar, in order, and what is to be said of them."""

    table: pa.Table
    """With the columns of `offered_schema`."""
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


def nothing(config: SourceConfig) -> Offer:
    """What is offered by a tar that cannot be read."""
    return Offer(table=offered_schema(config).empty_table(), refused=(), origins={}, columns=(), groups=0)


def offered_schema(config: SourceConfig) -> pa.Schema:
    """The columns of samples: `OFFERED`, places of the control images that are asked for, and numbers."""
    fields = [*OFFERED]
    for name, column in config.controls.items():
        if column is not None:
            types = (OFFERED.field(each).type for each in IMAGE)
            fields += [pa.field(each, kind) for each, kind in zip(place_columns(name), types, strict=True)]
    return pa.schema([*fields, *number_fields(config.counts)])


def place_columns(control: str | None) -> tuple[str, str, str]:
    """The columns of where in the tar an image is, and its key: of control images of a kind, or of the image itself.

    A sample without has the offset -1.
    """
    return IMAGE if control is None else tuple(f"{name} of {control}" for name in IMAGE)  # type: ignore[return-value]


def said_by(table: pa.Table) -> set[str]:
    """The control images and numbers, by name, that any sample of an offer has."""
    found = set()
    for name in table.column_names[len(OFFERED) :]:
        what, _, control = name.partition(" of ")
        if what == IMAGE[0] and pc.any(pc.greater_equal(table[name], 0)).as_py():
            found.add(control)
        if not control and table[name].null_count < len(table):
            found.add(name)
    return found


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
    config = request.config
    settings: list[object] = [config.image_column, config.caption_column, request.need_captions]
    if further := {name: column for name, column in config.controls.items() if column is not None} | config.counts:
        settings.append(further)  # nothing where none is asked for, so that what was remembered before counts
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


def _found_in(path: Place, request: Request, memo: DigestMemo) -> Offer:
    if path.suffix.lower() != ".tar":
        raise InputRejected("source", "a compressed tar; expected a plain .tar; unpack it, e.g. with gunzip")
    listing = listing_of(path, memo)
    _check_whole(path, listing)
    refused, columns = list[tuple[str, str, int]](), dict[str, None]()
    schema, samples, origins = offered_schema(request.config), list[tuple[object, ...]](), dict[str, int]()
    groups = groups_of(listing.members, refused)
    if listing.damage is not None:
        last = next(reversed(groups), None)
        refused.append(("", f"damaged or cut short ({listing.damage}); what followed {last!a} is lost", -1))
        if last is not None:
            groups[last].problem = "may be incomplete, as the tar is damaged or cut short behind it"
    for key, group in groups.items():
        try:
            image, controls = images_of(key, group, request.config)
            row = json_row(path, group, request.config, columns)
            captions, origin = captions_of(path, group, request, row)
            numbers = numbers_in(request.config.counts, row)
        except InputRejected as rejection:
            refused.append((key, rejection.reason, len(samples)))
            continue
        if captions:
            origins.setdefault(origin, len(samples))
        places = [(-1, 0, None) if each is None else (each.offset, each.size, each.key) for each in controls]
        own = key.encode("utf-8", "surrogatepass"), image.offset, image.size, captions, image.key
        samples.append((*own, *chain.from_iterable(places), *map(numbers.get, request.config.counts)))
    columns_of = zip(*samples, strict=True) if samples else [()] * len(schema)
    arrays = [pa.array(values, each.type) for each, values in zip(schema, columns_of, strict=True)]
    table = pa.table(arrays, schema=schema)
    return Offer(table=table, refused=refused, origins=origins, columns=list(columns), groups=len(groups))


def _check_whole(path: Place, listing: TarListing) -> None:
    if listing.damage is not None and not listing.members:
        what = plainly_at(path)
        told = f"not a plain tar: it is {what}" if what and not what.startswith("a tar") else "damaged from the start"
        raise InputRejected("source", f"{told} ({listing.damage})")
