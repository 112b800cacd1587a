"""What the library `datasets` keeps on a disk: folders that `save_to_disk` wrote, and datasets of the Hub."""

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from kcache.errors import InputRejected, SourceError
from kcache.foreign import told
from kcache.sources.arrow_files import ArrowStream
from kcache.sources.listing import link_roots
from kcache.sources.protocol import Request
from kcache.sources.reading import locate, readable
from kcache.sources.splits import COUNTED_FILES, chosen_split, no_splits, split_note
from kcache.sources.table import TableSource, open_rows
from kcache.tally import counted


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder is one that `save_to_disk` wrote, of several splits or of one."""
    if (folder / "dataset_dict.json").exists():
        return True
    # Other tools have a state.json, too.
    return (folder / "state.json").exists() and ((folder / "dataset_info.json").exists() or any(folder.glob("*.arrow")))


def open_saved_dataset(folder: Path, request: Request) -> tuple[TableSource, str]:
    """Open what `save_to_disk` wrote, of several splits one; and what to say of the others. Raises SourceError."""
    root = folder.resolve()
    label, note = "dataset", ""
    if (root / "dataset_dict.json").exists():
        splits = _read_json(root / "dataset_dict.json").get("splits")
        if not isinstance(splits, list) or not all(isinstance(each, str) and _is_name(each) for each in splits):
            raise SourceError(
                f"{root / 'dataset_dict.json'} names the splits {splits!a}; expected a list of names, as save_to_disk "
                "writes it; write it again"
            )
        label = chosen_split(str(folder), splits, request.config.split)
        others = {each: _rows_text(_saved_rows(root / each)) for each in splits if each != label}
        root, note = root / label, split_note(label, others)
    elif request.config.split not in (None, _read_json(root / "state.json").get("_split")):
        raise no_splits(f"{folder}, one split that save_to_disk wrote,", str(request.config.split))
    files = []
    for entry in _data_files(root / "state.json"):
        try:
            files.append((label, locate(entry, root, [root], link_roots(root, request.config))))
        except InputRejected as rejection:
            raise SourceError(
                f"{root}: data file {entry!a} of state.json is missing or unsafe: {rejection.reason}; "
                "expected a folder as save_to_disk writes it; write it again"
            ) from rejection
    source = open_rows("saved dataset", str(root), ArrowStream, files, [root], request, numbered_through=True)
    return source, note


def open_hub_dataset(name: str, request: Request) -> tuple[TableSource, str]:
    """Download a Hub dataset into the user's Hugging Face cache and open one of its splits.

    With it comes what to say of the others. Raises SourceError.
    """
    # Imported here, because it takes a second that no other source needs.
    import datasets

    what = f"{name!r} is no folder or file here, and the Hub dataset of that name cannot be loaded"
    do = f"expected a path that exists or the id of a dataset with a split {request.split}; correct it, or go online"
    with told(SourceError, what, do):
        try:
            dataset = datasets.load_dataset(name, split=request.split, keep_in_memory=False)
        except ValueError as error:
            if (other := _is_not_in_it(name, request, " ".join(str(error).split()))) is not None:
                raise SourceError(other) from error
            raise
    files = [(name, Path(cached["filename"])) for cached in dataset.cache_files]
    source = open_rows("Hub dataset", name, ArrowStream, files, _roots(), request, numbered_through=True)
    columns = (request.image_column, *filter(None, request.config.controls.values()))
    are_images = all(isinstance(dataset.features.get(column), datasets.Image) for column in columns)
    if dataset.info.builder_name == "imagefolder" and are_images:
        # What is of that type there is no data: `datasets` wrote the names of zips that it opened itself, wherever.
        source = replace(source, zip_roots=(Path("/"),))
    splits: Mapping[str, object] = dataset.info.splits or {}
    others = {each: _rows_text(getattr(about, "num_examples", None)) for each, about in splits.items()}
    others.pop(request.split, None)
    return source, split_note(request.split, others) if others else ""


def _roots() -> list[Path]:
    """Where a picture may lie that a row only names, as it is called and where it is: HF_HOME may be a link."""
    import datasets
    import huggingface_hub.constants

    config, hub = datasets.config, huggingface_hub.constants
    caches = (config.HF_DATASETS_CACHE, hub.HF_HUB_CACHE, config.DOWNLOADED_DATASETS_PATH)
    return [root for cache in caches for root in (Path(cache).absolute(), Path(cache).resolve())]


def _is_not_in_it(name: str, request: Request, error: str) -> str | None:
    """What to say when a dataset has not the part that was asked for, by the error of `datasets`; None otherwise."""
    if "onfig name is missing" in error or "BuilderConfig" in error:
        return (
            f"the Hub dataset {name!r} has several configurations{_listed(error)}; expected one; save one of "
            f'them, datasets.load_dataset("{name}", CONFIG).save_to_disk(FOLDER), then: kcache cache-build FOLDER CACHE'
        )
    if "Unknown split" in error:
        return (
            f"the Hub dataset {name!r} has no split {request.split!r}; found{_listed(error).removeprefix(':')}; give "
            "one of those with --split"
        )
    return None


def _listed(error: str) -> str:
    """ ": a, b" from the list of names in an error of `datasets`; "" where there is none."""
    try:
        names = ast.literal_eval(re.findall(r"\[[^\[\]]*\]", error)[-1])
    except (IndexError, ValueError, SyntaxError):
        return ""
    more = ", …" if len(names) > 10 else ""
    return f": {readable(', '.join(map(str, names[:10])))}{more}"


def _is_name(split: str) -> bool:
    return re.fullmatch(r"\w+(\.\w+)*", split) is not None


def _saved_rows(folder: Path) -> int | None:
    """How many rows a split that `save_to_disk` wrote has; None where that cannot be told, or not soon."""
    try:
        entries = _data_files(folder / "state.json")[: COUNTED_FILES + 1]
        files = [ArrowStream(locate(entry, folder, [folder])) for entry in entries]
    except (SourceError, InputRejected, pa.ArrowException, OSError):
        return None
    return sum(file.starts[-1] for file in files) if len(files) <= COUNTED_FILES else None


def _rows_text(count: object) -> str:
    return counted(count, "row") if isinstance(count, int) else ""


def _read_json(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(
            f"{path} cannot be read: {error}; expected what save_to_disk writes; write it again"
        ) from error
    if not isinstance(value, dict):
        raise SourceError(f"{path} holds no JSON object; expected what save_to_disk writes; write it again")
    return value


def _data_files(state: Path) -> list[str]:
    entries = _read_json(state).get("_data_files")
    names = []
    if isinstance(entries, list):
        names = [entry["filename"] for entry in entries if isinstance(entry, dict) and "filename" in entry]
    if not names or not all(isinstance(name, str) for name in names):
        raise SourceError(f"{state} names no data files; expected what save_to_disk writes; write it again")
    return names
