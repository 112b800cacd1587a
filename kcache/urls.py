"""Whether a text means files of this machine or of an object store, and what to do where it means neither."""

import os
import re
from pathlib import Path
from urllib.parse import unquote

from kcache.errors import ConfigError

# pathlib makes one slash of two.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", re.DOTALL)
_REMOTE = re.compile(r"[^/\s:@]+@[^/\s:@]+:")
_HUB_PAGE = re.compile(r"(?:www\.)?(?:huggingface\.co|hf\.co)/(?:datasets/)?([\w.-]+/[\w.-]+)")
_STORES = {
    "s3": "aws s3 sync", "s3a": "aws s3 sync", "s3n": "aws s3 sync", "r2": "rclone sync", "b2": "rclone sync",
    "gs": "gcloud storage rsync", "gcs": "gcloud storage rsync", "az": "azcopy sync", "abfs": "azcopy sync",
    "abfss": "azcopy sync", "adl": "azcopy sync", "wasb": "azcopy sync", "wasbs": "azcopy sync", "oss": "ossutil sync",
    "oci": "oci os object sync", "cos": "coscli sync", "obs": "obsutil sync", "swift": "rclone sync",
    "hdfs": "hdfs dfs -get",
}  # fmt: skip
"""Schemes of object stores, and the tools that copy from and to them."""
_ADVICE = {
    "hf": "is a URL of the Hugging Face Hub; give an id, owner/name, where one is taken, or download it: hf download",
    "http": "is a URL of the web; download what it gives, and name the file or folder",
    "https": "is a URL of the web; download what it gives, and name the file or folder",
    "ftp": "is a URL; download what it gives, and name the file or folder",
}


REACHED = ("s3", "gs", "az", "memory")
"""Schemes of stores that can be read and written; what lies in `memory` is gone with the process."""


def store_url(path: str) -> str | None:
    """The URL of an object store that `path` is; None for any other text, and for what lies on this machine."""
    if os.path.lexists(path) or (url := _URL.match(path)) is None or url[1].lower() not in REACHED:
        return None
    return f"{url[1].lower()}://{url[2]}"


def remote(path: str | Path) -> str | None:
    """What `path` is, if it means no file or folder of this machine, and what to do: a sentence. Else None.

    What exists here under that name, or would lie in a folder that does, is a path like any other.
    """
    text = os.fspath(path)
    if os.path.lexists(text) or os.path.lexists(re.split("(?<=.)/", text, maxsplit=1)[0]):
        return None
    if (url := _URL.match(text)) is not None:
        scheme, rest = url[1].lower(), url[2]
        shown = ascii(f"{url[1]}://{rest}")
        if scheme == "file":
            local = re.sub("^localhost/", "", unquote(rest))
            return (
                f"{f'file:///{rest}'!a} is a URL; expected a path; give {local if local[:1] == '~' else '/' + local!a}"
            )
        if (hub := _HUB_PAGE.match(rest)) is not None:
            return f"{shown} is a page of the Hugging Face Hub; give its id, {hub[1]!a}, where one is taken"
        if scheme in _ADVICE:
            return f"{shown} {_ADVICE[scheme]}"
        if scheme in _STORES:
            copy = f"copy it with the store's own tool, e.g. {_STORES[scheme]}, and name the copy"
            return (
                f"{shown} is a URL of an object store, which is not supported; expected a path of this machine; {copy}"
            )
        return f"{shown} is a URL, which is not supported; expected a path of this machine; copy it and name the copy"
    if _REMOTE.match(text):
        return f"{text!a} is a place on another machine; expected a path of this one; copy it, e.g. with rsync"
    return None


def check_local(path: str | Path) -> None:
    """Raise ConfigError for a path that means no file or folder of this machine."""
    if (problem := remote(path)) is not None:
        raise ConfigError(problem)
