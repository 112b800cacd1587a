"""Local folders and files put into an object store file by file, as any tool does."""

from pathlib import Path

from kcache.places import place_of
from kcache.places.bucket import BucketPath
from kcache.places.effects import write_bytes


def put(local: Path, url: str) -> BucketPath:
    """Copy a file or folder of this machine to a URL; returns the place there."""
    place = place_of(url)
    assert isinstance(place, BucketPath)
    if local.is_file():
        write_bytes(place, local.read_bytes())
    else:
        for path in sorted(path for path in local.rglob("*") if path.is_file()):
            write_bytes(place / path.relative_to(local).as_posix(), path.read_bytes())
    return place


def damage(file: BucketPath, at: int) -> None:
    """Change one bit of a file."""
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    write_bytes(file, bytes(content))
