"""Arrays in parts of about a megabyte, each verified when it is first touched: files of any size are open at once.

A folder holds `NAME.npy` of each array and `parts.json`, by whose sha256 the folder is known: where the rows begin, how
many a part has, and the crc32c of each part, that of the first with the bytes before the rows.
"""

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kcache.disk.durable import new_file, writing
from kcache.disk.filesystems import mapped
from kcache.errors import CacheCorruptError
from kcache.places import Place
from kcache.places.fetching import FETCHES, at_once
from kcache.store.formats.checksums import crc32c

PARTS = "parts.json"
_PART_BYTES = 1 << 20
_TOGETHER = 8
"""Parts, one behind the other, that are fetched by one request."""


class Rows(NamedTuple):
    """An array to be written, which need not be in memory as a whole."""

    dtype: np.dtype[Any]
    length: int
    runs: Iterable[np.ndarray]
    """The rows, in order, as arrays of any lengths."""


def in_memory(array: np.ndarray) -> Rows:
    """An array as it is, as rows to be written."""
    return Rows(array.dtype, len(array), [array])


def write_rows(path: Path, rows: Rows) -> None:
    """Write a .npy file, as `np.save` would; raises CacheWriteError."""
    header = {"descr": np.lib.format.dtype_to_descr(rows.dtype), "fortran_order": False, "shape": (rows.length,)}
    with writing(path, rows.length * rows.dtype.itemsize), new_file(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for run in rows.runs:
            file.write(np.ascontiguousarray(run).view(np.uint8).data)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parted:
    """What is known of an array beforehand."""

    begins: int
    """Bytes before its first row."""
    rows: int
    rows_per_part: int
    """A power of two."""
    crc32c: tuple[int, ...]
    borders: tuple[int, ...]
    """Of an array of numbers the first of each part and the last of all; () of others."""
    lengths: Mapping[str, int]
    """Of an array of entries, by field, the lengths of all rows together; {} of others."""


def list_parts(folder: Path, names: Iterable[str]) -> bytes:
    """The content of the `parts.json` of a folder with these arrays."""
    listed = {name: asdict(_parted(folder / f"{name}.npy")) for name in names}
    return json.dumps({"arrays": listed}, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def _parted(path: Path) -> Parted:
    array = np.lib.format.open_memmap(path, mode="r")
    begins, rows_per_part = array.offset, 1 << max(0, (_PART_BYTES // array.itemsize).bit_length() - 1)
    content, step = np.frombuffer(mapped(path), np.uint8), rows_per_part * array.itemsize
    ends = [*range(begins + step, content.size, step), content.size]
    sums = tuple(crc32c(content[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True))
    numbers = array.dtype.kind == "i" and len(array) > 0
    borders = tuple(array[[*range(0, len(array), rows_per_part), -1]].tolist()) if numbers else ()
    fields = [name for name in array.dtype.names or () if array.dtype[name].names]
    lengths = {name: int(array[name]["length"].sum(dtype=np.int64)) for name in fields}
    return Parted(
        begins=begins, rows=len(array), rows_per_part=rows_per_part, crc32c=sums, borders=borders, lengths=lengths
    )


def read_parts(content: bytes, digest: str) -> dict[str, Parted]:
    """What a `parts.json` says, if `digest` is its sha256 (hex); raises ValueError, or what foreign data raises."""
    found = hashlib.sha256(content).hexdigest()
    if found != digest:
        raise ValueError(f"the sha256 of its {PARTS} is {found[:16]}, the manifest says {digest[:16]}")
    return {name: _checked(name, values) for name, values in json.loads(content)["arrays"].items()}


def _checked(name: str, values: Mapping[str, Any]) -> Parted:
    parted = Parted(**{**values, "crc32c": tuple(values["crc32c"]), "borders": tuple(values["borders"])})
    numbers = [parted.begins, parted.rows, parted.rows_per_part, *parted.crc32c]
    numbers += [*parted.borders, *parted.lengths.values()]
    if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
        raise ValueError(f"{PARTS} says of {name} what are no numbers")
    step, parts = parted.rows_per_part, len(parted.crc32c)
    if not step or step & (step - 1) or parts != max(1, -(-parted.rows // step)):
        raise ValueError(f"{PARTS} says that {name} has {parted.rows} rows in {parts} parts of {step}")
    return parted


class Parts:
    """An array in parts: what is asked of it comes as of a numpy array, each part verified when it is first touched.

    Raises CacheCorruptError for a part that is not what was written. Any number of threads may ask at once.
    """

    def __init__(
        self,
        path: Place,
        kept: Path,
        dtype: np.dtype[Any],
        parted: Parted,
        check: Callable[[int, np.ndarray], None],
        do: str,
    ) -> None:
        """`kept` is `path`, or the file of this machine into which its parts are fetched.

        `check` raises ValueError for rows of a part that cannot be right; `do` says what to do then. Raises OSError, or
        ValueError for a file of another size.
        """
        self.path = path
        self.dtype = dtype
        self.parted = parted
        self._kept, self._check, self._do = kept, check, do
        self._shift = parted.rows_per_part.bit_length() - 1
        size = parted.begins + parted.rows * dtype.itemsize
        if path != kept:
            _make_room(kept, size)
        elif (found := kept.stat().st_size) != size:
            raise ValueError(f"{path.name} has {found} bytes instead of {size}")
        self._map = mapped(kept)
        self._content = np.frombuffer(self._map, np.uint8)
        self._array = np.frombuffer(self._content, dtype, parted.rows, parted.begins)
        self._sound = np.zeros(len(parted.crc32c), np.bool_)
        self._whole = False

    def __len__(self) -> int:
        return self.parted.rows

    @property
    def shape(self) -> tuple[int]:
        return (self.parted.rows,)

    @property
    def nbytes(self) -> int:
        return self._array.nbytes

    @property
    def unread(self) -> int:
        """Bytes of the parts that nobody has asked for yet."""
        return int((~self._sound).sum()) * self.dtype.itemsize << self._shift

    def __getitem__(self, rows: Any) -> Any:
        if not self._whole:
            self._touch(rows)
        return self._array[rows]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.whole(), dtype, copy=copy)

    def whole(self) -> np.ndarray:
        """All of it, verified."""
        if not self._whole:
            self._verify(np.flatnonzero(~self._sound))
        return self._array

    def _touch(self, rows: Any) -> None:
        if isinstance(rows, slice):
            first, last, step = rows.indices(len(self))
            asked = range(first, last, step)
            ends = sorted((asked[0], asked[-1])) if asked else (0, -1)
            parts = np.arange(ends[0] >> self._shift, (ends[1] >> self._shift) + 1)
        elif isinstance(rows, str) or (numbers := np.asarray(rows)).dtype == np.bool_ or not len(self):
            parts = np.arange(len(self._sound))
        else:
            parts = np.atleast_1d(numbers % len(self)) >> self._shift
        if len(missing := parts[~self._sound[parts]]):
            self._verify(np.unique(missing))

    def _verify(self, parts: np.ndarray) -> None:
        self._will_need(parts)
        wrong = [part for part in parts.tolist() if not self._is_sound(part, self._content[self._span(part)])]
        if wrong and self.path == self._kept:
            raise self._corrupt(wrong[0], "its bytes are not those that were written")
        if wrong:
            at_once(self._fetch, _runs(wrong))
        for part in parts.tolist():
            try:
                self._check(part, self._array[part << self._shift : (part + 1) << self._shift])
            except ValueError as error:
                raise self._corrupt(part, str(error)) from error
        self._sound[parts] = True
        self._whole = bool(self._sound.all())

    def _will_need(self, parts: np.ndarray) -> None:
        """Have the disk read all of them at once: else each page that is not in memory is waited for alone."""
        if len(parts) > 1 and hasattr(mmap, "MADV_WILLNEED"):
            for part in parts.tolist():
                span = self._span(part)
                start = span.start // mmap.PAGESIZE * mmap.PAGESIZE
                self._map.madvise(mmap.MADV_WILLNEED, start, span.stop - start)

    def _span(self, part: int) -> slice:
        """The bytes of a part."""
        start, size = self.parted.begins, self.dtype.itemsize << self._shift
        return slice(start + part * size if part else 0, min(start + (part + 1) * size, self._content.size))

    def _is_sound(self, part: int, content: np.ndarray) -> bool:
        return crc32c(content) == self.parted.crc32c[part]

    def _fetch(self, run: range) -> None:
        """Fetch parts that stand behind each other, and keep them."""
        first, last = self._span(run[0]).start, self._span(run[-1]).stop
        for _ in range(FETCHES):
            content = np.frombuffer(self.path.read_range(first, last - first), np.uint8)  # type: ignore[union-attr]
            spans = ((part, self._span(part)) for part in run)
            wrong = [p for p, span in spans if not self._is_sound(p, content[span.start - first : span.stop - first])]
            if not wrong:
                break
        else:
            raise self._corrupt(wrong[0], f"fetched {FETCHES} times, its bytes are not those that were written")
        with writing(self._kept, last - first), self._kept.open("r+b") as file:
            os.pwrite(file.fileno(), content.data, first)

    def _corrupt(self, part: int, detail: str) -> CacheCorruptError:
        span = self._span(part)
        return CacheCorruptError(
            f"{self.path} is corrupt in part {part}, the bytes {span.start:,} to {span.stop:,}: {detail}; {self._do}"
        )


def _make_room(path: Path, size: int) -> None:
    """Make sure that there is a file of `size` bytes; those that nothing was written to take no room."""
    with writing(path, size):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            if os.fstat(file.fileno()).st_size != size:
                os.ftruncate(file.fileno(), size)


def _runs(parts: list[int]) -> list[range]:
    """Parts, ascending, as runs that are fetched together."""
    runs: list[range] = []
    for part in parts:
        if runs and part == runs[-1].stop and len(runs[-1]) < _TOGETHER:
            runs[-1] = range(runs[-1].start, part + 1)
        else:
            runs.append(range(part, part + 1))
    return runs
