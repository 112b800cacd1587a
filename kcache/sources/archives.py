"""The members of archives, found and read without trusting anything that the archive says: plain tars, and zips.

Zips are what rows of `datasets` may lead into, by the chained paths that it writes: zip://0001.jpg::/downloads/x.zip.
"""

import lzma
import os
import re
import struct
import tarfile
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import BinaryIO

from kcache.errors import InputRejected
from kcache.plainly import plainly_at
from kcache.sources.reading import MAX_IMAGE_BYTES, locate

MAX_HEADER_BYTES = 1 << 20
"""Most that one header may make the reader hold: long names and extended attributes need far less."""

# What zipfile raises on damaged and on hostile archives, and on those that it cannot read.
_ZIP_DAMAGE = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError, ValueError, LookupError,
    OverflowError, struct.error,
)  # fmt: skip
_OPEN_ZIPS = 2
"""Zips whose lists of members are kept: rows of one zip mostly follow each other."""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_ADVICE = {
    "tar": "inside a tar; give the tar itself as the source",
    "hf": "on the Hub, and was not downloaded; fetch the files first: hf download … --repo-type dataset",
    "http": "on the web; download the pictures first, e.g. with img2dataset",
    "https": "on the web; download the pictures first, e.g. with img2dataset",
}

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


def is_chained(path: str) -> bool:
    """Whether a path in a row is a URL or leads into an archive."""
    return _SCHEME.match(path) is not None


class ZipMembers:
    """Finds and reads members of zips; may be called from several threads."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, zipfile.ZipFile] = OrderedDict()
        self._lock = Lock()

    def locate(self, path: str, folder: Path, roots: Sequence[Path], links: Sequence[Path] = ()) -> tuple[Path, str]:
        """The zip that a chained path leads into, found as by `locate`, and the member; raises InputRejected."""
        first, *outer = path.split("::")
        scheme, _, member = first.partition("://")
        if scheme == "zip" and len(outer) == 1:
            return locate(outer[0].removeprefix("file://"), folder, roots, links), member
        what = "inside an archive in another; unpack them" if scheme == "zip" else _ADVICE.get(scheme)
        what = what or f"behind {scheme}://, which is not read; unpack or download the pictures first"
        raise InputRejected("source", f"the image {path[:200]!a} is {what}")

    def read(self, archive: Path, member: str) -> bytes:
        """The bytes of a member; raises InputRejected."""
        try:
            opened = self._opened(archive)
            info = opened.getinfo(member)
        except KeyError:
            raise InputRejected("source", f"there is no member {member!a} in {archive.name!a}") from None
        except _ZIP_DAMAGE as error:
            found = plainly_at(archive)
            is_one = found is None or found.startswith("a zip")
            why = f"it is {found}" if not is_one else f"damaged or cut short: {_short(error)}; fetch it again"
            raise InputRejected("source", f"{archive.name!a} cannot be read as a zip: {why}") from error
        if info.flag_bits & 1:
            raise InputRejected("source", f"{member!a} in {archive.name!a} is encrypted; unpack it")
        if info.file_size > MAX_IMAGE_BYTES:
            raise InputRejected("source", f"it has {info.file_size:,} bytes, more than {MAX_IMAGE_BYTES:,}")
        try:
            with opened.open(info) as file:  # which gives no more than `file_size` bytes, whatever follows
                return file.read()
        except _ZIP_DAMAGE as error:
            raise InputRejected(
                "source", f"{member!a} in {archive.name!a} cannot be read: {_short(error)}; fetch the zip again"
            ) from error

    def _opened(self, archive: Path) -> zipfile.ZipFile:
        with self._lock:
            opened = self._open.pop(archive, None) or zipfile.ZipFile(archive)
            self._open[archive] = opened
            # Not closed here: another thread may be reading from it. It closes when the last one lets go.
            while len(self._open) > _OPEN_ZIPS:
                self._open.popitem(last=False)
            return opened


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
