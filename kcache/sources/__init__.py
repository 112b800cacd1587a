"""Where samples come from: folders of images, datasets of rows, and the Hugging Face Hub."""

import re
from pathlib import Path, PurePosixPath

from kcache.errors import SourceError
from kcache.sources.folder import METADATA_NAMES, FolderListing, list_folder, open_imagefolder, open_pairs
from kcache.sources.protocol import Refusal, Source
from kcache.sources.table import SAVED_DATASET_NAMES, TableRequest, open_hub_dataset, open_parquet, open_saved_dataset

__all__ = ["Refusal", "Source", "open_source"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_EXPECTED = (
    "a folder of images with metadata.jsonl or metadata.csv (columns file_name and text), a folder of x.jpg with "
    "x.txt, parquet files, a folder written by save_to_disk, or the id of a Hub dataset (owner/name)"
)


def open_source(
    spec: str,
    *,
    image_column: str = "image",
    caption_column: str = "text",
    max_train_samples: int | None = None,
    need_captions: bool = True,
    revision: str | None = None,
) -> Source:
    """Open images and captions, whatever they are stored as; `description` says what was found.

    No image is opened yet, so 100,000 samples take seconds. A sample that cannot be offered is in `refused`, with its
    name and a reason; hidden files and folders (names starting with a dot) do not belong to a source. Samples are in
    order of their paths, or of the dataset's rows, and `max_train_samples` takes the first ones. Unless
    `need_captions`, images without captions are offered with (). Raises SourceError when there is nothing to offer.
    """
    request = TableRequest(
        image_column=image_column,
        caption_column=caption_column,
        max_train_samples=max_train_samples,
        need_captions=need_captions,
    )
    path = Path(spec)
    try:
        if path.is_dir():
            if any((path / name).exists() for name in SAVED_DATASET_NAMES):
                return open_saved_dataset(path, request)
            return _open_folder(list_folder(path), request)
        if path.is_file():
            if path.suffix != ".parquet":
                raise SourceError(f"{spec!r} is a file, but no .parquet file; expected {_EXPECTED}; give its folder")
            return open_parquet(path.parent.resolve(), [path.name], {}, request)
    except OSError as error:
        raise SourceError(f"{spec!r} cannot be opened: {error}; expected {_EXPECTED}; correct the path") from error
    if _HUB_ID.fullmatch(spec):
        return open_hub_dataset(spec, revision, request)
    raise SourceError(f"there is no file or folder {spec!r}; expected {_EXPECTED}; correct the path")


def _open_folder(listing: FolderListing, request: TableRequest) -> Source:
    if any(PurePosixPath(path).name in METADATA_NAMES for path in listing.files):
        return open_imagefolder(listing, request.caption_column, request.max_train_samples, request.need_captions)
    parquet = sorted(path for path in listing.files if path.endswith(".parquet"))
    if parquet:
        refused = listing.refused | dict.fromkeys(listing.images, "an image beside parquet files, which it is not in")
        return open_parquet(listing.root, parquet, refused, request)
    if listing.images or listing.refused:
        return open_pairs(listing, request.max_train_samples, request.need_captions)
    raise SourceError(f"{listing.root} holds no images among its {len(listing.files):,} files; expected {_EXPECTED}")
