"""What a folder holds: its files, links as far as they may be followed, and what is left out of it, by name."""

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote

from kcache.config import AS_FOUND, SourceConfig
from kcache.errors import InputRejected, SourceError
from kcache.hints import near_names, own_output
from kcache.places import Place
from kcache.places.bucket import BucketPath
from kcache.plainly import plainly_at
from kcache.sources.reading import follow, locate
from kcache.sources.splits import name_pattern

# fmt: off
IMAGE_SUFFIXES = frozenset({
    "apng", "avif", "avifs", "bmp", "dib", "gif", "heic", "heif", "j2c", "j2k", "jfif", "jp2", "jpc", "jpe", "jpeg",
    "jpeg_large", "jpf", "jpg", "jpg_large", "jpg_orig", "jpx", "jxl", "mpo", "pbm", "pgm", "png", "png_large", "pnm",
    "ppm", "tga", "tif", "tiff", "webp",
})
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.tsv", "metadata.json", "metadata.parquet")
"""Names of metadata files, in small letters."""
_NO_DATA = frozenset({
    "dataset_info.json", "dataset_infos.json", "desktop.ini", "icon\r", "license", "licence", "makefile", "notice",
    "readme", "thumbs.db",
})
# fmt: on
"""Files, by name without .md or .txt in small letters, that are about a folder or made by a system."""
_UNFINISHED = frozenset({".aria2", ".crdownload", ".download", ".part", ".partial", ".tmp"})
_TABULAR = frozenset({".csv", ".json", ".jsonl", ".ndjson", ".tsv", ".xls", ".xlsx", ".xml", ".yaml", ".yml"})
_MOST_KINDS = 20
"""Kinds of files that are named; what is of none of them comes in one line."""


@dataclass(frozen=True, kw_only=True)
class FolderListing:
    """What a folder holds, hidden names (starting with a dot) left out; paths are relative to `root`, with slashes."""

    root: Place
    """The folder's real, absolute path, or what the names begin with in a bucket."""
    links: Sequence[Path] = ()
    """Real, absolute folders in which what a link in the root leads to may lie, besides."""
    files: set[str] = field(default_factory=set)
    """Regular files, and links to regular files in the root or in `links`."""
    refused: dict[str, str] = field(default_factory=dict)
    """Everything else, by path, and why it is not read."""
    own: dict[str, str] = field(default_factory=dict)
    """Folders that kcache itself made, and what they are: no input, and so not refused either."""
    left_out: frozenset[str] = frozenset()
    """Files of another split than the one that is read: not refused, but not read either."""

    @property
    def folder(self) -> Path:
        """The same, of what is on this machine, as all is that takes more than names; raises SourceError."""
        if not isinstance(self.root, Path):
            raise SourceError(f"{self.root} is in a bucket; expected tars or parquet files there; copy it here first")
        return self.root

    @cached_property
    def images(self) -> list[str]:
        """Files that are called like images, sorted."""
        return sorted(path for path in self.files if is_image_name(path))

    @cached_property
    def metadata(self) -> list[str]:
        """Files that are called like metadata, sorted."""
        likely = (path for path in self.files if path.lower().endswith(METADATA_NAMES))
        return sorted(path for path in likely if path.rpartition("/")[2].lower() in METADATA_NAMES)

    def find(self, name: str, folder: str) -> str:
        """The path of the file that `name` means, which stands in data in `folder` ("", or ending in a slash).

        A name as another system writes it means the file whose name differs in \\ for / or in the Unicode form of its
        accents, if there is only one. Raises InputRejected as `reading.locate` does.
        """
        # Listed paths hold no "..", so a hit is inside the root; a look at the disk is only for the rest.
        if folder + name in self.files:
            return folder + name
        try:
            return self._locate(name, folder)
        except InputRejected as rejection:
            slashed = name.replace("\\", "/")
            near = self._alike(folder + slashed)
            same = [path for path in near if one_form(path) == one_form(folder + slashed)]
            if len(same) == 1:
                return same[0]
            if slashed != name and not same:
                return self.find(slashed, folder)
            near = near or self._by_loose_stem.get(_loose_stem(unquote(slashed).strip()), [])
            inside = [path.removeprefix(folder) for path in near if path.startswith(folder)]
            hint = f"; did you mean {inside[0]!a}?" if inside else ""
            reason = rejection.reason
            if re.match(r"[A-Za-z]:/", name):
                reason = f"{name!a} is a path on another machine; use one relative to the metadata file"
            raise InputRejected("source", reason + hint) from None

    def _locate(self, name: str, folder: str) -> str:
        return locate(name, self.folder / folder, [self.folder], self.links).relative_to(self.folder).as_posix()

    def _alike(self, path: str) -> list[str]:
        return self._by_loose_name.get(_loosely(path), [])

    @cached_property
    def _by_loose_name(self) -> dict[str, list[str]]:
        """Files by what people would call the same name."""
        names: dict[str, list[str]] = {}
        for file in sorted(self.files | self.left_out):
            names.setdefault(_loosely(file), []).append(file)
        return names

    @cached_property
    def _by_loose_stem(self) -> dict[str, list[str]]:
        """Images by what people would call the same name without its folder and its suffix, to be hinted at."""
        stems: dict[str, list[str]] = {}
        for image in self.images:
            stems.setdefault(_loose_stem(image), []).append(image)
        return stems


def _loose_stem(path: str) -> str:
    name = _loosely(path).rpartition("/")[2]
    return name.rpartition(".")[0] or name


def is_image_name(path: str) -> bool:
    """Whether a file is called like an image."""
    return path.rpartition(".")[2].lower() in IMAGE_SUFFIXES


def one_form(name: str) -> str:
    """A name in one Unicode form: macOS writes é as two characters, other systems as one."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _loosely(path: str) -> str:
    return one_form(path).casefold()


def list_folder(folder: Path, config: SourceConfig = AS_FOUND) -> FolderListing:
    """List a folder and all folders in it, without opening any file; raises SourceError when it cannot be listed.

    Folders that links lead to come after all others, and none is read twice; what kcache itself made is left out.
    """
    root = folder.resolve()
    listing = FolderListing(root=root, links=link_roots(root, config))
    waiting, linked = [("", root)], list[tuple[str, Path]]()
    seen: dict[Path, str] = {}
    while waiting or linked:
        prefix, real = waiting.pop() if waiting else linked.pop(linked.index(min(linked)))
        path = prefix.rstrip("/")
        # By real paths, not by inodes: some network file systems give the same one to all.
        if (first := seen.setdefault(real, prefix)) != prefix:
            listing.refused[path] = _again(path, first)
            continue
        try:
            with os.scandir(root / prefix) as scanned:
                entries = [entry for entry in scanned if not entry.name.startswith(".")]
            if prefix and (own := own_output(root / prefix, {entry.name for entry in entries})):
                listing.own[path] = own
                continue
            for entry in entries:
                _list_entry(entry, prefix + entry.name, real, listing, waiting, linked)
        except OSError as error:
            if not prefix:
                raise SourceError(f"{folder} cannot be listed: {error.strerror}; expected a readable folder") from error
            listing.refused[path] = f"folder cannot be listed: {error.strerror}"
    return listing


def list_bucket(root: BucketPath, pattern: str = "") -> FolderListing:
    """List what is below `root`, or what of that `pattern` matches; raises StoreError."""
    listing, matches = FolderListing(root=root), name_pattern(pattern or "**")
    for path, _ in root.below():
        name = path.key.removeprefix(root.key).lstrip("/")
        is_hidden = any(part.startswith(".") for part in name.split("/"))
        if name and not name.endswith("/") and not is_hidden and matches.fullmatch(name):
            listing.files.add(name)
    return listing


def link_roots(root: Path, config: SourceConfig) -> tuple[Path, ...]:
    """Where links in the real folder `root` may lead besides: what `config` names, and the store of its own repository.

    Such a store is where the Hub's client, git-annex and DVC keep the content of files that they link to. Raises
    SourceError where `config` names no folder.
    """
    found = []
    for folder in (root, *root.parents):
        if folder.parent.name == "snapshots" and re.fullmatch("(datasets|models|spaces)--.+", folder.parents[1].name):
            found.append(folder.parents[1] / "blobs")
        found += [folder / ".git/annex/objects", folder / ".dvc/cache"]
    if config.follow_links is not None:
        place = Path(config.follow_links)
        if not place.is_dir():
            near = near_names(place)
            found_there = "that is a file" if place.is_file() else "nothing is there"
            found_there += f" (did you mean {near}?)" if near and not place.exists() else ""
            raise SourceError(
                f"--follow-links {config.follow_links!a}: {found_there}; expected the folder into which links of the "
                "source may lead"
            )
        found.append(place)
    return tuple(folder.resolve() for folder in found if folder.is_dir())


def _again(path: str, first: str) -> str:
    if f"{path}/".startswith(first):
        return f"a link to a folder that it lies in, {first.rstrip('/') or 'the source itself'!a}: a loop"
    return f"a link to a folder that is read already, as {first.rstrip('/')!a}"


def _list_entry(
    entry: os.DirEntry[str],
    path: str,
    folder: Path,
    listing: FolderListing,
    waiting: list[tuple[str, Path]],
    linked: list[tuple[str, Path]],
) -> None:
    """Note an entry of the real `folder`, `path` from the root of the listing."""
    if entry.is_symlink():
        try:
            _list_link(path, follow(listing.folder / path, [listing.folder, *listing.links]), listing, linked)
        except InputRejected as rejection:
            listing.refused[path] = rejection.reason
    elif entry.is_file():
        listing.files.add(path)
    elif entry.is_dir():
        waiting.append((path + "/", folder / entry.name))
        if is_image_name(path):
            listing.refused[path] = "a folder, not a file"
    else:
        listing.refused[path] = "not a regular file"


def _list_link(path: str, real: Path, listing: FolderListing, linked: list[tuple[str, Path]]) -> None:
    if real.is_file():
        listing.files.add(path)
    elif not real.is_dir():
        listing.refused[path] = "not a regular file"
    elif (inside := _read_as(real, listing)) is not None:
        listing.refused[path] = f"a link to the folder {inside!a} of the source, which is read where it is"
    else:
        linked.append((path + "/", real))


def _read_as(folder: Path, listing: FolderListing) -> str | None:
    """Where in the source a real folder is read without any link; None for one outside, and for a hidden one."""
    if not folder.is_relative_to(listing.folder) or any(folder.is_relative_to(place) for place in listing.links):
        return None
    inside = folder.relative_to(listing.folder)
    return None if any(part.startswith(".") for part in inside.parts) else inside.as_posix()


def leftovers(
    listing: FolderListing, paths: Iterable[str], why: Callable[[str], str] | str, *, every: bool = False
) -> dict[str, str]:
    """Why files are not read: a line for each kind, or for its only file, by their names.

    Files about the folder (README.md and the like) need no line, unless `every` one is to have it.
    """
    kinds: dict[str, list[str]] = {}
    for path in sorted(paths):
        if every or not _is_no_data(path):
            kind = kind_of(path)
            kinds.setdefault(kind if kind in kinds or len(kinds) < _MOST_KINDS else "…", []).append(path)
    reasons = {}
    for kind, found in kinds.items():
        reason = why if isinstance(why, str) else why(kind)
        words = plainly_at(listing.root / found[0])
        if words is not None:
            reason += f"; {'it' if len(found) == 1 else 'the first'} is {words}"
        if why is unlike_pictures and kind not in _UNFINISHED:
            reason += _instead(kind, words)
        if len(found) == 1:
            reasons[found[0]] = reason
        else:
            name = {"": "files without a suffix", "…": "files of further kinds"}.get(kind, f"*{kind}")
            reasons[name] = f"{len(found):,} files such as {found[0]!a}: {reason}"
    return reasons


def unlike_pictures(kind: str) -> str:
    """Why files of a kind, which is their suffix, are not taken for pictures."""
    if kind in _UNFINISHED:
        return "an unfinished download by its name; fetch it again, or rename it if it is whole"
    return "not called like a picture, and no metadata names it"


def _instead(kind: str, words: str | None) -> str:
    """What to do with a file that is not called like a picture, by what it plainly is."""
    if kind == ".arrow":
        return "; rows are read from parquet files and from folders that save_to_disk wrote"
    if kind in _TABULAR:
        return "; captions are read from metadata.jsonl or .csv (columns file_name and text), and from text files"
    return "; rename it if it is a picture, e.g. to .jpg" if words is None or "picture" in words else ""


def _is_no_data(path: str) -> bool:
    name = path.rpartition("/")[2].lower()
    return name in _NO_DATA or name.endswith(".md") or name.removesuffix(".txt") in _NO_DATA


def kind_of(path: str) -> str:
    """The suffix of a file in small letters, with its dot; "" for none."""
    stem, dot, suffix = path.rpartition("/")[2].lower().rpartition(".")
    return dot + suffix if stem and re.fullmatch(r"(?=.*[a-z])[a-z0-9_-]{1,12}", suffix) else ""
