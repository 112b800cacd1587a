"""Datasets of rows: parquet files, and what `hub` finds that the library `datasets` keeps."""

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from kcache.disk.memo import DigestMemo
from kcache.errors import InputRejected, SourceError, StoreError
from kcache.foreign import reason
from kcache.places import Place
from kcache.plainly import plainly_at
from kcache.sources.archives import ZipMembers, is_chained
from kcache.sources.arrow_files import (
    NO_BYTES,
    HeldImages,
    Images,
    ParquetFile,
    RowFile,
    chunk_keys,
    decode_captions,
    is_caption_type,
    pieces_of,
    readable_as,
)
from kcache.sources.further.asked import column_of, may_lack
from kcache.sources.further.fitting import misfit
from kcache.sources.further.numbers import counts_at, decode_numbers, is_number_type, number_fields, number_in
from kcache.sources.listing import link_roots
from kcache.sources.protocol import Request, refusals
from kcache.sources.reading import MAX_IMAGE_BYTES, caption_tuple, locate, read_file, readable
from kcache.store.digests import KEY_BYTES, NO_CONTROL, content_key
from kcache.store.formats.records import Records
from kcache.store.samples import Refusal
from kcache.tally import counted

_File = TypeVar("_File", bound=Place)
_SAMPLES = pa.schema({"part": pa.int32(), "row": pa.int64(), "captions": pa.list_(pa.string())})


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
    samples: Records
    """Index of the part, row in its file, captions, and numbers that are asked for."""
    images: HeldImages
    roots: tuple[Path, ...]
    """Real, absolute folders for images that rows only give the path of; the first is its base. None in a bucket."""
    links: tuple[Path, ...] = ()
    """Such folders into which links in the roots may lead."""
    zip_roots: tuple[Path, ...] = ()
    """Such folders for zips alone, of which rows name a member."""
    controls: Mapping[str, HeldImages] = field(default_factory=dict)
    """Of each kind of control images that is asked for; the images themselves where it is their own transparency."""
    counted: Collection[str] = ()
    """The numbers that are asked for."""
    zips: ZipMembers = field(default_factory=ZipMembers)
    keys: dict[tuple[str, int, int, bool], bytes] = field(default_factory=dict)
    """Keys of the images of a chunk (16 bytes each), by column, part, chunk and whether they were digested afresh."""

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, i: int) -> str:
        return _row_name(self.parts[self.samples.value(i, "part")], self.samples.value(i, "row"))

    def captions(self, i: int) -> tuple[str, ...]:
        return tuple(self.samples.value(i, "captions"))

    def image(self, i: int) -> bytes:
        return self._content(self.images, i)

    def image_key(self, i: int, memo: DigestMemo, rehash: bool) -> bytes:
        return self._key(self.images, i, memo, rehash)

    def counts(self, i: int) -> tuple[float, int]:
        return counts_at(self.samples, self.counted, i)

    def control(self, i: int, name: str) -> bytes:
        return self._content(column_of(self.controls, name), i)

    def control_keys(self, i: int, memo: DigestMemo, rehash: bool) -> tuple[bytes, ...]:
        return tuple(self._key(held, i, memo, rehash, lacking=may_lack(name)) for name, held in self.controls.items())

    def _content(self, held: HeldImages, i: int) -> bytes:
        images, at = self._images(held, *self._place(i))
        content = images.content(at)
        return self._named(held, images.path(at)) if content is None else content

    def _key(self, held: HeldImages, i: int, memo: DigestMemo, rehash: bool, *, lacking: bool = False) -> bytes:
        part, chunk, row = self._place(i)
        try:
            key = self._chunk_keys(held, part, chunk, memo, rehash)[row * KEY_BYTES : (row + 1) * KEY_BYTES]
            if key != NO_BYTES:
                return key
            images, at = self._images(held, part, chunk, row)
            path, name = images.path(at), "content_key"
            if path is None and lacking:
                return NO_CONTROL
            if path is not None and is_chained(path):
                file, member = self._zipped(path)
                name = f"content_key of member {member!a}"
            else:
                file = self._located(held, path)
            return memo.digest(file, name, lambda: content_key(self._named(held, path)), rehash)
        except OSError as error:
            raise InputRejected("source", f"cannot be read: {error.strerror}") from error

    def _chunk_keys(self, held: HeldImages, part: int, chunk: int, memo: DigestMemo, rehash: bool) -> bytes:
        # Chunk by chunk, because a file's one stat then answers for all of its rows, and a chunk is read only once.
        keys = self.keys.get((held.column, part, chunk, rehash))
        if keys is None:
            at = self.parts[part]
            keys = chunk_keys(at.file, at.label, chunk, held.column, memo, rehash)
            self.keys[held.column, part, chunk, rehash] = keys
        return keys

    def _place(self, i: int) -> tuple[int, int, int]:
        """Part and chunk of sample `i`, and its row in the chunk."""
        part, row = self.samples.value(i, "part"), self.samples.value(i, "row")
        starts = self.parts[part].file.starts
        chunk = bisect_right(starts, row) - 1
        return part, chunk, row - starts[chunk]

    def _images(self, held: HeldImages, part: int, chunk: int, row: int) -> tuple[Images, int]:
        with readable_as(self.parts[part].label):
            return held.read(self.parts[part].file, chunk, row)

    def _located(self, held: HeldImages, path: str | None) -> Path:
        if path is None:
            raise InputRejected("source", f"no image in column {held.column!a} of this row")
        return locate(path, self._base(path), self.roots, self.links)

    def _base(self, path: str) -> Path:
        if not self.roots:
            do = "of a table in a bucket, it must be in the table itself"
            raise InputRejected("source", f"the row only names the picture {path[:200]!a}; {do}")
        return self.roots[0]

    def _zipped(self, path: str) -> tuple[Path, str]:
        return self.zips.locate(path, self._base(path), [*self.roots, *self.zip_roots], self.links)

    def _named(self, held: HeldImages, path: str | None) -> bytes:
        """The bytes of what a row only names."""
        if path is not None and is_chained(path):
            return self.zips.read(*self._zipped(path))
        return read_file(self._located(held, path), MAX_IMAGE_BYTES)


@dataclass(slots=True, kw_only=True)
class _Found:
    """What has been found in files of rows so far, but for their samples."""

    parts: list[_Part] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    """Why what is refused is, by name."""
    problems: dict[Place, str] = field(default_factory=dict)
    """Files that do not fit, or are broken, and why."""
    captioned: bool = False
    """Whether there is any caption."""


def open_parquet(root: Place, paths: Sequence[str], refused: Mapping[str, str], request: Request) -> TableSource:
    """Open parquet files given relative to a folder; raises SourceError when they offer no sample."""
    files = [(readable(path), root / path) for path in paths]
    roots = [root] if isinstance(root, Path) else []
    return open_rows("parquet", str(root), ParquetFile, files, roots, request, reasons=refused)


def count_rows(path: Place) -> int | None:
    """The rows of a parquet file, as its footer says; None where it cannot be read."""
    try:
        return ParquetFile(path).starts[-1]
    except (pa.ArrowException, OSError):
        return None


def open_rows(
    kind: str,
    place: str,
    reader: Callable[[_File], RowFile],
    files: Sequence[tuple[str, _File]],
    roots: Sequence[Path],
    request: Request,
    *,
    numbered_through: bool = False,
    reasons: Mapping[str, str] | None = None,
) -> TableSource:
    """The rows of files given as (what to call it, file); raises SourceError when they offer no sample.

    A file that does not fit, or is broken, costs itself, unless none fits or the rows are `numbered_through` all files:
    then names would shift. Images that rows only name must lie in one of `roots`.
    """
    found = _Found(reasons=dict(reasons or {}))
    offered = islice(_offered(reader, files, request, found, numbered_through), request.max_train_samples)
    samples = Records.of(pa.schema([*_SAMPLES, *number_fields(request.config.counts)]), offered)
    parts, problems = found.parts, found.problems
    if problems and (numbered_through or not parts):
        broken, problem = next(iter(problems.items()))
        raise SourceError(f"{broken} {problem}")
    expected = "rows with an image and a caption; correct the data"
    refused = refusals(f"{kind} {place}", samples, found.reasons, expected=expected)
    origin = f"captions from column {request.caption_column!r}" if found.captioned else "no captions"
    left_out = f", {len(problems):,} of {len(files):,} files left out" if problems else ""
    ends = [part.file.starts[-1] for part in parts[: samples.value(len(samples) - 1, "part")]]
    ends.append(samples.value(len(samples) - 1, "row") + 1)
    of_images = [request.image_column, *filter(None, request.config.controls.values())]
    pieces = [
        pieces_of(reader, part.file, column, end)
        for column in of_images
        for part, end in zip(parts, ends, strict=False)
    ]
    request.look_ahead(list(chain.from_iterable(pieces)))
    images = HeldImages(request.image_column)
    return TableSource(
        description=(
            f"{kind}: {counted(len(samples), 'image')} from column {request.image_column!r}, {origin}{left_out}"
        ),
        refused=refused,
        parts=parts,
        samples=samples,
        images=images,
        roots=tuple(roots),
        links=link_roots(roots[0], request.config) if roots else (),
        controls={
            name: images if column is None else HeldImages(column) for name, column in request.config.controls.items()
        },
        counted=request.config.counts,
    )


def _offered(
    reader: Callable[[_File], RowFile],
    files: Sequence[tuple[str, _File]],
    request: Request,
    found: _Found,
    numbered_through: bool,
) -> Iterator[tuple[Any, ...]]:
    """Part, row, captions and numbers of each sample, what is to be said of the others noted in `found`."""
    first_row = 0
    for label, path in files:
        begun = False
        try:
            part = _Part(file=reader(path), label=label, first_row=first_row if numbered_through else 0)
            first_row += part.file.starts[-1]
            if (problem := misfit(part.file, request)) is not None:
                found.problems[path] = found.reasons[label] = problem
                continue
            found.parts.append(part)
            for row, captions, *counts in _captioned_rows(part, request, found.reasons):
                begun, found.captioned = True, found.captioned or bool(captions)
                yield len(found.parts) - 1, row, captions, *counts
        except StoreError:
            raise
        except (pa.ArrowException, OSError) as error:
            found.problems[path] = found.reasons[label] = _broken(path, error, begun)


def _captioned_rows(part: _Part, request: Request, reasons: dict[str, str]) -> Iterator[tuple[Any, ...]]:
    """The rows of a file with captions and numbers; why any other is refused is noted in `reasons`."""
    asked = request.config.counts
    cells = [_cells(part.file, request.caption_column, is_caption_type, decode_captions)]
    cells += [_cells(part.file, column, is_number_type, decode_numbers) for column in asked.values()]
    for row, (cell, *numbers) in enumerate(zip(*cells, strict=True)):
        try:
            captions = caption_tuple(cell, needed=request.need_captions)
            counts = [number_in(name, asked[name], each) for name, each in zip(asked, numbers, strict=True)]
        except InputRejected as rejection:
            reasons[_row_name(part, row)] = rejection.reason
        else:
            yield row, captions, *counts


def _cells(
    file: RowFile, column: str, fits: Callable[[Any], bool], decode: Callable[[Any], Sequence[object]]
) -> Iterator[object]:
    """What each row has in a column; None where the file has no such column, or of a type that does not fit."""
    names = file.schema.names
    is_there = column in names and fits(file.schema.field(names.index(column)).type)
    for chunk, first in enumerate(file.starts[:-1]):
        row, end = first, file.starts[chunk + 1]
        for piece in file.pieces(chunk, column) if is_there else ():
            yield from (cells := decode(piece))
            row += len(cells)
        if is_there and row != end:
            raise pa.ArrowInvalid(f"row group {chunk} has {row - first:,} rows instead of {end - first:,}")
        yield from (None for _ in range(row, end))


def _broken(path: Place, error: Exception, begun: bool) -> str:
    if (found := plainly_at(path)) is not None and not found.startswith(("a Parquet file", "an Arrow")):
        return f"is no file of rows: it is {found}"
    return f"cannot be read{' to its end' if begun else ''}: {reason(error)}; expected a whole file; write it again"


def _row_name(part: _Part, row: int) -> str:
    return f"{part.label} row {part.first_row + row}"
