"""Folders of image files, with captions in metadata files (imagefolder) or in a text file beside each image."""

import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from kcache.config.source import flag_of
from kcache.disk.memo import DigestMemo
from kcache.errors import InputRejected, SourceError
from kcache.plainly import plainly_at, shown
from kcache.sources.further.asked import column_of, may_lack
from kcache.sources.further.beside import ControlFiles, expected_file
from kcache.sources.further.numbers import counts_at, number_fields
from kcache.sources.listing import FolderListing, kind_of, leftovers, one_form, unlike_pictures
from kcache.sources.metadata import Said, read_metadata
from kcache.sources.protocol import Request, refusals
from kcache.sources.reading import MAX_IMAGE_BYTES, caption_file, read_file, readable, stem_of
from kcache.store.digests import NO_CONTROL, content_key
from kcache.store.formats.records import Records
from kcache.store.samples import Refusal
from kcache.tally import counted

_TEXT_SUFFIXES = (".txt", ".caption")
"""Suffixes of files with the captions of one image, in small letters; the first that is there counts."""
_SAMPLES = pa.schema({"path": pa.binary(), "captions": pa.list_(pa.string()), "controls": pa.list_(pa.binary())})
_PART = "content_key"
"""What the memo calls the key of an image file."""
_RUN = 2000
"""Image files that are looked through together."""
_EXPECTED = (
    'images with a row each in metadata.jsonl, e.g. {"file_name": "a.jpg", "text": "a cat"}, or with a text file each, '
    "a.txt beside a.jpg"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderSource:
    """Image files in a folder, sorted by path; a `Source`."""

    description: str
    refused: tuple[Refusal, ...]
    root: Path
    """The folder's real, absolute path."""
    samples: Records
    """Path relative to the root, captions, and paths of control images of each kind; "" where there is none."""
    controls: Mapping[str, str | None] = field(default_factory=dict)
    """The kinds of control images that are asked for, and what stands in the names of their files."""
    counted: Collection[str] = ()
    """The numbers that are asked for."""

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, i: int) -> str:
        return readable(os.fsdecode(self.samples.value(i, "path")))

    def captions(self, i: int) -> tuple[str, ...]:
        return tuple(self.samples.value(i, "captions"))

    def image(self, i: int) -> bytes:
        return read_file(self._path(i), MAX_IMAGE_BYTES)

    def image_key(self, i: int, memo: DigestMemo, rehash: bool) -> bytes:
        try:
            return _key_of(self._path(i), memo, rehash)
        except OSError as error:
            raise InputRejected("source", f"cannot be read: {error.strerror}") from error

    def counts(self, i: int) -> tuple[float, int]:
        return counts_at(self.samples, self.counted, i)

    def control(self, i: int, name: str) -> bytes:
        path = self._control_path(i, name)
        try:
            return read_file(path, MAX_IMAGE_BYTES)
        except InputRejected as rejection:
            where = os.path.relpath(path, self.root)
            raise InputRejected("source", f"its {name} {where!a}: {rejection.reason}") from rejection

    def control_keys(self, i: int, memo: DigestMemo, rehash: bool) -> tuple[bytes, ...]:
        return tuple(self._control_key(i, name, memo, rehash) for name in self.controls)

    def _control_key(self, i: int, name: str, memo: DigestMemo, rehash: bool) -> bytes:
        path, column = self._control_path(i, name), self.controls[name]
        if path == f"{self.root}/":
            if column is None or may_lack(name):
                return NO_CONTROL
            beside = expected_file(self.name(i), column)
            raise InputRejected(
                "source", f"there is no {beside!a} beside it, for {flag_of(name)}; expected one; add it"
            )
        try:
            return memo.digest(path, _PART, lambda: content_key(self.control(i, name)), rehash)
        except OSError as error:
            raise InputRejected("source", f"its {name} cannot be read: {error.strerror}") from error

    def _control_path(self, i: int, name: str) -> str:
        """Of a control image that the sample does not have, the root and a slash."""
        if column_of(self.controls, name) is None:
            return self._path(i)
        number = [*self.controls].index(name)
        return f"{self.root}/{os.fsdecode(self.samples.value(i, 'controls')[number])}"

    def _path(self, i: int) -> str:
        # Not a Path: those of 100,000 images take a second.
        return f"{self.root}/{os.fsdecode(self.samples.value(i, 'path'))}"


def _key_of(path: str, memo: DigestMemo, rehash: bool = False) -> bytes:
    return memo.digest(path, _PART, lambda: content_key(read_file(path, MAX_IMAGE_BYTES)), rehash)


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderPiece:
    """Some image files of a folder, to be looked through; a `Piece`."""

    root: Path
    paths: bytes
    """Relative to the root, a NUL between each and the next."""

    @property
    def name(self) -> str:
        paths = self._paths()
        return f"{paths[0]} to {paths[-1]}"

    def is_known(self, memo: DigestMemo) -> bool:
        return all(memo.remembered(path, _PART) for path in self._paths())

    def look(self, memo: DigestMemo) -> None:
        self.root.stat()
        for path in self._paths():
            with suppress(InputRejected, OSError):  # it is refused, with the reason, when the source is asked for it
                _key_of(path, memo)

    def _paths(self) -> list[str]:
        return [f"{self.root}/{os.fsdecode(path)}" for path in self.paths.split(b"\0")]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Texts:
    """The text files of a folder."""

    files: Mapping[str, Sequence[str]]
    """By what is before .txt or .caption, in one Unicode form: the one that counts comes first."""
    forms: Mapping[str, int]
    """How many Unicode forms of such a name images have: where several, each means its own."""

    def of(self, image: str) -> list[str]:
        """The text files of an image, the one that counts first."""
        found = []
        for base in (stem_of(image), image):
            texts = self.files.get(one_form(base), ())
            found += [text for text in texts if self.forms.get(one_form(base), 0) < 2 or text.startswith(base)]
        return found


def open_pictures(listing: FolderListing, request: Request) -> FolderSource:
    """Join the images of a folder with their captions; raises SourceError when no sample is left.

    An image has the captions of all rows of metadata that name it, in the order of the rows; where no row has any, it
    has those of its text file, one per line.
    """
    said, texts = read_metadata(listing, request), _find_texts(listing)
    samples: dict[str, tuple[str, ...]] = {}
    reasons = dict(said.refused)
    taken: set[str] = set()
    spare: set[str] = set()
    config, beside = request.config, dict[str, list[bytes]]()
    controls = ControlFiles.of(listing.images, config.controls, said.controls, said.captions)
    pictures = {*listing.images, *said.captions} - listing.left_out - controls.files
    for path in sorted(pictures):
        found = texts.of(path) if texts.files else []
        spare.update(found)
        wrong = said.wrong.get(path, {})
        try:
            if path in said.unfit:
                raise InputRejected("source", said.unfit[path])
            beside[path] = controls.of_picture(path)
            if captions := said.captions.get(path):
                samples[path] = tuple(captions)
                reasons |= wrong
            elif wrong:
                raise InputRejected("source", next(iter(wrong.values())))
            elif found:
                taken.add(found[0])
                samples[path] = caption_file(f"{listing.root}/{found[0]}")
            elif request.need_captions:
                raise InputRejected("source", _no_captions(path, said))
            else:
                samples[path] = ()
        except InputRejected as rejection:
            reasons[path] = rejection.reason
    _check_columns(listing, request, said, captioned=any(samples.values()))
    controls.check(listing.root, [beside[path] for path in samples], said.columns)
    reasons |= listing.refused
    spare -= taken
    companions, unread = _others(listing, samples, spare | taken | reasons.keys() | controls.files)
    reasons |= unread | controls.alone(pictures)
    if samples:
        reasons = dict(sorted(reasons.items()))
    refused = refusals(str(listing.root), samples, reasons, expected=_EXPECTED)
    chosen = sorted(samples.items())[: request.max_train_samples]
    described = _description(chosen, _origin(said, request, taken), companions | spare)
    kind = "imagefolder" if said.files else "folder"
    paths = [each for path, _ in chosen for each in (os.fsencode(path), *filter(None, beside[path]))]
    runs = [b"\0".join(paths[first : first + _RUN]) for first in range(0, len(paths), _RUN)]
    request.look_ahead([FolderPiece(root=listing.folder, paths=run) for run in runs])
    told = (
        (os.fsencode(path), captions, beside[path], *said.numbers(path, config.counts)) for path, captions in chosen
    )
    return FolderSource(
        description=f"{kind}: {described}",
        refused=refused,
        root=listing.folder,
        samples=Records.of(pa.schema([*_SAMPLES, *number_fields(config.counts)]), told),
        controls=config.controls,
        counted=config.counts,
    )


def _find_texts(listing: FolderListing) -> _Texts:
    texts: dict[str, list[str]] = {}
    found = sorted(filter(_is_text, listing.files - listing.left_out))
    for text in sorted(found, key=lambda text: not text.lower().endswith(_TEXT_SUFFIXES[0])):
        texts.setdefault(one_form(stem_of(text)), []).append(text)
    several = texts and not all(map(str.isascii, listing.images))
    forms = Counter(map(one_form, {stem_of(image) for image in listing.images})) if several else {}
    return _Texts(files=texts, forms=forms)


def _is_text(path: str) -> bool:
    return path.lower().endswith(_TEXT_SUFFIXES)


def _no_captions(path: str, said: Said) -> str:
    text = f"there is no {stem_of(path).rpartition('/')[2] + '.txt'!a} beside it"
    if path in said.captions:
        return f"no caption in its row of the metadata, and {text}"
    return f"no row of the metadata names it, and {text}" if said.files else f"no captions: {text}"


def _check_columns(listing: FolderListing, request: Request, said: Said, *, captioned: bool) -> None:
    """Raise SourceError for a column that was asked for, or is needed, and that no metadata has."""
    if request.config.image_column is not None and not said.files:
        names = listing.metadata
        found = "; ".join(f"{readable(name)} {said.refused.get(name, 'is of another split')}" for name in names[:3])
        raise SourceError(
            f"{listing.root} has no metadata with a column {request.config.image_column!r} (--image-column): {found}"
        )
    column, asked = request.caption_column, request.config.caption_column is not None
    if said.files and column not in said.columns and (asked or (request.need_captions and not captioned)):
        found = ", ".join(shown(name) for name in sorted(said.columns))
        raise SourceError(
            f"{listing.root}: the metadata has no column {column!r}; found {found}; "
            "name the one that holds the captions with --caption-column"
        )
    for name, column in request.config.counts.items():
        if column not in said.columns:
            found = ", ".join(shown(each) for each in sorted(said.columns))
            raise SourceError(
                f"{listing.root}: the metadata has no column {column!r}; found {found}; name the one that holds such "
                f"numbers with --{name}-column"
            )


def _others(
    listing: FolderListing, samples: Mapping[str, object], known: Collection[str]
) -> tuple[set[str], dict[str, str]]:
    """Of the files that are neither samples nor `known`: those beside a sample, and why the others are not read."""
    rest = listing.files - samples.keys() - set(known) - listing.left_out - set(listing.metadata)
    if not rest:
        return set(), {}
    stems = set(map(stem_of, samples))
    orphans = sorted(filter(_is_text, rest))
    companions = {path for path in rest if stem_of(path) in stems or path.rpartition(".")[0] in samples} - set(orphans)
    odd = {stem_of(path): path for path in sorted(rest - companions - set(orphans), reverse=True)}
    bare = {stem_of(path).casefold(): path for path in listing.images if path not in samples} if orphans else {}
    reasons = {}
    for text in orphans:
        reasons[text] = "a caption file without an image of its name"
        if (near := odd.get(stem_of(text))) is not None:
            found = plainly_at(listing.root / near)
            reasons[text] += f"; beside it is {near!a}, which is {found or 'not called like a picture'}"
        elif (image := bare.get(stem_of(text).casefold())) is not None:
            reasons[text] += f"; it differs in capitals from that of {image!a}: rename one of them"
    return companions, reasons | leftovers(listing, rest - companions - set(orphans), unlike_pictures)


def _description(samples: Sequence[tuple[str, Sequence[str]]], origin: str, beside: Collection[str]) -> str:
    images, captions = len(samples), sum(len(each) for _, each in samples)
    several = f"{captions:,} captions" if captions > images else "captions"
    told = f"{several} from {origin}" if captions else "no captions"
    kinds = sorted(Counter(map(kind_of, beside)).items(), key=lambda kind: (-kind[1], kind[0]))[:5]
    unread = ", ".join(f"{count:,} {kind or 'without a suffix'}" for kind, count in kinds)
    return f"{counted(images, 'image')}, {told}{f'; not read beside them: {unread}' * bool(beside)}"


def _origin(said: Said, request: Request, texts: Iterable[str]) -> str:
    """Where captions come from."""
    origins = []
    if any(said.captions.values()):
        where = readable(said.files[0]) if len(said.files) == 1 else f"{len(said.files)} metadata files"
        origins.append(f"{where} column {request.caption_column!r}")
    if kinds := sorted({text[text.rfind(".") :].lower() for text in texts}, reverse=True):
        origins.append(f"{' and '.join(kinds)} files, one per line")
    return " and from ".join(origins)
