"""The members of archives, found and read without trusting anything that the archive says: plain tars, and zips.

Zips are what rows of `datasets` may lead into, by the chained paths that it writes: zip://0001.jpg::/downloads/x.zip.
"""

import json
import lzma
import os
import re
import struct
import tarfile
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import BinaryIO

from kcache.disk.memo import DigestMemo
from kcache.errors import InputRejected, StoreError
from kcache.places import Place
from kcache.places.bucket import BucketPath
from kcache.places.fetching import FETCHES, Windows, at_once
from kcache.places.opened import opened
from kcache.plainly import plainly_at
from kcache.sources.reading import MAX_IMAGE_BYTES, MAX_TEXT_BYTES, locate
from kcache.store.digests import content_key

_TEXT_SUFFIXES = ("txt", "text", "caption", "json")
"""Members that are read to know the captions."""
_PART = "what the tar holds, 1"
"""What the memo calls a listing; another name for another form of it."""
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
    content: bytes | None = None
    """Where the tar is in a bucket: its content, if it is a short text."""
    key: bytes | None = None
    """There: the `content_key` of any other, if it is not too large for an image."""


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


def list_members(path: Place) -> TarListing:
    """List an uncompressed tar by its headers alone; nothing is extracted, and no link is followed.

    A tar in a bucket is read as a whole, once: a request for each header would take longer. Raises OSError when the
    file cannot be read, StoreError among them.
    """
    members: list[Member] = []
    damage = None
    with opened(path) as file:
        try:
            _walk(file, members, None if isinstance(path, Path) else _looked_into)
        except _DAMAGE as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            damage = reason if isinstance(error, tarfile.TarError) else f"a header that makes no sense: {reason}"
    return TarListing(members=members, damage=damage)


def _walk(file: BinaryIO, members: list[Member], look: Callable[[Member, BinaryIO], Member] | None) -> None:
    tar_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    with tarfile.open(fileobj=_Headers(file), mode="r:") as tar:  # type: ignore[call-overload]  # it reads, seeks, tells
        while (info := tar.next()) is not None:
            tar.members.clear()  # or it keeps every header of the tar
            # A size below zero would lead it round in circles.
            if info.size < 0 or tar.offset <= info.offset:
                raise tarfile.ReadError(f"a size of {info.size} bytes")
            if not info.isdir():
                problem = _problem(info, tar_bytes)
                member = Member(name=info.name, offset=info.offset_data, size=info.size, problem=problem)
                members.append(member if look is None or problem else look(member, file))
        # For tarfile a damaged header is an end like any other.
        file.seek(tar.offset)
        block = file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it ends without an end mark")
        if any(block):
            raise tarfile.ReadError(f"byte {tar.offset} should start a header and does not")


def _looked_into(member: Member, file: BinaryIO) -> Member:
    if member.size > MAX_IMAGE_BYTES:
        return member
    file.seek(member.offset)
    content = file.read(member.size)
    if member.size <= MAX_TEXT_BYTES and member.name.rpartition(".")[2].lower() in _TEXT_SUFFIXES:
        return replace(member, content=content)
    return replace(member, key=content_key(content))


def listing_of(path: Place, memo: DigestMemo) -> TarListing:
    """What a tar holds, as `list_members` says it; of one in a bucket remembered, so that it is read once for that."""
    if isinstance(path, Path):
        return list_members(path)
    return _unpacked(memo.digest(path, _PART, lambda: _packed(list_members(path))))


def fetch_listings(paths: Sequence[BucketPath], memo: DigestMemo) -> None:
    """Have `memo` know what these tars hold, as far as they are there; all are read at once. Raises StoreError."""
    fetched = dict[BucketPath, bytes]()

    def fetch(path: BucketPath) -> None:
        with suppress(FileNotFoundError):
            fetched[path] = _packed(list_members(path))

    at_once(fetch, [path for path in paths if not memo.remembered(path, _PART)])
    for path in fetched:
        memo.digest(path, _PART, partial(fetched.__getitem__, path))


def _packed(listing: TarListing) -> bytes:
    members = [
        [m.name, m.offset, m.size, m.problem, *(None if part is None else part.hex() for part in (m.content, m.key))]
        for m in listing.members
    ]
    return zlib.compress(json.dumps([listing.damage, members]).encode())


def _unpacked(content: bytes) -> TarListing:
    damage, found = json.loads(zlib.decompress(content))
    members = []
    for name, offset, size, problem, *parts in found:
        text, key = (None if part is None else bytes.fromhex(part) for part in parts)
        members.append(Member(name=name, offset=offset, size=size, problem=problem, content=text, key=key))
    return TarListing(members=members, damage=damage)


def text_of(path: Place, member: Member) -> bytes:
    """The content of a member of a tar; raises InputRejected or StoreError."""
    return content_at(path, member.offset, member.size) if member.content is None else member.content


def image_at(path: Place, offset: int, size: int, key: bytes | None, windows: Windows) -> bytes:
    """`content_at` for the image that has this `key`, as far as it is known; several that follow each other share a
    request. What arrives otherwise is fetched again.
    """
    if key is None or isinstance(path, Path):
        return content_at(path, offset, size)
    for held in [windows, *[None] * (FETCHES - 1)]:
        if content_key(content := content_at(path, offset, size, held)) == key:
            return content
    raise InputRejected("source", "the tar holds something else there than when it was looked through; build again")


def content_at(path: Place, offset: int, size: int, windows: Windows | None = None) -> bytes:
    """`size` bytes of a tar from `offset` on; raises InputRejected or StoreError."""
    try:
        if isinstance(path, Path):
            with path.open("rb") as file:
                file.seek(offset)
                content = file.read(size)
        else:
            content = bytes(path.read_range(offset, size)) if windows is None else windows.read(path, offset, size)
    except StoreError:  # which says nothing of the picture
        raise
    except OSError as error:
        raise InputRejected("source", f"the tar cannot be read: {error.strerror or 'it is gone'}") from error
    if len(content) != size:
        raise InputRejected("source", "the tar has become shorter since it was opened")
    return content


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
