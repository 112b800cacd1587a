"""Where samples come from: folders of images, datasets of rows, webdataset tars, and the Hugging Face Hub.

- `protocol`: what a source is, and what it is asked for
- `folder`, `table`, `tars`: the three kinds
- `arrow_files`, `tar_members`, `reading`: the files they are kept in, read warily
"""

import re
from pathlib import Path

from kcache.config import AS_FOUND, SourceConfig
from kcache.errors import SourceError
from kcache.hints import instead_of_source
from kcache.sources.folder import METADATA_NAMES, FolderListing, list_folder, open_imagefolder, open_pairs
from kcache.sources.protocol import Request, Source
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
        if path.is_dir():
            if any((path / name).exists() for name in SAVED_DATASET_NAMES):
                return open_saved_dataset(path, request)
            return _open_folder(list_folder(path), request)
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


def _open_file(path: Path, request: Request) -> Source:
    if is_tar_name(path.name):
        return open_tars([(path.name, path)], {}, request)
    if path.suffix != ".parquet":
        raise SourceError(f"{path} is a file, but no .parquet file and no .tar; expected {_EXPECTED}; give its folder")
    return open_parquet(path.parent.resolve(), [path.name], {}, request)


def _open_folder(listing: FolderListing, request: Request) -> Source:
    if any(path.rpartition("/")[2] in METADATA_NAMES for path in listing.files):
        return open_imagefolder(listing, request)
    tars = sorted(path for path in listing.files if is_tar_name(path))
    if tars:
        refused = listing.refused | dict.fromkeys(listing.images, "an image beside tars, which it is not in")
        return open_tars([(path, listing.root / path) for path in tars], refused, request)
    parquet = sorted(path for path in listing.files if path.endswith(".parquet"))
    if parquet:
        refused = listing.refused | dict.fromkeys(listing.images, "an image beside parquet files, which it is not in")
        return open_parquet(listing.root, parquet, refused, request)
    if listing.images or listing.refused:
        return open_pairs(listing, request)
    raise SourceError(f"{listing.root} holds no images among its {len(listing.files):,} files; expected {_EXPECTED}")
