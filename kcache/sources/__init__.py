"""Where samples come from: folders of images, datasets of rows, webdataset tars, and the Hugging Face Hub.

- `protocol`: what a source is, and what it is asked for
- `splits`, `listing`: which of its files are meant, and where links in it may lead
- `folder`, `table`, `hub`, `tars` (by `in_tars`): the kinds; `further`: what goes with pictures and captions
- `metadata`, `arrow_files`, `archives`, `reading`: the files they are kept in, read warily
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

from kcache.config import AS_FOUND, SourceConfig
from kcache.disk.memo import DigestMemo
from kcache.disk.pieces import Ahead, nobody
from kcache.errors import InputRejected, SourceError
from kcache.hints import instead_of_source
from kcache.places import Place
from kcache.places.bucket import BucketPath
from kcache.plainly import plainly_at
from kcache.sources.folder import FolderSource, open_pictures
from kcache.sources.further.asked import COLUMNS, CONTROLS, refuse_unused
from kcache.sources.hub import is_saved_dataset, open_hub_dataset, open_saved_dataset
from kcache.sources.in_tars.braces import expand_braces
from kcache.sources.listing import FolderListing, is_image_name, leftovers, list_bucket, list_folder, unlike_pictures
from kcache.sources.protocol import Request, Source
from kcache.sources.reading import MAX_TEXT_BYTES, read_file, readable
from kcache.sources.splits import (
    COUNTED_FILES,
    Splits,
    chosen_split,
    declared_rule,
    find_splits,
    no_splits,
    split_note,
    splits_of_pictures,
)
from kcache.sources.table import TableSource, count_rows, open_parquet
from kcache.sources.tars import TarSource, is_tar_name, open_tars
from kcache.store.manifest import MANIFEST
from kcache.store.samples import Refusal
from kcache.tally import counted
from kcache.urls import remote, store_url, without_scheme

__all__ = ["Refusal", "Source", "open_source"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_EXPECTED = (
    "a folder of images with metadata.jsonl or metadata.csv (columns file_name and text), a folder of x.jpg with "
    "x.txt, webdataset tars (a folder of them, or {00000..00099}.tar), parquet files, a folder written by "
    "save_to_disk, the id of a Hub dataset (owner/name), or tars or parquet files of a bucket (s3://…)"
)
_COMMAND = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_LIKE_AN_ID = re.compile(r"(?:datasets/)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)[:@/]?[\w./-]*")
Listed = FolderSource | TableSource | TarSource


def open_source(
    spec: str,
    config: SourceConfig = AS_FOUND,
    *,
    max_train_samples: int | None = None,
    need_captions: bool = True,
    memo: DigestMemo | None = None,
    ahead: Ahead = nobody,
    rehash: bool = False,
) -> Source:
    """Open images and captions, whatever they are stored as; `description` says what was found.

    No image is opened yet, so 100,000 samples take seconds. A sample that cannot be offered is in `refused`, with its
    name and a reason; hidden files and folders (names starting with a dot) do not belong to a source. Samples are in
    order of their paths, or of the dataset's rows, and `max_train_samples` takes the first ones. Unless
    `need_captions`, images without captions are offered with (). `ahead` is told of pieces that others may look
    through, for `memo`, which is not trusted with `rehash`. Raises SourceError when there is nothing to offer.
    """
    most, spec = max_train_samples, without_scheme(spec)
    request = Request(
        config=config, max_train_samples=most, need_captions=need_captions, memo=memo, ahead=ahead, rehash=rehash
    )
    if store_url(spec) is not None:
        return _open_in_bucket(spec, request)
    _refuse_empty(spec, config)
    path, braces = Path(spec), "{" in spec and not _COMMAND.match(spec)
    try:
        if not _COMMAND.match(spec) and not braces and (instead := instead_of_source(path)) is not None:
            raise SourceError(instead)
        if path.is_dir():
            if is_saved_dataset(path):
                refuse_unused(config, f"{path}, which save_to_disk wrote", *COLUMNS, "split", "follow_links")
                return _noted(*open_saved_dataset(path, request))
            return _open_folder(list_folder(path, config), request)
        if path.is_file():
            return _open_file(path, request)
        if braces:
            refuse_unused(config, f"{spec}, tars that are named one by one", *COLUMNS)
            return open_tars(expand_braces(spec), {}, request)
    except OSError as error:
        raise SourceError(f"{spec!r} cannot be opened: {error}; expected {_EXPECTED}; correct the path") from error
    if _HUB_ID.fullmatch(spec) and not path.exists() and remote(spec) is None:
        refuse_unused(config, f"the Hub dataset {spec}", *COLUMNS, "split")
        return _noted(*open_hub_dataset(spec, request))
    raise SourceError(_no_source(spec, path))


def _open_in_bucket(spec: str, request: Request) -> Source:
    """Open tars or parquet files of a bucket: one, those that braces or a pattern stand for, or all below a prefix."""
    place, pattern = BucketPath.of(spec), re.search(r"[^/]*[*?\[].*", spec)
    if "{" in spec:
        refuse_unused(request.config, f"{spec}, tars that are named one by one", *COLUMNS)
        return open_tars(expand_braces(spec), {}, request)
    is_file = pattern is None and (is_tar_name(place.name) or place.suffix.lower() == ".parquet") and place.is_file()
    if not is_file and pattern is None:
        listing = list_bucket(place)
        if MANIFEST in listing.files and any(path.startswith("index-") for path in listing.files):
            raise SourceError(
                f"{place} is a cache: its pictures are encoded already; train from it, or give their source"
            )
        return _open_folder(listing, request)
    root = place.parent if pattern is None else BucketPath.of(spec[: pattern.start()])
    names = [place.name] if pattern is None else sorted(list_bucket(root, pattern[0]).files)
    refuse_unused(request.config, f"{spec}, files that are named themselves", *COLUMNS)
    if all(map(is_tar_name, names)) and names:
        return open_tars([(name, root / name) for name in names], {}, request)
    if all(name.lower().endswith(".parquet") for name in names) and names:
        return open_parquet(root, names, {}, request)
    raise SourceError(
        f"{spec!a} stands for {counted(len(names), 'file')}; expected tars, or parquet files, and no others"
    )


def _refuse_empty(spec: str, config: SourceConfig) -> None:
    """Raise SourceError for a path or a setting of no letters, as variables of a shell leave it that are not set."""
    if not spec.strip():  # which as a path would be the working directory
        raise SourceError(f"the source is {spec!a}, no path; expected {_EXPECTED}; if it is a variable, set it")
    if blank := [each.name for each in fields(SourceConfig) if getattr(config, each.name) == ""]:
        flag = f"--{blank[0].replace('_', '-')}"
        raise SourceError(f"{flag} was given without a value; expected one; leave {flag} out for what is usual")


def _no_source(spec: str, path: Path) -> str:
    """What to say of a source that is neither a file, nor a folder, nor the id of a dataset."""
    if (problem := remote(spec)) is not None:
        return problem
    if _WINDOWS.match(spec):
        return (
            f"{spec!a} is a path of Windows, and nothing here is called so; expected a path of this machine: under "
            "WSL, the drive C: is at /mnt/c"
        )
    if _COMMAND.match(spec):
        return f"{spec!a} is a URL or a command; expected {_EXPECTED}; download what it gives and name the folder"
    if path.exists():
        return f"{path} is neither a file nor a folder; expected {_EXPECTED}; copy what it gives into one"
    like = _LIKE_AN_ID.fullmatch(spec)
    dataset = f", or, for the Hub's dataset {like[1]}, give only that id, or a copy of the part meant" if like else ""
    return f"there is no file or folder {spec!r}; expected {_EXPECTED}; correct the path{dataset}"


def _open_file(path: Path, request: Request) -> Source:
    if not is_tar_name(path.name) and path.suffix.lower() != ".parquet":
        what = f"it is {found}" if (found := plainly_at(path)) else "no .parquet file and no .tar"
        raise SourceError(
            f"{path} is one file ({what}); expected {_EXPECTED}; give the folder that holds the pictures and captions"
        )
    if is_tar_name(path.name):
        refuse_unused(request.config, f"{path}, a file that is named itself", *COLUMNS)
        return open_tars([(path.name, path)], {}, request)
    refuse_unused(request.config, f"{path}, a file that is named itself", *COLUMNS, "follow_links")
    return open_parquet(path.parent.resolve(), [path.name], {}, request)


def _open_folder(listing: FolderListing, request: Request) -> Source:
    """Open a folder as what it offers most captioned samples as, of equals as pictures; what else is in it is named."""
    kinds = _kinds(listing)
    if not kinds:
        raise SourceError(f"{listing.root} {_without_samples(listing)}; expected {_EXPECTED}")
    kind = next(iter(kinds)) if len(kinds) == 1 else _most(listing, request, kinds)
    what = f"{listing.root}, a folder of {kind}"
    used = [*COLUMNS, "split", "follow_links"]
    if not isinstance(listing.root, Path):
        used.remove("follow_links")  # there are none in a bucket
    if kind == "pictures" and not listing.metadata:
        what, used = f"{what} with a text file each", [*CONTROLS, "split", "follow_links"]
    refuse_unused(request.config, what, *used)
    return _noted(_open_as(kind, kinds, listing, request), _own_note(listing))


def _kinds(listing: FolderListing) -> dict[str, Sequence[str]]:
    """What a folder may be read as, and the files of each."""
    metadata = listing.metadata
    tars = sorted(path for path in listing.files if is_tar_name(path))
    # img2dataset writes 00000.parquet, which holds no pictures, beside 00000.tar.
    described = {path.rpartition(".")[0] + ".parquet" for path in tars} | set(metadata if listing.images else ())
    parquet = sorted(path for path in listing.files - described if path.lower().endswith(".parquet"))
    # In a bucket each picture would be a request or two, and each text beside it.
    pictures = [*listing.images, *metadata] if isinstance(listing.root, Path) else []
    kinds = {"pictures": pictures, "tars": tars, "parquet files": parquet}
    return {kind: files for kind, files in kinds.items() if files}


def _most(listing: FolderListing, request: Request, kinds: Mapping[str, Sequence[str]]) -> str:
    """The kind with most samples; raises the SourceError of one that offers none where none does."""
    counts, errors = {}, {}
    for kind in kinds:
        try:
            source = _open_as(kind, kinds, listing, replace(request, max_train_samples=None, ahead=nobody))
            counts[kind] = sum(bool(source.captions(i)) for i in range(len(source)))
        except SourceError as error:
            errors[kind] = error
    if not counts:
        has_metadata = bool(listing.metadata)
        raise next(iter(errors.values())) if has_metadata else next(reversed(errors.values()))
    # Pictures without captions do not make a folder of tars a folder of pictures, even where captions are not needed.
    return max(counts, key=lambda kind: (counts[kind], kind != "pictures" and not counts[kind]))


def _own_note(listing: FolderListing) -> str:
    """What to say of the folders in it that kcache made."""
    named = [f"{readable(path)} ({what})" for path, what in sorted(listing.own.items())]
    more = f" and {len(named) - 3:,} more" if len(named) > 3 else ""
    return f"not looked into: {', '.join(named[:3])}{more}" if named else ""


def _open_as(kind: str, kinds: Mapping[str, Sequence[str]], listing: FolderListing, request: Request) -> Listed:
    own = kinds[kind]
    others = {path for files in kinds.values() for path in files} - set(own)
    if kind != "pictures":
        stems = {_stem(path) for path in own}
        others |= {path for path in listing.files if _stem(path) not in stems}
    refused = listing.refused | leftovers(listing, others, f"the folder is read as {kind}; give it by itself")
    if kind == "pictures":
        rest = replace(listing, files=listing.files - others, refused=refused) if others else listing
        taken, note = _pictures_of_split(rest, request)
        return _noted(open_pictures(taken, request), note)
    paths, spare, note = _files_of_split(listing, own, request)
    if kind == "tars":
        return _noted(open_tars([(path, listing.root / path) for path in paths], refused | spare, request), note)
    return _noted(open_parquet(listing.root, paths, refused | spare, request), note)


def _stem(path: str) -> str:
    """A file's path up to what says its kind: that of 00000.tar and of 00000_stats.json, which goes with it."""
    return re.sub(r"(_stats)?\.[^/]*$", "", path)


def _without_samples(listing: FolderListing) -> str:
    """What a folder holds that can be read as nothing."""
    if not isinstance(listing.root, Path):
        if not listing.images:
            return f"holds no tars and no parquet files among its {len(listing.files):,} files"
        return (
            f"holds {counted(len(listing.images), 'loose image')}, which are not read one by one out of a bucket: put "
            "them into tars or parquet files, or copy the folder to this machine"
        )
    refused = listing.refused | leftovers(listing, listing.files, unlike_pictures)
    reasons = [f"{readable(path)}: {reason}" for path, reason in list(refused.items())[:3]]
    saved = {path.rpartition("/")[0] for path in listing.files if path.endswith(("/dataset_dict.json", "/state.json"))}
    if inner := sorted(path for path in saved if is_saved_dataset(listing.folder / path))[:3]:
        return f"holds {' and '.join(map(readable, inner))}, which save_to_disk wrote; give one of those folders"
    found = "; ".join(filter(None, [*reasons, _own_note(listing)]))
    if not found and not listing.files and any(listing.folder.iterdir()):
        found = "names that begin with a dot are hidden, and not read"
    return f"holds no images among its {len(listing.files):,} files{f' ({found})' if found else ''}"


def _files_of_split(
    listing: FolderListing, paths: Sequence[str], request: Request
) -> tuple[list[str], dict[str, str], str]:
    """Of data files that hold many samples each: those that are read, those in no split and why, and what to say."""
    splits = find_splits(paths, declared_rule(str(listing.root), _card(listing)))
    if splits is None:
        _check_no_splits(listing, request)
        return sorted(paths), {}, ""
    split = chosen_split(str(listing.root), splits.files, request.config.split)
    spare = dict.fromkeys(splits.spare, f"in no split, beside files that are in {', '.join(splits.files)}")
    return list(splits.files[split]), spare, _note(listing, splits, split)


def _pictures_of_split(listing: FolderListing, request: Request) -> tuple[FolderListing, str]:
    """What is read of a folder of pictures, and what to say."""
    asked = request.config.split
    splits, note = splits_of_pictures(listing.images) if asked is None else (find_splits(listing.images), "")
    if splits is None:
        _check_no_splits(listing, request)
        return listing, note
    split = chosen_split(str(listing.root), splits.files, asked)
    others = {path for path in (*listing.files, *listing.refused) if split not in (splits.rule(path) or (split,))}
    refused = {path: reason for path, reason in listing.refused.items() if path not in others}
    refused |= dict.fromkeys(splits.spare, f"in no split, beside pictures that are in {', '.join(splits.files)}")
    stems = {path.rpartition(".")[0] for path in splits.spare}
    others |= {path for path in listing.files if path.rpartition(".")[0] in stems}
    left = replace(listing, files=listing.files - others, refused=refused, left_out=frozenset(others))
    return left, _note(listing, splits, split)


def _note(listing: FolderListing, splits: Splits, split: str) -> str:
    others = {name: paths for name, paths in splits.files.items() if name != split}
    return split_note(split, {name: _size(listing.root, paths) for name, paths in others.items()})


def _size(root: Place, paths: Sequence[str]) -> str:
    """How much there is in data files, in words: rows, or else files."""
    if len(paths) <= COUNTED_FILES and all(path.endswith(".parquet") for path in paths):
        counts = [count_rows(root / path) for path in paths]
        if None not in counts:
            return counted(sum(filter(None, counts)), "row")
    kinds = {is_tar_name: "tar", is_image_name: "picture"}
    noun = next((noun for is_one, noun in kinds.items() if all(map(is_one, paths))), "file")
    return counted(len(paths), noun)


def _check_no_splits(listing: FolderListing, request: Request) -> None:
    if (split := request.config.split) is not None:
        raise no_splits(str(listing.root), split)


def _card(listing: FolderListing) -> str:
    """The text of a dataset's card; "" where there is none that can be read."""
    if "README.md" not in listing.files:
        return ""
    try:
        card = listing.root / "README.md"
        content = read_file(card, MAX_TEXT_BYTES) if isinstance(card, Path) else card.read_bytes()
        return content.decode("utf-8", "replace")
    except InputRejected:
        return ""


def _noted(source: Listed, note: str) -> Listed:
    return replace(source, description=f"{source.description}; {note}") if note else source
