"""Paths in a bucket: of pathlib's names those that caches read by. There are no folders, only names with slashes.

Such a path cannot be opened as a file, on purpose: what reads it must know that each call is a request.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Self

from kcache.places.client import store_of, told


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
        dot = self.name.rpartition(".")
        return f".{dot[2]}" if dot[0] else ""

    @property
    def stem(self) -> str:
        return self.name.removesuffix(self.suffix)

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
        with told(self):
            return bytes(self.store.get(self.key).bytes())

    def read_range(self, start: int, length: int) -> memoryview:
        """`length` bytes from byte `start` on; raises FileNotFoundError or StoreError, also where it is shorter."""
        with told(self):
            return memoryview(self.store.get_range(self.key, start=start, length=length))

    def size(self) -> int:
        """Bytes of the file; raises FileNotFoundError or StoreError."""
        with told(self):
            return int(self.store.head(self.key)["size"])

    def stamp(self) -> str:
        """What is another text once the file has other content; raises FileNotFoundError or StoreError."""
        with told(self):
            found = self.store.head(self.key)
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
        with told(self):
            for batch in self.store.list(f"{self.key}/" if self.key else None):
                for entry in batch:
                    yield type(self)(self.bucket, entry["path"]), int(entry["size"])

    def iterdir(self) -> Iterator[Self]:
        """What stands right below: files, and prefixes of further ones."""
        with told(self):
            found = self.store.list_with_delimiter(f"{self.key}/" if self.key else None)
        names = [*found["common_prefixes"], *(entry["path"] for entry in found["objects"])]
        yield from sorted(type(self)(self.bucket, name.strip("/")) for name in names)

    def glob(self, pattern: str) -> Iterator[Self]:
        """Of `iterdir`, what has a name that `pattern`, without slashes, matches."""
        return (path for path in self.iterdir() if fnmatchcase(path.name, pattern))
