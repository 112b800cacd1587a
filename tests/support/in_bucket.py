"""Local folders and files put into an object store file by file, as any tool does."""

from pathlib import Path

from kcache.places import Place, place_of
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


def contents(folder: Place) -> dict[str, bytes]:
    """The content of all files below a folder of either form, by their path from there."""
    if isinstance(folder, Path):
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {path.key.removeprefix(f"{folder.key}/"): path.read_bytes() for path, _ in folder.below()}


def damage(file: BucketPath, at: int) -> None:
    """Change one bit of a file."""
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    write_bytes(file, bytes(content))
