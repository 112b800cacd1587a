"""What to type instead, for a path that is something else than was expected."""

import difflib
import os
import re
import shlex
from collections.abc import Collection, Sequence
from itertools import islice
from pathlib import Path
from urllib.parse import unquote

from kcache.places import Place
from kcache.places.bucket import BucketPath
from kcache.urls import remote

_PICTURES = {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_SOURCE_NAMES = {"metadata.jsonl", "metadata.csv", "dataset_info.json", "dataset_dict.json"}
_TABLE = re.compile(r"(image_embeds|text|latents-\d+(x\d+)?|samples|reserved)-[0-9a-f]{8}")
_HUB_REPOSITORY = re.compile(r"(datasets|models|spaces)--.+")
_LOOKED_AT = 1000
"""Names in a folder that are looked at: an error message must not list a folder of a million files."""


def instead_of_cache(path: Place) -> str | None:
    """What `path`, which is no cache, is instead, and what to type; None where nothing is known."""
    if isinstance(path, BucketPath):
        return _instead_in_bucket(path)
    if (problem := remote(path)) is not None:
        return problem
    for parent in path.absolute().parents:
        if _is_cache(parent):
            return f"it is part of the cache {_shown(parent)}; give that folder"
    if not path.exists():
        near = near_names(path)
        return broken_link(path) or (f"there is nothing at that path; did you mean {near}?" if near else None)
    if path.is_file():
        return "it is a file; give the folder of a cache"
    names = _names(path)
    if kind := _trained(path, names):
        return f"it is {kind}; give the cache that it was trained from, or draw with it: kcache sample"
    if inner := [name for name in names if _is_cache(path / name)]:
        return f"the caches are in it: {', '.join(str(path / name) for name in inner[:5])}; give one of them"
    if _has_pictures(names):
        source = shlex.quote(str(path))
        return f"it is a source of pictures; build a cache of it, and give that: kcache cache-build {source} CACHE"
    return None


def _instead_in_bucket(path: BucketPath) -> str | None:
    """`instead_of_cache` in a bucket, by few requests."""
    if (path.parent / "manifest.json").is_file():
        return f"it is part of the cache {path.parent}; give that"
    if path.key and path.is_file():
        return "it is a file; give the URL of a cache"
    inner = [each for each in islice(path.iterdir(), 100) if (each / "manifest.json").is_file()]
    return f"the caches are in it: {', '.join(map(str, inner[:5]))}; give one of them" if inner else None


def cache_around(path: Path) -> Path | None:
    """The cache that `path` is, or is in; None where that is none."""
    real = Path(os.path.realpath(path))
    return next((folder for folder in (real, *real.parents) if _is_cache(folder)), None)


def instead_of_source(path: Path) -> str | None:
    """What `path`, given as a source of pictures, is instead, and what to type; None where nothing is known."""
    if _is_cache(path):
        shown = shlex.quote(str(path))
        return (
            f"{path} is a cache: its pictures are encoded already; train from it, or look at it: kcache cache-info "
            f"{shown}; for another form of it: kcache cache-convert {shown} NEW --format webdataset"
        )
    if path.is_dir():
        names = _names(path)
        if kind := own_output(path, names):
            return f"{path} is {kind}; give the folder, tars or dataset of the pictures"
        repository = path.parent if path.resolve().name == "snapshots" else path
        if _HUB_REPOSITORY.fullmatch(repository.resolve().name) and (repository / "snapshots").is_dir():
            found = " or ".join(shlex.quote(str(each)) for each in sorted((repository / "snapshots").iterdir())[:3])
            return f"{path} is how the Hub's client keeps all revisions of a repository; give one of them: {found}"
    if re.search(r"[*?]|\[.*\]", path.name) and path.parent.is_dir() and not path.exists():
        return (
            f"{path} is a pattern, which is not taken as a source; give the folder {str(path.parent)!r}, or tars as in "
            f"{str(path.parent / '{00000..00099}.tar')!r}"
        )
    near = "" if path.exists() else near_names(path)
    return f"there is no file or folder {str(path)!r}; did you mean {near}?" if near else None


def own_output(folder: Path, names: Collection[str]) -> str | None:
    """What of kcache's own making a folder is that holds these names, finished or not; None for any other folder."""
    if "manifest.json" in names and any(name.startswith("index-") for name in names):
        return "a kcache cache"
    if "plans" in names and any(re.fullmatch("[0-9a-f]{16}", name) for name in _names(folder / "plans")):
        return "a kcache cache that is being built"
    if any(_TABLE.fullmatch(name) and any((folder / name).glob("*.rows.npy")) for name in names):
        return "a kcache cache that was not finished"
    return _trained(folder, names)


def _trained(folder: Path, names: Collection[str]) -> str | None:
    """What a folder that holds these names is, where training left it, or trains from it."""
    if "metrics.jsonl" in names and {"config.json", "starts.jsonl"} & set(names):
        return "a run directory"
    if folder.name.startswith("checkpoint-") and "state.json" in names:
        return "a checkpoint"
    return "a pipeline of networks" if "model_index.json" in names else None


def already_in(folder: Path) -> str | None:
    """What `folder`, which is to be written into, is already, if that is nothing to mix with; else None."""
    if (folder / "manifest.json").is_file() or (folder / "plans").is_dir():
        return "a cache"
    return "a source of pictures" if _has_pictures(_names(folder)) else None


def broken_link(path: Path) -> str | None:
    """What a path that is not there would lead through: "X is a link to Y, which is not there any more"; else None."""
    absolute = path.absolute()
    for part in (absolute, *absolute.parents):
        if part.is_symlink() and not part.exists():
            return f"{_shown(part)} is a link to {part.readlink()}, which is not there any more"
    return None


def _expanded(text: str) -> str:
    """A path with ~ and variables put in, as a shell does where they are not quoted."""
    try:
        return os.path.expandvars(Path(text).expanduser())
    except RuntimeError:  # nobody's home
        return text


def near_names(path: Path) -> str:
    """What `path` may mean, or stands beside it under a similar name, "a or b"; "" for nothing."""
    text = str(path)
    meant = [
        _expanded(text),
        text.strip(" \t\r\n'\""),
        text.replace("\\", "/"),
        unquote(text),
    ]
    if there := [each for each in dict.fromkeys(meant) if each not in ("", text) and Path(each).exists()]:
        return " or ".join(there)
    try:
        names = _names(path.parent)
    except OSError:
        return ""
    return " or ".join(str(path.parent / name) for name in difflib.get_close_matches(path.name, names))


def _is_cache(folder: Path) -> bool:
    return (folder / "manifest.json").is_file() and any(folder.glob("index-*"))


def _has_pictures(names: Sequence[str]) -> bool:
    return any(name in _SOURCE_NAMES or Path(name).suffix.lower() in _PICTURES | {".tar", ".parquet"} for name in names)


def _names(folder: Path) -> list[str]:
    """Some names in a folder, sorted; those of hidden files left out."""
    if not folder.is_dir():
        return []
    names = (entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    return sorted(islice(names, _LOOKED_AT))


def _shown(path: Path) -> str:
    """The path as short as it can be said from here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
