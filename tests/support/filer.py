"""What lies in the bucket of the server of the tests, copied to a disk and back by plain HTTP: by no code of kcache."""

import json
import os
import urllib.request
from pathlib import Path
from typing import Any, cast
from urllib.error import HTTPError
from urllib.parse import quote


def _ask(path: str, method: str = "GET", content: bytes | None = None, query: str = "") -> Any:
    url = f"{os.environ['FILER_URL']}/{quote(path)}{query}"
    headers = {"Accept": "application/json", "Content-Type": "application/octet-stream"}
    return urllib.request.urlopen(urllib.request.Request(url, content, headers, method=method), timeout=60)  # noqa: S310


def listed(prefix: str) -> list[str]:
    """The name of every file below `prefix`, a name in the bucket, behind it."""
    names, last = list[str](), ""
    while True:
        try:
            with _ask(f"{prefix}/", query=f"?limit=1000&lastFileName={quote(last)}") as answer:
                entries = cast("list[dict[str, Any]]", json.load(answer)["Entries"] or [])
        except HTTPError as error:
            if error.code == 404:
                return names
            raise
        for entry in entries:
            name = entry["FullPath"].rpartition("/")[2]
            if entry["Mode"] & 1 << 31:  # a folder
                names += [f"{name}/{inner}" for inner in listed(f"{prefix}/{name}")]
            else:
                names.append(name)
        if len(entries) < 1000:
            return names
        last = entries[-1]["FullPath"].rpartition("/")[2]


def copy_out(prefix: str, folder: Path) -> Path:
    """Copy all below `prefix` into `folder`, which is made."""
    folder.mkdir(parents=True)
    for name in listed(prefix):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with _ask(f"{prefix}/{name}") as answer:
            (folder / name).write_bytes(answer.read())
    return folder


def copy_in(folder: Path, prefix: str) -> None:
    """Copy all files of `folder` to below `prefix`."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        _ask(f"{prefix}/{path.relative_to(folder).as_posix()}", "PUT", path.read_bytes()).close()
