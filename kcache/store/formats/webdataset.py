"""Joined samples in plain tar files, as `webdataset.WebDataset` and `datasets.load_dataset("webdataset")` read them.

The members of a sample stand together: `{id}.json`, `{id}.txt` with its caption, and a `{id}.{field}.npy` per row, or
a `{id}.{field}.png` where rows are packed images. Captions after the first are `{id}.1.txt`, `{id}.text_embeds.1.npy`
and so on. Owner, group and times are fixed, so equal samples give equal bytes. kcache reads rows at the offsets in the
side files and never parses a tar.
"""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kcache.disk.durable import new_file
from kcache.store.recipe import Field

_HEADER_BYTES = 512
"""A tar header; names are short enough never to need a second one."""


def field_file(data: str, field: Field) -> str:
    """The tar itself holds every field."""
    return data


def pieces(unit_bytes: int) -> tuple[int, int]:
    """A row's payload in a tar is never interrupted."""
    return 1 << 62, 0


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinedSample:
    """One sample with all its rows."""

    id: str
    captions: tuple[str, ...]
    info: Mapping[str, Any]
    """What `{id}.json` says."""
    rows: Mapping[str, Sequence[np.ndarray]]
    """Per member name: the row, or for a text field a row per caption."""


def write_tar(path: Path, samples: Iterable[JoinedSample]) -> list[dict[str, list[int]]]:
    """Write `samples` into the new file `path`, synced.

    Returns, per sample and member name, the offset in the file of each row's payload, in bytes.
    """
    placed = []
    with new_file(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            _add(tar, f"{sample.id}.json", json.dumps(sample.info, sort_keys=True, ensure_ascii=False).encode())
            for number, caption in enumerate(sample.captions):
                _add(tar, _member(sample.id, "", number, "txt"), caption.encode("utf-8"))
            placed.append(
                {
                    name: [
                        _add_row(tar, _member(sample.id, name, number, suffix_of(row.dtype)), row)
                        for number, row in enumerate(rows)
                    ]
                    for name, rows in sample.rows.items()
                }
            )
    return placed


def _member(sample_id: str, name: str, number: int, suffix: str) -> str:
    return ".".join(part for part in (sample_id, name, str(number) if number else "", suffix) if part)


def suffix_of(dtype: "np.dtype[Any]") -> str:
    """What kind of file a row of this dtype is: bytes are those of a packed image, all others numbers."""
    return "png" if dtype == np.uint8 else "npy"


def _add_row(tar: tarfile.TarFile, name: str, row: np.ndarray) -> int:
    if row.dtype == np.uint8:
        return _add(tar, name, row.tobytes())
    content = io.BytesIO()
    np.save(content, row, allow_pickle=False)
    start = _add(tar, name, content.getvalue())
    return start + content.tell() - row.nbytes


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> int:
    """Add a member; returns the offset of its content in the file."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    info.mode, info.mtime, info.uid, info.gid, info.uname, info.gname = 0o444, 0, 0, 0, "", ""
    start = int(tar.offset) + _HEADER_BYTES  # where the member's header will start
    tar.addfile(info, io.BytesIO(content))
    return start
