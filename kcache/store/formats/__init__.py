"""The two forms of a cache on disk. Reading asks only where rows stand, by one small protocol that both fulfil.

- `zarr`: groups of arrays, as `shards` writes them
- `webdataset`: tars of whole samples, as a build writes them when all rows are there
- `checksums`: crc32c
- `shard_files`: the files of a shard, published under names that say what is in them
- `side_files`: what stands beside the data of both
- `columns`: samples, many of them without a Python object each
- `sample_extras`: columns of them that few say anything by
- `records`: what is kept in columns, in memory or in a mapped file
- `parts`: the arrays of an index, each part verified when it is first touched
- `index_files`: those arrays, written, opened and checked
- `chosen`: what of them some samples use
"""

from typing import Protocol

from kcache.store.formats import webdataset, zarr
from kcache.store.recipe import Field

__all__ = ["FORMATS", "Format", "format_of"]

FORMATS = ("zarr", "webdataset")


class Format(Protocol):
    """Where in a shard's files the rows stand."""

    def field_file(self, data: str, field: Field) -> str:
        """Path of the file that holds `field`, given the path of the shard's data."""
        ...

    def pieces(self, unit_bytes: int) -> tuple[int, int]:
        """Payload bytes after which a checksum follows, and its size; `unit_bytes` is the size of a row or token."""
        ...


def format_of(data: str) -> Format:
    """The form of a shard, told by the name of its data: a tar is webdataset, a folder zarr."""
    return webdataset if data.endswith(".tar") else zarr
