"""Where samples come from: folders of images, datasets of rows, webdataset tars, and the Hugging Face Hub.

- `protocol`: what a source is, and what it is asked for
- `listing`: what a folder holds, and where links in it may lead
- `folder`, `table`, `tars`: the three kinds
- `metadata`, `arrow_files`, `tar_members`, `reading`: the files they are kept in, read warily
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from kcache.config import AS_FOUND, SourceConfig
from kcache.errors import SourceError
from kcache.hints import instead_of_source
from kcache.sources.folder import open_pictures
from kcache.sources.listing import FolderListing, leftovers, list_folder
from kcache.sources.metadata import metadata_files
from kcache.sources.protocol import Request, Source
from kcache.sources.reading import readable
from kcache.sources.table import SAVED_DATASET_NAMES, open_hub_dataset, open_parquet, open_saved_dataset
from kcache.sources.tars import expand_braces, is_tar_name, open_tars
from kcache.store.samples import Refusal

__all__ = ["Refusal", "Source", "open_source"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_EXPECTED = (
    "a folder of images with metadata.jsonl or metadata.csv (columns file_name and text), a folder of x.jpg with "
    "x.txt, webdataset tars (a folder of them, or {00000..00099}.tar), parquet files, a folder written by "
    "save_to_disk, or the id of a Hub dataset (owner/name)"
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


def open_source(
    spec: str,
    config: SourceConfig = AS_FOUND,
    *,
    max_train_samples: int | None = None,
    need_captions: bool = True,
) -> Source:
    """Open images and captions, whatever they are stored as; `description` says what was found.

    No image is opened yet, so 100,000 samples take seconds. A sample that cannot be offered is in `refused`, with its
    name and a reason; hidden files and folders (names starting with a dot) do not belong to a source. Samples are in
    order of their paths, or of the dataset's rows, and `max_train_samples` takes the first ones. Unless
    `need_captions`, images without captions are offered with (). Raises SourceError when there is nothing to offer.
    """
    request = Request(config=config, max_train_samples=max_train_samples, need_captions=need_captions)
    path = Path(spec)
    try:
        if not _URL.match(spec) and "{" not in spec and (instead := instead_of_source(path)) is not None:
            raise SourceError(instead)
        if config.follow_links is not None and not _may_hold_links(path):
            raise SourceError(
                f"--follow-links {config.follow_links!a} was given, but {spec!a} is no folder, so no links are in it; "
                "leave it out"
            )
        if path.is_dir():
            if any((path / name).exists() for name in SAVED_DATASET_NAMES):
                return open_saved_dataset(path, request)
            return _open_folder(list_folder(path, config), request)
        if path.is_file():
            return _open_file(path, request)
        if "{" in spec and not _URL.match(spec):
            return open_tars(expand_braces(spec), {}, request)
    except OSError as error:
        raise SourceError(f"{spec!r} cannot be opened: {error}; expected {_EXPECTED}; correct the path") from error
    if _URL.match(spec):
        raise SourceError(
            f"{spec!a} is a URL or a command; expected {_EXPECTED}; download what it gives and name the folder"
        )
    if _HUB_ID.fullmatch(spec):
        return open_hub_dataset(spec, request)
    raise SourceError(f"there is no file or folder {spec!r}; expected {_EXPECTED}; correct the path")


def _may_hold_links(path: Path) -> bool:
    """Whether reading a source meets links: those in a folder, or to pictures that rows give the path of."""
    return path.is_dir() or path.suffix.lower() == ".parquet"


def _open_file(path: Path, request: Request) -> Source:
    if is_tar_name(path.name):
        return open_tars([(path.name, path)], {}, request)
    if path.suffix != ".parquet":
        raise SourceError(f"{path} is a file, but no .parquet file and no .tar; expected {_EXPECTED}; give its folder")
    return open_parquet(path.parent.resolve(), [path.name], {}, request)


def _open_folder(listing: FolderListing, request: Request) -> Source:
    """Open a folder as what it offers most captioned samples as, of equals as pictures; what else is in it is named."""
    kinds = _kinds(listing)
    if not kinds:
        found = f"no images among its {len(listing.files):,} files{_why(listing)}"
        raise SourceError(f"{listing.root} holds {found}; expected {_EXPECTED}")
    kind = next(iter(kinds)) if len(kinds) == 1 else _most(listing, request, kinds)
    return _open_as(kind, kinds, listing, request)


def _kinds(listing: FolderListing) -> dict[str, Sequence[str]]:
    """What a folder may be read as, and the files of each."""
    metadata = metadata_files(listing)
    tars = sorted(path for path in listing.files if is_tar_name(path))
    # img2dataset writes 00000.parquet, which holds no pictures, beside 00000.tar.
    described = {path.rpartition(".")[0] + ".parquet" for path in tars} | set(metadata if listing.images else ())
    parquet = sorted(path for path in listing.files - described if path.lower().endswith(".parquet"))
    pictures = [*listing.images, *metadata]
    kinds = {"pictures": pictures, "tars": tars, "parquet files": parquet}
    return {kind: files for kind, files in kinds.items() if files}


def _most(listing: FolderListing, request: Request, kinds: Mapping[str, Sequence[str]]) -> str:
    """The kind with most samples; raises the SourceError of one that offers none where none does."""
    counts, errors = {}, {}
    for kind in kinds:
        try:
            source = _open_as(kind, kinds, listing, replace(request, max_train_samples=None))
            counts[kind] = sum(bool(source.captions(i)) for i in range(len(source)))
        except SourceError as error:
            errors[kind] = error
    if not counts:
        has_metadata = bool(metadata_files(listing))
        raise next(iter(errors.values())) if has_metadata else next(reversed(errors.values()))
    # Pictures without captions do not make a folder of tars a folder of pictures, even where captions are not needed.
    return max(counts, key=lambda kind: (counts[kind], kind != "pictures" and not counts[kind]))


def _open_as(kind: str, kinds: Mapping[str, Sequence[str]], listing: FolderListing, request: Request) -> Source:
    own = kinds[kind]
    others = {path for files in kinds.values() for path in files} - set(own)
    if kind != "pictures":
        stems = {_stem(path) for path in own}
        others |= {path for path in listing.files if _stem(path) not in stems}
    refused = listing.refused | leftovers(listing, others, f"the folder is read as {kind}; give it by itself")
    listing = replace(listing, files=listing.files - others, refused=refused)
    if kind == "tars":
        return open_tars([(path, listing.root / path) for path in own], refused, request)
    if kind == "parquet files":
        return open_parquet(listing.root, own, refused, request)
    return open_pictures(listing, request)


def _stem(path: str) -> str:
    """A file's path up to what says its kind: that of 00000.tar and of 00000_stats.json, which goes with it."""
    return re.sub(r"(_stats)?\.[^/]*$", "", path)


def _why(listing: FolderListing) -> str:
    found = "; ".join(f"{readable(path)}: {reason}" for path, reason in list(listing.refused.items())[:3])
    return f" ({found})" if found else ""
