"""webdataset tars: image and caption of a sample are members of one key, as webdataset and img2dataset write them."""

import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from kcache.disk.memo import DigestMemo
from kcache.errors import InputRejected, SourceError, StoreError
from kcache.hints import near_names
from kcache.places import Place
from kcache.places.bucket import BucketPath
from kcache.places.fetching import AT_ONCE, Windows, listed, missing
from kcache.sources.archives import content_at, fetch_listings, image_at
from kcache.sources.offers import (
    NO_KEY,
    NOTHING,
    OFFERED,
    SHOWN_COLUMNS,
    Offer,
    joined_keys,
    key_text,
    keys_part,
    offer_of,
    offer_part,
)
from kcache.sources.protocol import Request, refusals
from kcache.sources.reading import readable
from kcache.store.digests import KEY_BYTES, content_key
from kcache.store.formats.records import Records
from kcache.store.samples import Refusal
from kcache.tally import counted
from kcache.urls import store_url

_TAR_NAME = re.compile(r"\.(tar|tgz|tar\.\w+)$")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"([0-9]{1,18})\.\.([0-9]{1,18})")
_MAX_TARS = 1_000_000
_EXPECTED = "plain tars with members such as 0001.jpg and 0001.txt side by side; correct the tars"
_SAMPLES = pa.schema([pa.field("tar", pa.int32()), *OFFERED])
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
    """The kinds of control images that are asked for."""
    windows: Windows = field(default_factory=Windows)
    keys: dict[tuple[int, bool], bytes] = field(default_factory=dict)
    """Keys of the images of some tars, by number and whether they were digested afresh."""

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, i: int) -> str:
        return readable(f"{self.tars[self.samples.value(i, 'tar')][0]}/{key_text(self.samples.value(i, 'key'))}")

    def captions(self, i: int) -> tuple[str, ...]:
        return tuple(self.samples.value(i, "captions"))

    def image(self, i: int) -> bytes:
        tar, offset, size, key = (self.samples.value(i, name) for name in ("tar", "offset", "size", "image_key"))
        return image_at(self.tars[tar][1], offset, size, key, self.windows)

    def control(self, i: int, name: str) -> bytes:
        return self.image(i)

    def control_keys(self, i: int, memo: DigestMemo, rehash: bool) -> tuple[bytes, ...]:
        return tuple(self.image_key(i, memo, rehash) for _ in self.controls)  # their own transparency is all there is

    def image_key(self, i: int, memo: DigestMemo, rehash: bool) -> bytes:
        known: bytes | None = self.samples.value(i, "image_key")
        if known is not None and not rehash:
            return known
        tar = self.samples.value(i, "tar")
        at = (i - self.firsts[tar]) * KEY_BYTES
        try:
            key = self._keys(tar, memo, rehash)[at : at + KEY_BYTES]
        except StoreError:  # which says nothing of the picture
            raise
        except OSError as error:
            raise InputRejected("source", f"the tar cannot be read: {error.strerror}") from error
        return content_key(self.image(i)) if key == NO_KEY else key

    def _keys(self, tar: int, memo: DigestMemo, rehash: bool) -> bytes:
        # Tar by tar, because one look at the file then answers for all of its images.
        keys = self.keys.get((tar, rehash))
        if keys is None:
            path, span = self.tars[tar][1], (self.firsts[tar], self.firsts[tar + 1])
            offsets, sizes = (self.samples.numbers(name, *span) for name in ("offset", "size"))
            keys = memo.digest(path, keys_part(offsets, sizes), lambda: joined_keys(self.image, range(*span)), rehash)
            self.keys[tar, rehash] = keys
            while len(self.keys) > _KEYS_OF:
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
        table = offer_of(self.path, self.request, memo).table
        return memo.remembered(self.path, keys_part(table["offset"].to_numpy(), table["size"].to_numpy()))

    def look(self, memo: DigestMemo) -> None:
        table = offer_of(self.path, self.request, memo).table
        offsets, sizes, known = (table[name] for name in ("offset", "size", "image_key"))

        def digested() -> bytes:
            if isinstance(self.path, BucketPath):  # as it was listed
                return b"".join(known.to_pylist())
            places = list(zip(offsets.to_pylist(), sizes.to_pylist(), strict=True))
            return joined_keys(lambda i: content_at(self.path, *places[i]), range(len(places)))

        memo.digest(self.path, keys_part(offsets.to_numpy(), sizes.to_numpy()), digested)


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

    def add(self, label: str, offer: Offer) -> None:
        """Note what the next tar, called `label`, has."""
        self.firsts.append(self.firsts[-1] + len(offer.table))
        self.groups += offer.groups
        self.refused |= {f"{label}/{key}" if key else label: reason for key, reason, _ in offer.refused}
        self.origins |= offer.origins.keys()
        self.columns |= dict.fromkeys(offer.columns if len(self.columns) < SHOWN_COLUMNS else ())


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
        samples = Records(_SAMPLES, _offered(tars, request, memo, found))
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
        offer = NOTHING
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
        yield offer.table.add_column(0, _SAMPLES.field(0), pa.repeat(pa.scalar(number, pa.int32()), len(offer.table)))


def expand_braces(spec: str) -> list[tuple[str, Place]]:
    """The files that a pattern such as "shards/{00000..00099}.tar" or "{a,b}/{0..9}.tar" means, and what to call each.

    They are called by their path from the last folder before the first brace. Raises SourceError.
    """
    start = spec.rfind("/", 0, spec.find("{")) + 1
    texts, place_of = _expansions(spec), Path if store_url(spec) is None else BucketPath.of
    tars: list[tuple[str, Place]] = [(text[start:], place_of(text)) for text in texts]
    if texts == [spec] or not all(label.endswith(".tar") for label, _ in tars):
        raise SourceError(f"{spec!r} is no pattern for tars; expected one such as {{00000..00099}}.tar; correct it")
    paths = [path for _, path in tars]
    if lacking := set(missing(paths) if place_of is not Path else [path for path in paths if not path.is_file()]):
        folder, first = Path(spec[:start] or "."), next(label for label, path in tars if path in lacking)
        near = "" if folder.exists() or store_url(spec) else near_names(folder)
        raise SourceError(
            f"{len(lacking):,} of the {len(tars):,} tars that {spec!r} stands for are missing, such as {first}; "
            f"expected all of them; {f'did you mean the folder {near}? C' if near else 'c'}orrect the pattern or "
            "restore the files"
        )
    return tars


def _expansions(spec: str) -> list[str]:
    texts = [""]
    position = 0
    for braces in _BRACES.finditer(spec):
        choices = _choices(braces[1])
        if len(choices) * len(texts) > _MAX_TARS:
            raise SourceError(f"{spec!r} stands for more than {_MAX_TARS:,} files; expected fewer; correct the range")
        between = spec[position : braces.start()]
        texts = [text + between + choice for text in texts for choice in choices]
        position = braces.end()
    return list(dict.fromkeys(text + spec[position:] for text in texts))


def _choices(body: str) -> Sequence[str]:
    numbers = _RANGE.fullmatch(body)
    if numbers is None:
        return body.split(",") if "," in body else [f"{{{body}}}"]
    first, last = numbers.groups()
    padded = any(len(text) > 1 and text.startswith("0") for text in numbers.groups())
    width = max(len(first), len(last)) if padded else 1
    step = 1 if int(first) <= int(last) else -1
    values = range(int(first), int(last) + step, step)
    # One more than is allowed tells the caller, without making a list of what a slip of the finger may ask for.
    return [f"{value:0{width}d}" for value in values[: _MAX_TARS + 1]]


def _unfinished(paths: Sequence[Place]) -> set[Place]:
    stats: dict[Place, set[str]] = {}
    for folder in {path.parent for path in paths}:
        stats[folder] = {name for name, _ in listed(folder) if name.endswith("_stats.json")}
    return {path for path in paths if stats[path.parent] and f"{path.stem}_stats.json" not in stats[path.parent]}
