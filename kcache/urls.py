"""Whether a text means files of this machine or of an object store, and what to do where it means neither."""

import os
import re
from pathlib import Path
from urllib.parse import unquote

from kcache.errors import ConfigError

# pathlib makes one slash of two.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", re.DOTALL)
_SLIP = re.compile(r"(s3|gs|az|hf|memory|file):(?!/)", re.IGNORECASE)
"""A URL without its slashes, which would be the name of a folder."""
_SECRET = re.compile(r"[^/]*@")
_QUERY = re.compile(r"\?[^/?]*=")
"""What signs a URL, or chooses a version."""
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
_SPELT = {"s3a": "s3", "s3n": "s3", "gcs": "gs"}
"""What other tools call the stores that are reached."""
_ADVICE = {
    "hf": "is a URL of the Hugging Face Hub, which is only read; expected one of a dataset with a finished cache, "
    "hf://datasets/owner/name, where a cache is read; of pictures give the id, owner/name; write elsewhere",
    "http": "is a URL of the web; download what it gives, and name the file or folder",
    "https": "is a URL of the web; download what it gives, and name the file or folder",
    "ftp": "is a URL; download what it gives, and name the file or folder",
}


REACHED = ("s3", "gs", "az", "memory")
"""Schemes of stores that can be read and written; what lies in `memory` is gone with the process."""
_HUB_CACHE = re.compile(r"hf:/+datasets/([\w.-]+/[\w.-]+?)(?:@([^@]+?))?/*", re.IGNORECASE)


def store_url(path: str) -> str | None:
    """The URL of an object store that `path` is; None for any other text, and for what lies on this machine."""
    if _is_here(path) or (url := _URL.match(path)) is None or url[1].lower() not in REACHED:
        return None
    return None if _problem_of_store(url[1].lower(), url[2]) else f"{url[1].lower()}://{url[2]}"


def hub_cache(path: str) -> tuple[str, str | None] | None:
    """Repository and revision of the Hub's dataset that "hf://datasets/owner/name@revision" is; None for other text."""
    url = None if _is_here(path) else _HUB_CACHE.fullmatch(path)
    return None if url is None else (url[1], url[2])


def without_scheme(path: str) -> str:
    """The path that "file:///some/path" means; any other text as it is."""
    url = None if _is_here(path) else _URL.match(path)
    if url is None or url[1].lower() != "file":
        return path
    return "/" + re.sub("^localhost/", "", unquote(url[2])).lstrip("/")


def is_read_afar(path: str) -> bool:
    """Whether `path` is the URL of something that is read where it lies, or fetched from the Hub."""
    return store_url(path) is not None or hub_cache(path) is not None


def _is_here(text: str) -> bool:
    """Whether a text is a path, of something that is here or would lie in a folder that is."""
    return os.path.lexists(text) or os.path.lexists(re.split("(?<=.)/", text, maxsplit=1)[0])


def _problem_of_store(scheme: str, rest: str) -> str | None:
    """Why "scheme://rest" leads to no place in a store, and what to do."""
    bucket, _, key = rest.partition("/")
    if _SECRET.match(rest):
        return (
            f"a URL {scheme}://… with a name or password in it, not repeated here, is not taken; expected one without; "
            "give credentials as the store's own tools take them, e.g. AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if _QUERY.search(rest):
        return (
            f"a URL {scheme}://… with parameters behind a ?, not repeated here, is not taken; expected {scheme}://"
            "bucket/path alone; give credentials as the store's own tools take them"
        )
    if rest != rest.strip():
        return f"{f'{scheme}://{rest}'!a} ends with a blank; give it without"
    if not bucket:
        return f"'{scheme}://' names no bucket; expected {scheme}://bucket/path"
    if {".", ".."} & set(key.split("/")):
        return f"{f'{scheme}://{rest}'!a} has . or .. in it, which means nothing in a bucket; give its path without"
    return None


def remote(path: str | Path) -> str | None:
    """What `path` is, if it means no file or folder of this machine, and what to do: a sentence. Else None.

    What exists here under that name, or would lie in a folder that does, is a path like any other.
    """
    text = os.fspath(path)
    url = _URL.match(text)
    if _is_here(text):
        if url is not None and url[1].lower() in REACHED and "://" in text and not os.path.lexists(text):
            return (
                f"{text!a} is a URL, and a path in the folder {text.partition('/')[0]!a} that is here; expected one of "
                "them; rename the folder, or give its path as ./…"
            )
        return None
    if url is not None:
        return _remote_url(url[1], url[2])
    if (url := _URL.match(text.lstrip())) is not None:
        return f"a URL {url[1]}://… with a blank before it is not taken; give it without"
    if _REMOTE.match(text):
        return f"{text!a} is a place on another machine; expected a path of this one; copy it, e.g. with rsync"
    if (slip := _SLIP.match(text)) is not None:
        return f"{text!a} is neither a URL nor a path that is here; a URL begins with {slip[1].lower()}://"
    return None


def _remote_url(scheme: str, rest: str) -> str:
    kind = scheme.lower()
    shown = ascii(f"{scheme}://{rest.partition('?')[0]}")  # behind it may stand a signature
    if kind in REACHED or _SECRET.match(rest):
        found = _problem_of_store(kind, rest)
        return found or f"{shown} is in an object store; expected a path of this machine; give one"
    if kind == "file":
        return f"{f'file:///{rest}'!a} is a URL; expected a path; give {without_scheme(f'file:///{rest}')!a}"
    if (hub := _HUB_PAGE.match(rest)) is not None:
        return f"{shown} is a page of the Hugging Face Hub; give its id, {hub[1]!a}, where one is taken"
    if kind in _ADVICE:
        return f"{shown} {_ADVICE[kind]}"
    if kind in _SPELT:
        return f"{shown} is a URL of an object store as other tools write it; give {f'{_SPELT[kind]}://{rest}'!a}"
    if kind in _STORES:
        copy = f"copy it with the store's own tool, e.g. {_STORES[kind]}, and name the copy"
        return f"{shown} is a URL of an object store, which is not supported; expected s3://, gs:// or az://; {copy}"
    return f"{shown} is a URL, which is not supported; expected a path of this machine; copy it and name the copy"


def check_lasting(path: str) -> None:
    """Raise ConfigError for a place that would be gone with this process."""
    if (url := store_url(path)) is not None and url.startswith("memory:"):
        raise ConfigError(
            f"{url} is gone when this command ends; expected a place that stays; give a path, or s3://, gs:// or az://"
        )


def check_local(path: str | Path) -> None:
    """Raise ConfigError for a path that means no file or folder of this machine."""
    if (problem := remote(path)) is not None:
        raise ConfigError(problem)
