"""Writing so that a reader sees a file or folder whole or not at all, also after a crash or a power cut."""

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from kcache.errors import CacheBusyError

__all__ = [
    "exclusive",
    "publish",
    "remove",
    "remove_temporary",
    "sync_folder",
    "temporary_path",
    "write_bytes",
    "write_json",
    "write_npy",
]

TEMPORARY_PREFIX = ".tmp-"


def temporary_path(folder: Path) -> Path:
    """A name in `folder` that no other process uses; whatever stands under it is never read."""
    return folder / f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(6)}"


def remove_temporary(folder: Path) -> None:
    """Remove what interrupted writers left in `folder`; call it only while holding the folder's cache exclusively."""
    for entry in folder.glob(f"{TEMPORARY_PREFIX}*"):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: a rename is on disk only after its folder is."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, final: Path) -> None:
    """Give what was written under a temporary name its final one, durably.

    A file takes the place of the one before it in one step; a folder must not stand there yet.
    """
    temporary.rename(final)
    sync_folder(final.parent)


def remove(path: Path) -> None:
    """Remove a file, link or folder so that no reader ever sees a part of it; nothing there is fine."""
    condemned = temporary_path(path.parent)
    try:
        path.rename(condemned)
    except FileNotFoundError:
        return
    if condemned.is_dir() and not condemned.is_symlink():
        shutil.rmtree(condemned)
    else:
        condemned.unlink()


@contextmanager
def _writing(final: Path) -> Iterator[Any]:
    temporary = temporary_path(final.parent)
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(final: Path, content: bytes) -> None:
    """Write a file durably, in one step as seen by readers."""
    with _writing(final) as file:
        file.write(content)


def write_json(final: Path, value: Any) -> None:
    """Write a JSON file durably: sorted keys, two spaces, so that equal values give equal bytes."""
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(final, text.encode() + b"\n")


def write_npy(final: Path, array: np.ndarray) -> None:
    """Write an array as a .npy file durably; arrays of Python objects are refused."""
    with _writing(final) as file:
        np.save(file, array, allow_pickle=False)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold `folder` for one writing process; the kernel lets go when that process ends, however it ends.

    Raises CacheBusyError when another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CacheBusyError(
                f"{folder} is being written by another process; expected to be its only writer; "
                "wait for that build to end, or stop it: what it has committed is kept"
            ) from None
        yield
    finally:
        os.close(descriptor)
