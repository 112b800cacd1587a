"""webdataset tars: image and caption of a sample are members of one key, as webdataset and img2dataset write them."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kcache.disk.memo import DigestMemo
from kcache.errors import InputRejected, SourceError, StoreError
from kcache.hints import near_names
from kcache.places import Place
from kcache.places.bucket import BucketPath
from kcache.places.fetching import Windows, listed, missing
from kcache.plainly import plainly_at
from kcache.sources.archives import Member, TarListing, far_listings, image_at, list_members, text_of
from kcache.sources.listing import IMAGE_SUFFIXES
from kcache.sources.protocol import Request, refusals
from kcache.sources.reading import MAX_IMAGE_BYTES, MAX_TEXT_BYTES, caption_lines, caption_tuple, readable
from kcache.store.digests import content_key
from kcache.store.samples import Refusal
from kcache.tally import counted
from kcache.urls import store_url

_TAR_NAME = re.compile(r"\.(tar|tgz|tar\.\w+)$")
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_TEXTS = ("txt", "text", "caption")
"""What a member is called that is a caption, the first of them first."""
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"([0-9]{1,18})\.\.([0-9]{1,18})")
_MAX_TARS = 1_000_000
_SHOWN_COLUMNS = 20
_EXPECTED = "plain tars with members such as 0001.jpg and 0001.txt side by side; correct the tars"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    tar: int
    key: str
    offset: int
    size: int
    captions: tuple[str, ...]
    key_of_image: bytes | None
    """Where it is known already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TarSource:
    """Samples in tars, in the order of the tars and in each as they stand there; a `Source`."""

    description: str
    refused: tuple[Refusal, ...]
    tars: Sequence[tuple[str, Place]]
    """What each tar is called in names, and its file."""
    samples: Sequence[_Sample]
    windows: Windows = field(default_factory=Windows)

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, i: int) -> str:
        sample = self.samples[i]
        return readable(f"{self.tars[sample.tar][0]}/{sample.key}")

    def captions(self, i: int) -> tuple[str, ...]:
        return self.samples[i].captions

    def image(self, i: int) -> bytes:
        at = self.samples[i]
        return image_at(self.tars[at.tar][1], at.offset, at.size, at.key_of_image, self.windows)

    def image_key(self, i: int, memo: DigestMemo, rehash: bool) -> bytes:
        sample = self.samples[i]
        if sample.key_of_image is not None and not rehash:
            return sample.key_of_image
        part = f"content_key of {sample.size} bytes at {sample.offset}"
        try:
            return memo.digest(self.tars[sample.tar][1], part, lambda: content_key(self.image(i)), rehash)
        except OSError as error:
            raise InputRejected("source", f"the tar cannot be read: {error.strerror}") from error


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


@dataclass(slots=True)
class _Found:
    """What has been found in the tars so far."""

    samples: list[_Sample] = field(default_factory=list)
    groups: int = 0
    """Keys that were looked at."""
    refused: dict[str, str] = field(default_factory=dict)
    origins: Counter[str] = field(default_factory=Counter)
    """Where captions came from, and how often."""
    columns: dict[str, None] = field(default_factory=dict)
    """What .json members hold, as far as it was looked at."""


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
    unfinished = _unfinished([path for _, path in tars])
    listings = far_listings([path for _, path in tars])
    for number, (label, path) in enumerate(tars):
        if len(found.samples) == request.max_train_samples:
            break
        try:
            if path in unfinished:
                raise InputRejected(
                    "source", f"unfinished: there is no {path.stem}_stats.json beside it, as finished tars there have"
                )
            _read_tar(number, label, path, request, found, listings)
        except InputRejected as rejection:
            found.refused[label] = rejection.reason
        except StoreError:
            raise
        except OSError as error:
            found.refused[label] = f"cannot be read: {error.strerror}"
    place, reasons = f"a webdataset of {counted(len(tars), 'tar')}", dict(sorted(found.refused.items()))
    column = request.config.caption_column
    if column is not None and found.groups and not found.origins:
        held = readable(", ".join(list(found.columns)[:_SHOWN_COLUMNS])) or "nothing"
        raise SourceError(
            f"{place} has no caption column {column!r}: .json members hold {held}; name the right one with "
            "--caption-column, or leave it out to take .txt members"
        )
    all_refused = refusals(place, found.samples, reasons, expected=_EXPECTED)
    used = len({sample.tar for sample in found.samples})
    counts = f"{counted(len(found.samples), 'image')} in {counted(used, 'tar')}"
    origin = "captions from " + " and ".join(sorted(found.origins)) if found.origins else "no captions"
    return TarSource(
        description=f"webdataset: {counts}, {origin}",
        refused=all_refused,
        tars=tars,
        samples=found.samples,
    )


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


def _read_tar(number: int, label: str, path: Place, request: Request, found: _Found, far: Iterator[TarListing]) -> None:
    if path.suffix.lower() != ".tar":
        raise InputRejected("source", "a compressed tar; expected a plain .tar; unpack it, e.g. with gunzip")
    listing = list_members(path) if isinstance(path, Path) else next(far)
    if listing.damage is not None and not listing.members:
        what = plainly_at(path)
        told = f"not a plain tar: it is {what}" if what and not what.startswith("a tar") else "damaged from the start"
        raise InputRejected("source", f"{told} ({listing.damage})")
    groups = _groups(label, listing.members, found.refused)
    if listing.damage is not None:
        last = next(reversed(groups), None)
        found.refused[label] = f"damaged or cut short ({listing.damage}); what followed {last!a} is lost"
        if last is not None:
            groups[last].problem = "may be incomplete, as the tar is damaged or cut short behind it"
    for key, group in groups.items():
        if len(found.samples) == request.max_train_samples:
            break
        try:
            found.groups += 1
            image = _image(group, request.config.image_column)
            captions, origin = _captions(path, group, request, found.columns)
        except InputRejected as rejection:
            found.refused[f"{label}/{key}"] = rejection.reason
            continue
        place = {"tar": number, "offset": image.offset, "size": image.size}
        found.samples.append(_Sample(**place, key=key, captions=captions, key_of_image=image.key))
        if captions:
            found.origins[origin] += 1


def _groups(label: str, members: Sequence[Member], refused: dict[str, str]) -> dict[str, _Group]:
    groups: dict[str, _Group] = {}
    before = None
    for member in members:
        if _hidden(member.name):
            continue
        split = _KEY.fullmatch(member.name)
        if split is None:
            refused[f"{label}/{member.name}"] = "no extension; expected a name such as 0001.jpg"
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
        columns.update(dict.fromkeys(row) if len(columns) < _SHOWN_COLUMNS else {})
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
