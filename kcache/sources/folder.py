"""Folders of image files, with captions in metadata files (imagefolder) or in a text file beside each image."""

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from kcache.errors import InputRejected, SourceError
from kcache.sources.protocol import Request, refusals
from kcache.sources.reading import MAX_IMAGE_BYTES, caption_file, caption_tuple, locate, read_file, readable
from kcache.store.digests import DigestMemo, content_key
from kcache.store.samples import Refusal

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
_EXPECTED = (
    'images with a row each in metadata.jsonl, e.g. {"file_name": "a.jpg", "text": "a cat"}, or with a text file each, '
    "a.txt beside a.jpg"
)
# fmt: off
IMAGE_SUFFIXES = frozenset({
    "apng", "avif", "bmp", "gif", "heic", "heif", "jfif", "jp2", "jpe", "jpeg", "jpg", "jxl", "pbm", "pgm", "png",
    "pnm", "ppm", "tga", "tif", "tiff", "webp",
})
# fmt: on
"""What a file must be called to be taken for an image when no metadata names it; the decoder has the last word."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderListing:
    """What a folder holds, hidden names (starting with a dot) left out; paths are relative to `root`, with slashes."""

    root: Path
    """The folder's real, absolute path."""
    files: set[str] = field(default_factory=set)
    """Regular files, and links to regular files inside the root."""
    refused: dict[str, str] = field(default_factory=dict)
    """Everything else, by path, and why it is not read."""
    left_out: frozenset[str] = frozenset()
    """Files of another split than the one that is read: not refused, but not read either."""

    @property
    def images(self) -> list[str]:
        """Files that are called like images, sorted."""
        return sorted(path for path in self.files if is_image_name(path))


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderSource:
    """Image files in a folder, sorted by path; a `Source`."""

    description: str
    refused: tuple[Refusal, ...]
    root: Path
    """The folder's real, absolute path."""
    samples: Sequence[tuple[str, tuple[str, ...]]]
    """Path relative to the root, and captions."""

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, i: int) -> str:
        return readable(self.samples[i][0])

    def captions(self, i: int) -> tuple[str, ...]:
        return self.samples[i][1]

    def image(self, i: int) -> bytes:
        return read_file(self.root / self.samples[i][0], MAX_IMAGE_BYTES)

    def image_key(self, i: int, memo: DigestMemo, rehash: bool) -> bytes:
        path = self.root / self.samples[i][0]
        try:
            return memo.digest(path, "content_key", lambda: content_key(self.image(i)), rehash)
        except OSError as error:
            raise InputRejected("source", f"cannot be read: {error.strerror}") from error


def is_image_name(path: str) -> bool:
    """Whether a file is called like an image."""
    return path.rpartition(".")[2].lower() in IMAGE_SUFFIXES


def list_folder(folder: Path) -> FolderListing:
    """List a folder and all folders in it, without opening any file; raises SourceError when it cannot be listed."""
    listing = FolderListing(root=folder.resolve())
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        try:
            with os.scandir(listing.root / prefix) as entries:
                for entry in entries:
                    if not entry.name.startswith("."):
                        _list_entry(entry, prefix + entry.name, listing, waiting)
        except OSError as error:
            if not prefix:
                raise SourceError(f"{folder} cannot be listed: {error.strerror}; expected a readable folder") from error
            listing.refused[prefix.rstrip("/")] = f"folder cannot be listed: {error.strerror}"
    return listing


def _list_entry(entry: os.DirEntry[str], path: str, listing: FolderListing, waiting: list[str]) -> None:
    if entry.is_symlink():
        try:
            locate(path, listing.root, [listing.root])
            listing.files.add(path)
        except InputRejected as rejection:
            listing.refused[path] = rejection.reason
    elif entry.is_file():
        listing.files.add(path)
    elif entry.is_dir():
        waiting.append(path + "/")
        if is_image_name(path):
            listing.refused[path] = "a folder, not a file"
    else:
        listing.refused[path] = "not a regular file"


def open_imagefolder(listing: FolderListing, request: Request) -> FolderSource:
    """Join the images of a folder with the rows of its metadata files; raises SourceError when no sample is left."""
    metadata = sorted(path for path in listing.files if path.rpartition("/")[2] in METADATA_NAMES)
    samples: dict[str, tuple[str, ...]] = {}
    refused = dict(listing.refused)
    columns: set[str] = set()
    named: set[str] = set()
    caption_column, need_captions = request.caption_column, request.need_captions
    for metadata_path in metadata:
        folder = metadata_path[: metadata_path.rfind("/") + 1]
        for line, value in _read_rows(listing.root / metadata_path):
            name = f"{metadata_path} line {line}"
            try:
                row = _row(value)
                columns.update(row)
                path = _image_path(row, folder, listing)
                if path in listing.left_out:
                    continue
                if path in named:
                    raise InputRejected(
                        "source", f"a second row for {path!a}; put all its captions into one row, as a list"
                    )
                named.add(path)
                name = path
                samples[path] = caption_tuple(row.get(caption_column), needed=need_captions)
            except InputRejected as rejection:
                refused[name] = rejection.reason
    if (need_captions or request.config.caption_column) and columns and caption_column not in columns:
        found = readable(", ".join(sorted(columns)))
        raise SourceError(
            f"{listing.root}: the metadata has no column {caption_column!r}; found {found}; "
            "name the one that holds the captions with --caption-column"
        )
    for path in listing.images:
        if path not in named and need_captions:
            refused[path] = "no row of the metadata names it"
        elif path not in named:
            samples[path] = ()
    where = readable(metadata[0]) if len(metadata) == 1 else f"{len(metadata)} metadata files"
    origin = f"captions from {where} column {caption_column!r}"
    return _folder_source("imagefolder", origin, listing.root, samples, refused, request)


def open_pairs(listing: FolderListing, request: Request) -> FolderSource:
    """Join each image x.jpg with its captions in x.txt; raises SourceError when no sample is left."""
    samples: dict[str, tuple[str, ...]] = {}
    refused = dict(listing.refused)
    orphans = {path for path in listing.files if path.endswith(".txt")}
    for path in listing.images:
        text = path.rpartition(".")[0] + ".txt"
        orphans.discard(text)
        try:
            if text in listing.files:
                samples[path] = caption_file(listing.root / text)
            elif request.need_captions:
                raise InputRejected("source", f"no captions: there is no {PurePosixPath(text).name!a} beside it")
            else:
                samples[path] = ()
        except InputRejected as rejection:
            refused[path] = rejection.reason
    refused |= dict.fromkeys(orphans, "a caption file without an image of its name")
    origin = "captions from .txt files" if any(samples.values()) else "no captions"
    return _folder_source("folder", origin, listing.root, samples, refused, request)


def _folder_source(
    kind: str,
    origin: str,
    root: Path,
    samples: dict[str, tuple[str, ...]],
    reasons: dict[str, str],
    request: Request,
) -> FolderSource:
    refused = refusals(str(root), samples, dict(sorted(reasons.items())), expected=_EXPECTED)
    chosen = sorted(samples.items())[: request.max_train_samples]
    description = f"{kind}: {len(chosen):,} image{'s' if len(chosen) != 1 else ''}, {origin}"
    return FolderSource(description=description, refused=refused, root=root, samples=chosen)


def _read_rows(path: Path) -> Iterator[tuple[int, object]]:
    # surrogateescape: a byte that is not UTF-8 costs the caption it stands in, not the whole file.
    try:
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}; expected a readable metadata file") from error
    return _csv_rows(path, text) if path.suffix == ".csv" else _jsonl_rows(text)


def _jsonl_rows(text: str) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, object]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = reader.fieldnames or []
        if "file_name" not in columns:
            found = readable(", ".join(columns)) or "nothing"
            raise SourceError(f"{path} has no column 'file_name'; found {found}; add it")
        for row in reader:
            # DictReader's marks for a row with too many and with too few cells.
            whole = None not in row and None not in row.values()
            yield reader.line_num, row if whole else None
    except csv.Error as error:
        raise SourceError(
            f"{path} line {reader.line_num} is not CSV: {error}; correct it, or use JSON lines"
        ) from error


def _row(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise InputRejected(
            "source", "not a row: expected a JSON object on one line, or as many CSV cells as columns (quote commas)"
        )
    return value


def _image_path(row: dict[str, object], folder: str, listing: FolderListing) -> str:
    name = row.get("file_name")
    if not isinstance(name, str):
        raise InputRejected("source", f"file_name is {ascii(name)[:60]}; expected a path relative to the metadata file")
    # Listed paths hold no "..", so a hit is inside the root; a look at the disk is only for the rest.
    if folder + name in listing.files:
        return folder + name
    try:
        located = locate(name, listing.root / folder, [listing.root])
    except InputRejected as rejection:
        raise InputRejected("source", f"file_name {name!a}: {rejection.reason}") from None
    return located.relative_to(listing.root).as_posix()
