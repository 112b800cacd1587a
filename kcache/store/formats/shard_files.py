"""The files of a shard: made in a folder of their own, and published under names that say what is in them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kcache.places import Place
from kcache.places.effects import publish
from kcache.store.formats.checksums import file_sums
from kcache.store.recipe import json_digest

DRAFT = "shard"
"""What names of a shard's files begin with, in the place of its number and their digest, while they are made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CommittedFile:
    """A file of a shard as it was committed."""

    path: str
    """Relative to the table's folder."""
    bytes: int
    crc32c: int


def publish_shard(temporary: Path, folder: Place, name: str) -> tuple[str, Sequence[CommittedFile]]:
    """Put the files of shard `name`, made in `temporary` under names that begin with DRAFT, into `folder`.

    Returns what their names begin with there, the number and a digest of them all, and the files. Who was killed here
    left files with the same content under these names, or no part of any shard.
    """
    found = _sums(temporary)
    stem = name + _content_name(found)
    for path in sorted(temporary.iterdir()):
        publish(path, folder / (stem + path.name.removeprefix(DRAFT)))
    temporary.rmdir()
    files = ((stem + behind, size, checksum) for behind, (size, checksum, _) in sorted(found.items()))
    return stem, [CommittedFile(path=path, bytes=size, crc32c=checksum) for path, size, checksum in files]


def content_name(temporary: Path) -> str:
    """What stands behind a shard's number in the names of its files, which lie in `temporary` as in `publish_shard`."""
    return _content_name(_sums(temporary))


def _sums(temporary: Path) -> dict[str, tuple[int, int, str]]:
    made = [path for path in temporary.rglob("*") if path.is_file()]
    return {path.relative_to(temporary).as_posix().removeprefix(DRAFT): file_sums(path) for path in made}


def _content_name(sums: Mapping[str, tuple[int, int, str]]) -> str:
    return f"-{json_digest(sorted([behind, sha256] for behind, (_, _, sha256) in sums.items()))[:16]}"
