"""The samples of a cache: one image with its captions each, kept in a parquet file for people and tools.

Trainers never read it: they use the index. Ids are the image's key in hex, with "-2", "-3", … for further samples of
the same image, so an id says which picture it is and stays when others come or go.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kcache.durable import write_bytes
from kcache.errors import CacheCorruptError
from kcache.manifest import Manifest
from kcache.recipe import canonical_json

if TYPE_CHECKING:
    import pyarrow

__all__ = ["Sample", "read_samples", "sample_ids", "samples_digest", "write_samples"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One image with its captions."""

    id: str
    name: str
    """Where it came from: the source's name for it."""
    image_key: bytes
    captions: tuple[str, ...]
    caption_keys: tuple[bytes, ...]
    width: int
    """Pixels, as seen: after EXIF orientation."""
    height: int


def sample_ids(image_keys: Sequence[bytes]) -> list[str]:
    """One id per sample, unique: the image's key in hex, then "-2", "-3", … where the same image comes again."""
    seen: dict[bytes, int] = {}
    ids = []
    for key in image_keys:
        seen[key] = count = seen.get(key, 0) + 1
        ids.append(key.hex() if count == 1 else f"{key.hex()}-{count}")
    return ids


def samples_digest(samples: Sequence[Sample]) -> str:
    """sha256 (hex) of what the samples are, in order: ids, names and caption keys."""
    digest = hashlib.sha256()
    for sample in samples:
        line = [sample.id, sample.name, [key.hex() for key in sample.caption_keys]]
        digest.update(canonical_json(line).encode() + b"\n")
    return digest.hexdigest()


def write_samples(cache: Path, samples: Sequence[Sample]) -> str:
    """Write the samples under the name that their digest gives; returns the digest."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    digest = samples_digest(samples)
    path = cache / f"samples-{digest[:16]}.parquet"
    if not path.exists():
        columns = {
            "id": pa.array([s.id for s in samples], pa.string()),
            "name": pa.array([s.name for s in samples], pa.string()),
            "image_key": pa.array([s.image_key for s in samples], pa.binary(16)),
            "captions": pa.array([list(s.captions) for s in samples], pa.list_(pa.string())),
            "caption_keys": pa.array([list(s.caption_keys) for s in samples], pa.list_(pa.binary(16))),
            "width": pa.array([s.width for s in samples], pa.int32()),
            "height": pa.array([s.height for s in samples], pa.int32()),
        }
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns), buffer, compression="zstd")
        write_bytes(path, buffer.getvalue())
    return digest


def read_samples(cache: Path, manifest: Manifest) -> "pyarrow.Table":
    """The samples as an Arrow table, in the cache's order; raises CacheCorruptError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = cache / manifest.samples_file
    try:
        table = pq.read_table(path, memory_map=False)
    except (OSError, pa.ArrowInvalid) as error:
        raise CacheCorruptError(f"{path} cannot be read ({error}); build the cache again to write it anew") from error
    if len(table) != manifest.samples:
        raise CacheCorruptError(f"{path} has {len(table)} samples; the manifest says {manifest.samples}; build again")
    return table
