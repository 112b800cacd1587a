"""Datasets of rows: parquet files, folders written by `save_to_disk`, and datasets of the Hugging Face Hub."""

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from kcache.errors import InputRejected, SourceError
from kcache.foreign import told
from kcache.sources.arrow_files import (
    ArrowStream,
    HeldImages,
    Images,
    ParquetFile,
    RowFile,
    decode_captions,
    is_caption_type,
    is_image_type,
)
from kcache.sources.protocol import Request, refusals
from kcache.sources.reading import MAX_IMAGE_BYTES, caption_tuple, locate, read_file, readable
from kcache.store.digests import KEY_BYTES, DigestMemo, content_key
from kcache.store.samples import Refusal

_NO_BYTES = bytes(KEY_BYTES)
"""Stands for the key of a row that holds no image bytes, in the memo; no content has this key."""

SAVED_DATASET_NAMES = ("dataset_dict.json", "state.json")
"""Files that only `save_to_disk` writes: the first for several splits, the second for one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One file of the table, and what its rows are called."""

    file: RowFile
    label: str
    first_row: int
    """Number of the file's first row in names: 0 for a file that is named itself, else its place in the dataset."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSource:
    """Rows of a dataset, in its order; a `Source`. Rows are numbered from 0."""

    description: str
    refused: tuple[Refusal, ...]
    parts: Sequence[_Part]
    samples: Sequence[tuple[int, int, tuple[str, ...]]]
    """Index of the part, row in its file, captions."""
    images: HeldImages
    roots: tuple[Path, ...]
    """Real, absolute folders in which an image may lie that a row only gives the path of; the first is its base."""
    keys: dict[tuple[int, int, bool], bytes] = field(default_factory=dict)
    """Keys of the images of a chunk (16 bytes each), by part, chunk and whether they were digested afresh."""

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, i: int) -> str:
        part, row, _ = self.samples[i]
        return _row_name(self.parts[part], row)

    def captions(self, i: int) -> tuple[str, ...]:
        return self.samples[i][2]

    def image(self, i: int) -> bytes:
        part, chunk, row = self._place(i)
        images = self._images(part, chunk)
        content = images.content(row)
        return read_file(self._image_path(images, row), MAX_IMAGE_BYTES) if content is None else content

    def image_key(self, i: int, memo: DigestMemo, rehash: bool) -> bytes:
        part, chunk, row = self._place(i)
        try:
            key = self._chunk_keys(part, chunk, memo, rehash)[row * KEY_BYTES : (row + 1) * KEY_BYTES]
            if key != _NO_BYTES:
                return key
            path = self._image_path(self._images(part, chunk), row)
            return memo.digest(path, "content_key", lambda: content_key(self.image(i)), rehash)
        except OSError as error:
            raise InputRejected("source", f"cannot be read: {error.strerror}") from error

    def _chunk_keys(self, part: int, chunk: int, memo: DigestMemo, rehash: bool) -> bytes:
        # Chunk by chunk, because a file's one stat then answers for all of its rows, and a chunk is read only once.
        keys = self.keys.get((part, chunk, rehash))
        if keys is None:
            file = self.parts[part].file
            name = f"content_key of each row of column {self.images.column!a}, chunk {chunk}"
            keys = memo.digest(file.path, name, lambda: _digest(self._images(part, chunk)), rehash)
            self.keys[part, chunk, rehash] = keys
        return keys

    def _place(self, i: int) -> tuple[int, int, int]:
        """Part and chunk of sample `i`, and its row in the chunk."""
        part, row, _ = self.samples[i]
        starts = self.parts[part].file.starts
        chunk = bisect_right(starts, row) - 1
        return part, chunk, row - starts[chunk]

    def _images(self, part: int, chunk: int) -> Images:
        try:
            return self.images.read(self.parts[part].file, chunk)
        except (pa.ArrowException, OSError) as error:
            raise InputRejected("source", f"{self.parts[part].label} cannot be read: {error}") from error

    def _image_path(self, images: Images, row: int) -> Path:
        path = images.path(row)
        if path is None:
            raise InputRejected("source", f"no image in column {self.images.column!a} of this row")
        return locate(path, self.roots[0], self.roots)


def open_parquet(root: Path, paths: Sequence[str], refused: Mapping[str, str], request: Request) -> TableSource:
    """Open parquet files given relative to a folder; raises SourceError when they offer no sample."""
    files = [(readable(path), root / path) for path in paths]
    return _open_rows("parquet", str(root), ParquetFile, files, [root], request, reasons=refused)


def open_saved_dataset(folder: Path, request: Request) -> TableSource:
    """Open what `save_to_disk` wrote, of several splits the one called train; raises SourceError."""
    root = folder.resolve()
    label = "dataset"
    if (root / "dataset_dict.json").exists():
        splits = _read_json(root / "dataset_dict.json").get("splits")
        if not isinstance(splits, list) or "train" not in splits:
            raise SourceError(
                f"{folder} holds the splits {splits!a}; expected one called train; give one split's folder"
            )
        root, label = root / "train", "train"
    files = []
    for entry in _data_files(root / "state.json"):
        try:
            files.append((label, locate(entry, root, [root])))
        except InputRejected as rejection:
            raise SourceError(
                f"{root}: data file {entry!a} of state.json is missing or unsafe: {rejection.reason}; "
                "expected a folder as save_to_disk writes it; write it again"
            ) from rejection
    return _open_rows("saved dataset", str(root), ArrowStream, files, [root], request, numbered_through=True)


def open_hub_dataset(name: str, request: Request) -> TableSource:
    """Download the train split of a Hub dataset into the user's Hugging Face cache and open it; raises SourceError."""
    # Imported here, because it takes a second that no other source needs.
    import datasets
    import huggingface_hub.constants

    what = f"{name!r} is no folder or file here, and the Hub dataset of that name cannot be loaded"
    do = "expected a path that exists or the id of a dataset with a train split; correct it, or go online"
    with told(SourceError, what, do):
        dataset = datasets.load_dataset(name, split="train", keep_in_memory=False)
    files = [(name, Path(cached["filename"])) for cached in dataset.cache_files]
    caches = [datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE]
    roots = [Path(cache).resolve() for cache in caches]
    return _open_rows("Hub dataset", name, ArrowStream, files, roots, request, numbered_through=True)


def _open_rows(
    kind: str,
    place: str,
    reader: Callable[[Path], RowFile],
    files: Sequence[tuple[str, Path]],
    roots: Sequence[Path],
    request: Request,
    *,
    numbered_through: bool = False,
    reasons: Mapping[str, str] | None = None,
) -> TableSource:
    parts: list[_Part] = []
    samples: list[tuple[int, int, tuple[str, ...]]] = []
    reasons = dict(reasons or {})
    first_row = 0
    for label, path in files:
        if len(samples) == request.max_train_samples:
            break
        try:
            part = _Part(file=reader(path), label=label, first_row=first_row)
            _check_columns(part.file, request)
            parts.append(part)
            for row, cell in _caption_cells(part.file, request):
                if len(samples) == request.max_train_samples:
                    break
                try:
                    samples.append((len(parts) - 1, row, caption_tuple(cell, needed=request.need_captions)))
                except InputRejected as rejection:
                    reasons[_row_name(part, row)] = rejection.reason
        except (pa.ArrowException, OSError) as error:
            raise SourceError(f"{path} cannot be read: {error}; expected a whole file; write it again") from error
        if numbered_through:
            first_row += part.file.starts[-1]
    expected = "rows with an image and a caption; correct the data"
    refused = refusals(f"{kind} {place}", samples, reasons, expected=expected)
    captioned = any(captions for _, _, captions in samples)
    origin = f"captions from column {request.caption_column!r}" if captioned else "no captions"
    plural = "s" if len(samples) != 1 else ""
    return TableSource(
        description=f"{kind}: {len(samples):,} image{plural} from column {request.image_column!r}, {origin}",
        refused=refused,
        parts=parts,
        samples=samples,
        images=HeldImages(request.image_column),
        roots=tuple(roots),
    )


def _check_columns(file: RowFile, request: Request) -> None:
    wanted = [(request.image_column, is_image_type, "--image-column", "image bytes, or datasets' struct of them")]
    if request.need_captions or request.caption_column in file.schema.names:
        wanted.append((request.caption_column, is_caption_type, "--caption-column", "strings or lists of strings"))
    for column, fits, flag, expected in wanted:
        index = file.schema.get_field_index(column)
        if index < 0:
            found = readable(", ".join(file.schema.names))
            raise SourceError(f"{file.path} has no column {column!r}; found {found}; name the right one with {flag}")
        kind = file.schema.field(index).type
        if not fits(kind):
            raise SourceError(
                f"{file.path}: column {column!r} holds {kind}; expected {expected}; name the right one with {flag}"
            )


def _caption_cells(file: RowFile, request: Request) -> Iterator[tuple[int, object]]:
    for chunk, first in enumerate(file.starts[:-1]):
        rows = file.starts[chunk + 1] - first
        if request.caption_column in file.schema.names:
            cells: Sequence[object] = decode_captions(file.read_chunk(chunk, request.caption_column))
        else:
            cells = [None] * rows
        yield from zip(range(first, first + rows), cells, strict=True)


def _digest(images: Images) -> bytes:
    contents = (images.content(row) for row in range(len(images)))
    return b"".join(_NO_BYTES if content is None else content_key(content) for content in contents)


def _row_name(part: _Part, row: int) -> str:
    return f"{part.label} row {part.first_row + row}"


def _read_json(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(
            f"{path} cannot be read: {error}; expected what save_to_disk writes; write it again"
        ) from error
    if not isinstance(value, dict):
        raise SourceError(f"{path} holds no JSON object; expected what save_to_disk writes; write it again")
    return value


def _data_files(state: Path) -> list[str]:
    entries = _read_json(state).get("_data_files")
    names = []
    if isinstance(entries, list):
        names = [entry["filename"] for entry in entries if isinstance(entry, dict) and "filename" in entry]
    if not names or not all(isinstance(name, str) for name in names):
        raise SourceError(f"{state} names no data files; expected what save_to_disk writes; write it again")
    return names
