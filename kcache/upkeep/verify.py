"""Verifying a cache: every byte of every file, against the checksums that were committed with it.

A shard's files are checked against its commit record and, in the same pass, every row in them against the index; commit
records, manifest, index, samples and rejections against their digests. A row that is broken is named with the samples
that use it. Files that nothing vouches for are orphaned: no part of the cache, and no fault of it.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kcache.disk.readers import Reading
from kcache.places import Place, cache_place
from kcache.places.fetching import AT_ONCE, FETCHES, listed
from kcache.store.formats import format_of
from kcache.store.formats.shard_files import CommittedFile
from kcache.store.recipe import Field, kind_of
from kcache.store.rows import unit_bytes
from kcache.upkeep.records import BrokenFile, Records, entries_of, read_records, sample_of
from kcache.upkeep.scan import RowSpans, Scan, scan_file

READ_THREADS = 2
"""Of a disk: one waits for the disk while the other computes checksums; more only make a disk's head jump."""
REPORT_SECONDS = 0.2
"""How often progress is reported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BrokenRow:
    """A row that a sample uses and whose bytes are not what was committed."""

    table: str
    shard: str
    field: str
    row: int
    """Number of the row among those of its shard that samples use, by place in the file."""
    entry: int
    """Its number in the index of the table, those of mirrored pictures being behind the others."""
    sample: str | None
    """Id of the sample that uses it; None for a reserved row, and where the samples cannot be read."""
    name: str
    """The source's name for that sample."""
    mirrored: bool = False
    """Whether it is the row of the mirrored picture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyResult:
    """What a verification found."""

    cache: str
    bytes: int
    """Bytes of shards that were read and checked."""
    seconds: float
    files: tuple[BrokenFile, ...]
    rows: tuple[BrokenRow, ...]
    orphaned: tuple[str, ...]
    """Files and folders (with a slash at the end) that nothing vouches for, relative to the cache."""

    @property
    def corrupt(self) -> bool:
        """Whether anything of the cache is not what was committed."""
        return bool(self.files or self.rows)

    @property
    def shards(self) -> tuple[str, ...]:
        """The shards with anything broken."""
        of_files = {file.shard for file in self.files if file.shard is not None}
        return tuple(sorted(of_files | {row.shard for row in self.rows}))


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyProgress:
    """How far a verification is, in bytes."""

    done: int
    total: int
    seconds: float


def verify_cache(cache: str | Place, report: Callable[[VerifyProgress], None] | None = None) -> VerifyResult:
    """Check every byte of the cache at `cache`, a folder or a URL, which nothing should be writing meanwhile.

    What is broken is in the result, not raised. Raises CacheNotFoundError or CacheMismatchError where there is no cache
    that this version reads, and StoreError where a store fails: that says nothing of the cache.
    """
    start, folder = time.perf_counter(), cache_place(cache)
    with Reading(folder):
        records = read_records(folder)
        targets = _targets(records)
        scans = _scan_all(records.folder, targets, report)
    files, rows = list(records.broken), list[BrokenRow]()
    for target, scan in zip(targets, scans, strict=True):
        if reason := _difference(target.committed, scan):
            files.append(BrokenFile(path=target.path, shard=target.shard, reason=reason))
        rows += _broken_rows(records, target, scan)
    return VerifyResult(
        cache=str(cache),
        bytes=sum(scan.bytes for scan in scans),
        seconds=time.perf_counter() - start,
        files=tuple(sorted(files, key=lambda file: file.path)),
        rows=tuple(sorted(rows, key=lambda row: (row.table, row.shard, row.entry, row.field))),
        orphaned=tuple(sorted(_orphans(records.folder, records.known))) if records.manifest else (),
    )


class _Standing:
    """The entries of a table's index by the shard that their rows stand in, copied only when it is its turn."""

    def __init__(self, entries: np.ndarray, shards: int) -> None:
        self._entries = entries
        numbers = entries["shard"]
        self._order = np.argsort(numbers, kind="stable").astype(np.min_scalar_type(len(entries)))
        self._bounds = np.concatenate([[0], np.cumsum(np.bincount(numbers, minlength=shards))])

    def numbers(self, shard: int) -> np.ndarray:
        """(n,) of the entries whose rows stand in a shard, ascending."""
        return self._order[self._bounds[shard] : self._bounds[shard + 1]]

    def inside(self, shard: int) -> np.ndarray:
        """Those entries."""
        return self._entries[self.numbers(shard)]


@dataclass(frozen=True, kw_only=True)
class _Field:
    """The rows of one field of a table in one file."""

    table: str
    field: Field
    shard: int
    """Position in the manifest."""
    standing: _Standing
    pieces: tuple[int, int]
    """`piece_bytes` and `gap_bytes` of the file."""

    def spans(self) -> RowSpans:
        """Where the rows are: put together when the file is read, as those of all files would not fit into memory."""
        locators = self.standing.inside(self.shard)[self.field.name]
        locators = locators[locators["length"] > 0]
        locators = locators[np.unique(locators["offset"], return_index=True)[1]]
        offsets, lengths, sums = (locators[name].astype(np.int64) for name in ("offset", "length", "crc32c"))
        return RowSpans(offsets, lengths, sums, *self.pieces)


@dataclass(frozen=True, kw_only=True)
class _Target:
    """A file to read."""

    path: str
    shard: str
    committed: CommittedFile | None
    fields: tuple[_Field, ...]


def _targets(records: Records) -> list[_Target]:
    """Every file of every shard, in the order that they stand in."""
    committed = {
        f"{shard.partition('/')[0]}/{file.path}": (shard, file)
        for shard, commit in records.commits.items()
        if commit is not None
        for file in commit.files
    }
    fields: dict[str, list[_Field]] = {}
    shards = {path: shard for path, (shard, _) in committed.items()}
    for path, shard, rows in _indexed_fields(records):
        fields.setdefault(path, []).append(rows)
        shards[path] = shard
    return [
        _Target(
            path=path,
            shard=shard,
            committed=committed[path][1] if path in committed else None,
            fields=tuple(fields.get(path, ())),
        )
        for path, shard in sorted(shards.items())
    ]


def _indexed_fields(records: Records) -> Iterator[tuple[str, str, _Field]]:
    """Path, shard and rows of every file that the index refers to."""
    if records.manifest is None or records.index is None:
        return
    for table, entry in records.manifest.tables.items():
        standing = _Standing(entries_of(records.manifest, records.index, table), len(entry.shards))
        for position, shard in enumerate(entry.shards):
            here, form = standing.inside(position), format_of(shard.data)
            for field in entry.recipe.fields:
                if here[field.name]["length"].any():
                    pieces = form.pieces(unit_bytes(field, np.dtype(entry.recipe.stored_dtype)))
                    rows = _Field(table=table, field=field, shard=position, standing=standing, pieces=pieces)
                    yield form.field_file(shard.data, field), shard.label, rows


def _scan_all(folder: Place, targets: Sequence[_Target], report: Callable[[VerifyProgress], None] | None) -> list[Scan]:
    start, total = time.perf_counter(), sum(target.committed.bytes for target in targets if target.committed)
    done, far = [0] * len(targets), not isinstance(folder, Path)

    def scan(number: int) -> Scan:
        def advance(count: int) -> None:
            done[number] += count

        target = targets[number]
        for again in reversed(range(FETCHES if far else 1)):  # what is wrong may have changed on its way
            done[number] = 0
            found = scan_file(folder / target.path, [rows.spans() for rows in target.fields], advance)
            if not again or not (_difference(target.committed, found) or any(map(len, found.broken))):
                break
        return found

    with ThreadPoolExecutor(AT_ONCE if far else READ_THREADS, "kcache-verify") as pool:
        running = [pool.submit(scan, number) for number in range(len(targets))]
        waiting = set(running)
        try:
            while waiting:
                waiting = wait(waiting, timeout=REPORT_SECONDS).not_done
                if report:
                    report(VerifyProgress(done=sum(done), total=total, seconds=time.perf_counter() - start))
        finally:
            pool.shutdown(cancel_futures=True)
    return [scan.result() for scan in running]


def _difference(committed: CommittedFile | None, found: Scan) -> str | None:
    """How a file differs from what was committed; without a record only its rows can tell."""
    if found.error:
        return found.error
    if committed is None:
        return None
    if found.bytes != committed.bytes:
        return f"{found.bytes} bytes, {committed.bytes} were committed"
    if found.crc32c != committed.crc32c:
        return f"crc32c is {found.crc32c:08x}, {committed.crc32c:08x} was committed"
    return None


def _broken_rows(records: Records, target: _Target, scan: Scan) -> list[BrokenRow]:
    found: list[BrokenRow] = []
    for rows, broken in zip(target.fields, scan.broken, strict=True):
        if len(broken):
            numbers, name = rows.standing.numbers(rows.shard), rows.field.name
            place = np.searchsorted(rows.spans().offsets, rows.standing.inside(rows.shard)[name]["offset"])
            used = np.flatnonzero(np.isin(place, broken))
            for entry, row in zip(numbers[used].tolist(), place[used].tolist(), strict=True):
                sample, of = _user(records, rows.table, entry)
                mirrored = records.index is not None and entry >= len(records.index[rows.table])
                found.append(BrokenRow(
                    table=rows.table, shard=target.shard, field=name, row=row, entry=entry, sample=sample, name=of,
                    mirrored=mirrored,
                ))  # fmt: skip
    return found


def _user(records: Records, table: str, entry: int) -> tuple[str | None, str]:
    """Id and name of the sample that an entry of a table's index is of."""
    if records.manifest is None or records.index is None:
        return None, "a sample that is not known"
    sample = sample_of(records.manifest, records.index, table, entry)
    if sample is None:
        reserved = {"caption": "the empty caption", "image": "the all-zero image", "control": "no mask"}
        return None, reserved[kind_of(table).per]
    if records.samples is None:
        return None, f"sample {sample}"
    return records.samples[sample].id, records.samples[sample].name


def _orphans(folder: Place, known: set[str]) -> Iterator[str]:
    """What stands in the folder of a cache and is neither part of it nor leads to a part of it."""
    parents = {path[: i + 1] for path in known for i, letter in enumerate(path) if letter == "/"}
    inside = [""]
    while inside:
        prefix = inside.pop()
        for name, is_folder in listed(folder / prefix if prefix else folder):
            path = prefix + name
            if path not in known and is_folder and f"{path}/" in parents:
                inside.append(f"{path}/")
            elif path not in known and (not is_folder or (folder / path).is_dir()):  # stores may list empty folders
                yield f"{path}/" if is_folder else path
