"""Paths in a bucket: of pathlib's names those that caches read by. There are no folders, only names with slashes.

Such a path cannot be opened as a file, on purpose: what reads it must know that each call is a request.
"""

import errno
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any, Self

from kcache.errors import StoreError
from kcache.places.client import ask, ask_again, store_of

_TRIES = 8
"""How often a file is fetched that does not arrive as it was sent."""
_MD5 = re.compile("[0-9a-f]{32}")


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@dataclass(frozen=True, slots=True, order=True)
class BucketPath:
    """A file in an object store, or what stands below a prefix; `str` gives its URL."""

    bucket: str
    """Scheme and name: "s3://pictures"."""
    key: str
    """Its name in the bucket, without slashes at either end; "" for the bucket itself."""

    @classmethod
    def of(cls, url: str) -> Self:
        """The path that "s3://bucket/some/key" means."""
        scheme, _, rest = url.partition("://")
        bucket, _, key = rest.partition("/")
        return cls(f"{scheme.lower()}://{bucket}", "/".join(part for part in key.split("/") if part))

    def __str__(self) -> str:
        return f"{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, name: str) -> Self:
        return type(self)(self.bucket, f"{self.key}/{name}".strip("/"))

    @property
    def store(self) -> Any:
        """The obstore store that `key` is a name in."""
        return store_of(self.bucket)

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem

    @property
    def parent(self) -> Self:
        return type(self)(self.bucket, self.key.rpartition("/")[0])

    def joinpath(self, *names: str) -> Self:
        return self / "/".join(names)

    def as_posix(self) -> str:
        return str(self)

    def absolute(self) -> Self:
        return self

    def resolve(self) -> Self:
        return self

    def read_bytes(self) -> bytes:
        """All of the file; raises FileNotFoundError or StoreError."""
        return self.read_whole()[0]

    def read_whole(self) -> tuple[bytes, Any]:
        """All of the file, and what the store says of it; raises as `read_bytes` does.

        Where the store's tag is a digest, bytes that were changed on their way are fetched again. A tag that looks like
        one and is none, as of files that are encrypted there, costs a second request: what comes twice is so.
        """

        def request() -> tuple[bytes, Any]:
            found = self.store.get(self._file)
            return bytes(found.bytes()), found.meta

        before: bytes | None = None
        for _ in range(_TRIES):
            content, meta = ask(self, request)
            tag = (meta["e_tag"] or "").strip('"')
            if content == before or _MD5.fullmatch(tag) is None or tag == _md5(content):
                return content, meta
            before = content
        raise StoreError(f"{self} is another one each time it is read; expected one content; check the network")

    def read_range(self, start: int, length: int) -> memoryview:
        """`length` bytes from byte `start` on, fewer where the file ends before; raises as `read_bytes` does."""
        if length == 0:
            return memoryview(b"")
        try:
            return memoryview(ask(self, lambda: self.store.get_range(self._file, start=start, length=length)))
        except StoreError:
            if self.size() <= start:
                return memoryview(b"")
            raise

    def size(self) -> int:
        """Bytes of the file; raises FileNotFoundError or StoreError."""
        return int(ask(self, lambda: self.store.head(self._file))["size"])

    @property
    def _file(self) -> str:
        """`key`; raises FileNotFoundError for the bucket, of which stores give a listing like a file."""
        if not self.key:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return self.key

    def stamp(self) -> str:
        """What is another text once the file has other content; raises FileNotFoundError or StoreError."""
        found = ask(self, lambda: self.store.head(self._file))
        return f"{found['size']} {found['e_tag'] or found['last_modified']}"

    def is_file(self) -> bool:
        try:
            self.size()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        return next(iter(self.below()), None) is not None

    def is_symlink(self) -> bool:
        return False

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def below(self) -> Iterator[tuple[Self, int]]:
        """Every file below this prefix, with its size in bytes, in order of name."""
        last: str | None = None
        pages: list[Any] = []

        def next_page() -> Any:
            stream = pages.pop() if pages else self.store.list(self._prefix, offset=last)
            page = next(stream, None)
            pages.append(stream)  # it goes on, unless it broke off
            return page

        while page := ask_again(self, next_page):
            for entry in page:
                if entry["path"] != self.key:  # an empty file that some tools make for a folder
                    yield type(self)(self.bucket, entry["path"]), int(entry["size"])
            last = page[-1]["path"]

    def iterdir(self) -> Iterator[Self]:
        """What stands right below: files, and prefixes of further ones."""
        found = self.listing()
        names = {*found["common_prefixes"], *(entry["path"] for entry in found["objects"])} - {self.key}
        yield from sorted(type(self)(self.bucket, name.strip("/")) for name in names)

    def listing(self) -> Any:
        """What obstore says of what stands right below: its "objects", and the "common_prefixes" of further ones."""
        return ask_again(self, lambda: self.store.list_with_delimiter(self._prefix))

    @property
    def _prefix(self) -> str | None:
        return f"{self.key}/" if self.key else None

    def glob(self, pattern: str) -> Iterator[Self]:
        """Of `iterdir`, what has a name that `pattern`, without slashes, matches."""
        return (path for path in self.iterdir() if fnmatchcase(path.name, pattern))
