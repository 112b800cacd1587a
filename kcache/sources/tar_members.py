"""The members of a plain tar file: where the bytes of each stand, found without trusting anything that the tar says."""

import os
import struct
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

MAX_HEADER_BYTES = 1 << 20
"""Most that one header may make the reader hold: long names and extended attributes need far less."""

# What tarfile raises on damaged and on hostile headers.
_DAMAGE = (tarfile.TarError, ValueError, LookupError, ArithmeticError, TypeError, RecursionError, struct.error)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A member of a tar, folders left out."""

    name: str
    """Data, never a path."""
    offset: int
    """Where its content starts in the tar, in bytes."""
    size: int
    """Bytes of content."""
    problem: str | None
    """Why its content must not be read; None for a regular file that lies in the tar as a whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TarListing:
    """What a tar holds, up to where it is whole."""

    members: list[Member]
    damage: str | None
    """Why there may have been more; None when the tar ends as it should."""


class _Headers:
    """A file as tarfile may see it: read in small pieces and never backwards, whatever a header asks for."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)

    def seek(self, offset: int) -> None:
        self._file.seek(offset)

    def tell(self) -> int:
        return self._file.tell()


def list_members(path: Path) -> TarListing:
    """List an uncompressed tar by its headers alone; nothing is extracted, and no link is followed.

    Raises OSError when the file cannot be read.
    """
    members: list[Member] = []
    damage = None
    with path.open("rb") as file:
        try:
            _walk(file, members)
        except _DAMAGE as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            damage = reason if isinstance(error, tarfile.TarError) else f"a header that makes no sense: {reason}"
    return TarListing(members=members, damage=damage)


def _walk(file: BinaryIO, members: list[Member]) -> None:
    tar_bytes = os.fstat(file.fileno()).st_size
    with tarfile.open(fileobj=_Headers(file), mode="r:") as tar:  # type: ignore[call-overload]  # it reads, seeks, tells
        while (info := tar.next()) is not None:
            tar.members.clear()  # or it keeps every header of the tar
            # A size below zero would lead it round in circles.
            if info.size < 0 or tar.offset <= info.offset:
                raise tarfile.ReadError(f"a size of {info.size} bytes")
            if not info.isdir():
                problem = _problem(info, tar_bytes)
                members.append(Member(name=info.name, offset=info.offset_data, size=info.size, problem=problem))
        # For tarfile a damaged header is an end like any other.
        file.seek(tar.offset)
        block = file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it ends without an end mark")
        if any(block):
            raise tarfile.ReadError(f"byte {tar.offset} should start a header and does not")


def _problem(info: tarfile.TarInfo, tar_bytes: int) -> str | None:
    if info.issym() or info.islnk():
        return "a link; links in a tar are not followed"
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.issparse():
        return "not a regular file"
    if info.name.startswith("/") or ".." in PurePosixPath(info.name).parts:
        return "its name leads out of the tar"
    if info.offset_data + info.size > tar_bytes:
        return "the tar is cut short inside it"
    return None
