"""Damage done to the files of a cache, and what of it goes unnoticed: for the tests and for benchmarks/integrity.py."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kcache import Cache
from kcache.build.dataset_card import CARD
from kcache.errors import KcacheError
from kcache.loader import CacheLoader
from kcache.loader.chance import epoch_order
from kcache.store.shards import OFFSETS
from kcache.upkeep.verify import verify_cache

FIELDS = ["image_embeds", "latents", "text_embeds", "text_encoder_hidden_states"]
RAGGED = FIELDS[-1]
CUT_BYTES = 64
KINDS = {
    "manifest.json": "manifest",
    "rejected.jsonl": "rejections",
    "zarr.json": "zarr metadata",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One file as damage leaves it; None where it is gone."""

    path: str
    what: str
    content: bytes | None


def file_kind(path: str) -> str:
    """What a file of a cache is, given its path."""
    name = path.rpartition("/")[2]
    if path.startswith("index-"):
        return "index"
    if name.endswith(".rows.npy"):
        return "side file"
    if name.endswith(".parquet"):
        return "samples"
    if name.endswith(".tar"):
        return "tar"
    return KINDS.get(name) or ("commit record" if name.endswith(".json") else "zarr array")


def _files(cache: Path) -> dict[str, bytes]:
    """Every file but the card, which is for people: its owner may change or remove it."""
    files = (path for path in sorted(cache.rglob("*")) if path.is_file() and path != cache / CARD)
    return {path.relative_to(cache).as_posix(): path.read_bytes() for path in files}


def flips(cache: Path, count: int, seed: int) -> Iterator[Fault]:
    """`count` changes of one bit or of one byte, as many in each kind of file."""
    rng = random.Random(seed)
    files = {path: content for path, content in _files(cache).items() if content}
    by_kind: dict[str, list[str]] = {}
    for path in files:
        by_kind.setdefault(file_kind(path), []).append(path)
    for number in range(count):
        kind = sorted(by_kind)[number % len(by_kind)]
        [path] = rng.choices(by_kind[kind], [len(files[path]) for path in by_kind[kind]])
        content = bytearray(files[path])
        position = rng.randrange(len(content))
        change = 1 << rng.randrange(8) if rng.random() < 0.5 else rng.randrange(1, 256)
        content[position] ^= change
        yield Fault(path=path, what=f"byte {position} ^ {change:#04x}", content=bytes(content))


def cuts(cache: Path) -> Iterator[Fault]:
    """Every file cut after each 64 bytes, 0 included."""
    for path, content in _files(cache).items():
        for size in range(0, len(content), CUT_BYTES):
            yield Fault(path=path, what=f"cut to {size} bytes", content=content[:size])


def losses(cache: Path) -> Iterator[Fault]:
    """Every file removed, and every file with anything in it emptied."""
    for path, content in _files(cache).items():
        yield Fault(path=path, what="removed", content=None)
        if content:
            yield Fault(path=path, what="emptied", content=b"")


class Sweep:
    """Puts faults into a cache one by one and reads it in every way; `silent` lists what went unnoticed."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._original = _files(cache)
        self._expected = _read(cache)
        self._loads = 0
        self.silent: list[str] = []
        self.caught: dict[str, dict[str, int]] = {}
        """By kind of file: faults, and how many reading and verifying noticed."""
        if verify_cache(cache).corrupt:
            raise ValueError(f"{cache} is corrupt already")

    def put(self, fault: Fault, *, loader: bool = True) -> None:
        """Damage the cache, read and verify it, and mend it again.

        Reading may give the right values, where the fault is in what reading does not use; verifying must notice.
        """
        counts = self.caught.setdefault(file_kind(fault.path), {"faults": 0, "by reading": 0, "by verifying": 0})
        counts["faults"] += 1
        with self._damaged(fault):
            reads = [("Cache.read", _read)] + ([("CacheLoader", self._load)] if loader else [])
            outcomes = [self._outcome(read) for _, read in reads]
            noticed = _noticed(self._cache)
        counts["by reading"] += outcomes[0] == "noticed"
        counts["by verifying"] += noticed
        self.silent += [
            f"{fault.path}, {fault.what}: {name} gave other values"
            for (name, _), outcome in zip(reads, outcomes, strict=True)
            if outcome == "wrong"
        ]
        if not noticed:
            self.silent.append(f"{fault.path}, {fault.what}: verify found nothing")

    @contextmanager
    def _damaged(self, fault: Fault) -> Iterator[None]:
        path = self._cache / fault.path
        if fault.content is None:
            path.unlink()
        else:
            path.write_bytes(fault.content)
        try:
            yield
        finally:
            path.write_bytes(self._original[fault.path])

    def _outcome(self, read: Callable[[Path], dict[str, Any]]) -> str:
        try:
            found = read(self._cache)
        except KcacheError:
            return "noticed"
        same = all(_equal(found[name], self._expected[name]) for name in found)
        return "right" if same else "wrong"

    def _load(self, cache: Path) -> dict[str, Any]:
        """All rows as the loader gives them, put back into the samples' order."""
        opened = Cache.open(cache)
        [batch] = CacheLoader(opened, FIELDS, len(opened), residency=self._residency())
        rows = {name: tensor.numpy() for name, tensor in batch.items()}
        order = np.argsort(epoch_order(0, 0, len(opened), "full"))
        tokens = np.split(rows.pop(RAGGED), rows.pop(OFFSETS)[1:-1])
        rows = {name: array[order] for name, array in rows.items()}
        return {**rows, RAGGED: np.concatenate([tokens[i] for i in order])}

    def _residency(self) -> str:
        """Each in turn."""
        self._loads += 1
        return ("mmap", "ram")[self._loads % 2]


def _read(cache: Path) -> dict[str, Any]:
    """Everything that a cache gives: all rows of all fields, and what it says of its samples."""
    opened = Cache.open(cache)
    rows: dict[str, Any] = dict(opened.read(range(len(opened)), FIELDS))
    return {**rows, "samples": opened.samples.to_pylist(), "fingerprint": opened.fingerprint}


def _equal(found: Any, expected: Any) -> bool:
    if isinstance(found, np.ndarray):
        return found.dtype == expected.dtype and np.array_equal(found, expected)
    return bool(found == expected)


def _noticed(cache: Path) -> bool:
    try:
        return verify_cache(cache).corrupt
    except KcacheError:
        return True
