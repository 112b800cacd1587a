"""webdataset tars: image and caption of a sample are members of one key, as webdataset and img2dataset write them."""

import re
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa

from kcache.config import SourceConfig
from kcache.config.source import flag_of
from kcache.disk.memo import DigestMemo
from kcache.errors import InputRejected, SourceError, StoreError
from kcache.places import Place
from kcache.places.bucket import BucketPath
from kcache.places.fetching import AT_ONCE, Windows, listed
from kcache.sources.archives import content_at, fetch_listings, image_at, listing_of
from kcache.sources.further.asked import column_of
from kcache.sources.further.numbers import counts_at
from kcache.sources.in_tars.members import SHOWN_COLUMNS
from kcache.sources.in_tars.offers import (
    NO_KEY,
    Offer,
    joined_keys,
    key_text,
    keys_part,
    nothing,
    offer_of,
    offer_part,
    offered_schema,
    place_columns,
    said_by,
)
from kcache.sources.protocol import Request, refusals
from kcache.sources.reading import readable
from kcache.store.digests import KEY_BYTES, NO_CONTROL, content_key
from kcache.store.formats.records import Records
from kcache.store.samples import Refusal
from kcache.tally import counted

_TAR_NAME = re.compile(r"\.(tar|tgz|tar\.\w+)$")
_EXPECTED = "plain tars with members such as 0001.jpg and 0001.txt side by side; correct the tars"
_TAR = pa.field("tar", pa.int32())
_KEYS_OF = 8
"""Tars whose keys are held: samples are mostly asked for in their order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TarSource:
    """Samples in tars, in the order of the tars and in each as they stand there; a `Source`."""

    description: str
    refused: tuple[Refusal, ...]
    tars: Sequence[tuple[str, Place]]
    """What each tar is called in names, and its file."""
    samples: Records
    """Which tar each sample is in, and what that offers."""
    firsts: Sequence[int]
    """How many samples come before those of each tar, and how many there are."""
    controls: Mapping[str, str | None] = field(default_factory=dict)
    """The kinds of control images that are asked for, and what their members are called."""
    counted: Collection[str] = ()
    """The numbers that are asked for."""
    windows: Windows = field(default_factory=Windows)
    keys: dict[tuple[str | None, int, bool], bytes] = field(default_factory=dict)
    """Keys of the images of some tars, by kind, number and whether they were digested afresh."""

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, i: int) -> str:
        return readable(f"{self.tars[self.samples.value(i, 'tar')][0]}/{key_text(self.samples.value(i, 'key'))}")

    def captions(self, i: int) -> tuple[str, ...]:
        return tuple(self.samples.value(i, "captions"))

    def image(self, i: int) -> bytes:
        return self._content(i, None)

    def image_key(self, i: int, memo: DigestMemo, rehash: bool) -> bytes:
        return self._key(i, None, memo, rehash)

    def counts(self, i: int) -> tuple[float, int]:
        return counts_at(self.samples, self.counted, i)

    def control(self, i: int, name: str) -> bytes:
        return self._content(i, None if column_of(self.controls, name) is None else name)

    def control_keys(self, i: int, memo: DigestMemo, rehash: bool) -> tuple[bytes, ...]:
        kinds = (None if column is None else name for name, column in self.controls.items())
        return tuple(self._key(i, kind, memo, rehash) for kind in kinds)

    def _content(self, i: int, kind: str | None) -> bytes:
        """The image of a sample, or that of a kind that goes with it."""
        tar, offset, size, key = (self.samples.value(i, name) for name in ("tar", *place_columns(kind)))
        if offset < 0:
            raise InputRejected("source", f"there is no {kind} among its members")
        return image_at(self.tars[tar][1], offset, size, key, self.windows)

    def _key(self, i: int, kind: str | None, memo: DigestMemo, rehash: bool) -> bytes:
        tar, offset, _, known = (self.samples.value(i, name) for name in ("tar", *place_columns(kind)))
        if offset < 0:
            return NO_CONTROL
        if known is not None and not rehash:
            return bytes(known)
        at = (i - self.firsts[tar]) * KEY_BYTES
        try:
            key = self._keys(tar, kind, memo, rehash)[at : at + KEY_BYTES]
        except StoreError:  # which says nothing of the picture
            raise
        except OSError as error:
            raise InputRejected("source", f"the tar cannot be read: {error.strerror}") from error
        return content_key(self._content(i, kind)) if key == NO_KEY else key

    def _keys(self, tar: int, kind: str | None, memo: DigestMemo, rehash: bool) -> bytes:
        # Tar by tar, because one look at the file then answers for all of its images.
        keys = self.keys.get((kind, tar, rehash))
        if keys is None:
            path, span = self.tars[tar][1], (self.firsts[tar], self.firsts[tar + 1])
            offsets, sizes = (self.samples.numbers(name, *span) for name in place_columns(kind)[:2])
            read = partial(self._content, kind=kind)
            keys = memo.digest(path, keys_part(offsets, sizes), lambda: joined_keys(read, range(*span)), rehash)
            self.keys[kind, tar, rehash] = keys
            while len(self.keys) > _KEYS_OF * (1 + len(self.controls)):
                del self.keys[next(iter(self.keys))]
        return keys


@dataclass(frozen=True, slots=True, kw_only=True)
class TarPiece:
    """A tar to be looked through; a `Piece`."""

    path: Place
    """An absolute one."""
    request: Request

    @property
    def name(self) -> str:
        return str(self.path)

    def is_known(self, memo: DigestMemo) -> bool:
        if not memo.remembered(self.path, offer_part(self.request)):
            return False
        if isinstance(self.path, BucketPath):
            return True
        return all(memo.remembered(self.path, keys_part(*places)) for places in self._places(memo))

    def look(self, memo: DigestMemo) -> None:
        for offsets, sizes in self._places(memo):
            memo.digest(self.path, keys_part(offsets, sizes), partial(self._digested, offsets, sizes, memo))

    def _places(self, memo: DigestMemo) -> list[tuple[np.ndarray, np.ndarray]]:
        """The offsets and sizes of images of each kind."""
        table = offer_of(self.path, self.request, memo).table
        kinds = [None, *(name for name, column in self.request.config.controls.items() if column is not None)]
        columns = (place_columns(kind)[:2] for kind in kinds)
        return [(table[offset].to_numpy(), table[size].to_numpy()) for offset, size in columns]

    def _digested(self, offsets: np.ndarray, sizes: np.ndarray, memo: DigestMemo) -> bytes:
        if isinstance(self.path, BucketPath):  # as it was listed
            members = {member.offset: member.key for member in listing_of(self.path, memo).members if member.size}
            return b"".join(members.get(offset) or NO_KEY for offset in offsets.tolist())

        def read(number: int) -> bytes:
            if offsets[number] < 0:
                raise InputRejected("source", "there is none")
            return content_at(self.path, int(offsets[number]), int(sizes[number]))

        return joined_keys(read, range(len(offsets)))


@dataclass(slots=True)
class _Found:
    """What has been found in the tars so far."""

    firsts: "array[int]" = field(default_factory=lambda: array("q", [0]))
    groups: int = 0
    """Keys that were looked at."""
    refused: dict[str, str] = field(default_factory=dict)
    origins: set[str] = field(default_factory=set)
    """Where captions came from."""
    columns: dict[str, None] = field(default_factory=dict)
    """What .json members hold, as far as it was looked at."""
    said: set[str] = field(default_factory=set)
    """The control images and numbers, by name, that any sample has."""

    def add(self, label: str, offer: Offer) -> None:
        """Note what the next tar, called `label`, has."""
        self.firsts.append(self.firsts[-1] + len(offer.table))
        self.groups += offer.groups
        self.refused |= {f"{label}/{key}" if key else label: reason for key, reason, _ in offer.refused}
        self.origins |= offer.origins.keys()
        self.columns |= dict.fromkeys(offer.columns if len(self.columns) < SHOWN_COLUMNS else ())
        self.said |= said_by(offer.table)


def is_tar_name(name: str) -> bool:
    """Whether a file is called like a tar, compressed ones included."""
    return _TAR_NAME.search(name.lower()) is not None


def open_tars(tars: Sequence[tuple[str, Place]], refused: Mapping[str, str], request: Request) -> TarSource:
    """Open tars given as (what to call it, file); raises SourceError when they offer no sample.

    The caption of a sample is its .txt, .text or .caption member, else what its .json member has in "text" or
    "caption". A caption column that was given is looked for in the .json member, else as a member's name, and nowhere
    else; an image column that was given names the member that is the image.
    Where a folder has _stats.json files, as img2dataset writes one when a tar is finished, a tar without is refused.
    """
    found = _Found(refused=dict(refused))
    pieces = [TarPiece(path=path.absolute(), request=request.alone) for _, path in tars]
    with nullcontext(request.memo) if request.memo is not None else DigestMemo() as memo:
        if request.max_train_samples is None:
            request.look_ahead(pieces)
        schema = pa.schema([_TAR, *offered_schema(request.config)])
        samples = Records(schema, _offered(tars, request, memo, found))
    used = np.flatnonzero(np.diff(found.firsts)).tolist()
    if request.max_train_samples is not None:
        request.look_ahead([pieces[tar] for tar in used])
    place, reasons = f"a webdataset of {counted(len(tars), 'tar')}", dict(sorted(found.refused.items()))
    column = request.config.caption_column
    if column is not None and found.groups and not found.origins:
        held = readable(", ".join(list(found.columns)[:SHOWN_COLUMNS])) or "nothing"
        raise SourceError(
            f"{place} has no caption column {column!r}: .json members hold {held}; name the right one with "
            "--caption-column, or leave it out to take .txt members"
        )
    _check_said(place, request.config, found)
    all_refused = refusals(place, samples, reasons, expected=_EXPECTED)
    counts = f"{counted(len(samples), 'image')} in {counted(len(used), 'tar')}"
    origin = "captions from " + " and ".join(sorted(found.origins)) if found.origins else "no captions"
    return TarSource(
        description=f"webdataset: {counts}, {origin}",
        refused=all_refused,
        tars=tars,
        samples=samples,
        firsts=found.firsts,
        controls=request.config.controls,
        counted=request.config.counts,
    )


def _check_said(place: str, config: SourceConfig, found: _Found) -> None:
    """Raise SourceError for control images that may lack, and numbers, that were asked for and that no sample has."""
    held = readable(", ".join(list(found.columns)[:SHOWN_COLUMNS])) or "nothing"
    for name, column in (config.controls | config.counts).items() if found.firsts[-1] else ():
        if column is None or name in found.said:
            continue
        if name in config.counts:
            raise SourceError(
                f"{place} has no column {column!r}: .json members hold {held}; name the one that holds such numbers "
                f"with --{name}-column"
            )
        raise SourceError(
            f"{place} has no member such as 'KEY.{column}.png' in any sample; correct {flag_of(name)}, or leave it out"
        )


def _offered(
    tars: Sequence[tuple[str, Place]], request: Request, memo: DigestMemo, found: _Found
) -> Iterator[pa.Table]:
    """The samples tar by tar, what is to be said of each noted in `found`."""
    unfinished, most = _unfinished([path for _, path in tars]), request.max_train_samples
    part = offer_part(request)
    for number, (label, path) in enumerate(tars):
        if found.firsts[-1] == most:
            break
        if number % AT_ONCE == 0:
            near = [path for _, path in tars[number : number + AT_ONCE] if isinstance(path, BucketPath)]
            memo.ask(near)
            fetch_listings([path for path in near if not memo.remembered(path, part)], memo)
        offer = nothing(request.config)
        try:
            if path in unfinished:
                raise InputRejected(
                    "source", f"unfinished: there is no {path.stem}_stats.json beside it, as finished tars there have"
                )
            offer = offer_of(path, request, memo)
        except InputRejected as rejection:
            found.refused[label] = rejection.reason
        except StoreError:
            raise
        except OSError as error:
            found.refused[label] = f"cannot be read: {error.strerror}"
        if most is not None and len(offer.table) > (left := most - found.firsts[-1]):
            offer = offer.head(left)
        found.add(label, offer)
        yield offer.table.add_column(0, _TAR, pa.repeat(pa.scalar(number, pa.int32()), len(offer.table)))


def _unfinished(paths: Sequence[Place]) -> set[Place]:
    stats: dict[Place, set[str]] = {}
    for folder in {path.parent for path in paths}:
        stats[folder] = {name for name, _ in listed(folder) if name.endswith("_stats.json")}
    return {path for path in paths if stats[path.parent] and f"{path.stem}_stats.json" not in stats[path.parent]}
