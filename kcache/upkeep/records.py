"""What the small files of a cache say and vouch for: manifest, index, samples, rejections and commit records."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from kcache.build.dataset_card import CARD, card_text, is_derived
from kcache.build.plan import open_plan
from kcache.disk.durable import json_bytes
from kcache.errors import CacheCorruptError, KcacheError, UnreadableError
from kcache.foreign import check_withheld
from kcache.places import Place
from kcache.places.fetching import at_once, listed
from kcache.store.formats.columns import Samples
from kcache.store.formats.parts import PARTS
from kcache.store.formats.sample_extras import COUNTS
from kcache.store.index import CAPTION_BOUNDS, open_index
from kcache.store.manifest import MANIFEST, SHARD_NAME, Manifest, read_manifest, shard_number
from kcache.store.recipe import kind_of
from kcache.store.samples import samples_digest, samples_in_columns
from kcache.store.shaped.standing import Standing, order_dtypes
from kcache.store.shards import Commit, read_commit, record_json

_TABLE_FOLDER = re.compile(r"[a-z][a-z0-9_]*(-[a-z][a-z0-9_]*)?(-[0-9]+(x[0-9]+)?)?-[0-9a-f]{8}")


@dataclass(frozen=True, kw_only=True, slots=True)
class BrokenFile:
    """A file that is not what was committed, or is not there."""

    path: str
    """Relative to the cache."""
    shard: str | None
    """The shard that it belongs to, such as "latents-768-1a2b3c4d/00000"; None for a file of the whole cache."""
    reason: str


@dataclass(kw_only=True)
class Records:
    """What the small files of a cache say, as far as they could be read."""

    folder: Place
    manifest: Manifest | None = None
    index: Mapping[str, np.ndarray] | None = None
    samples: Samples | None = None
    commits: dict[str, Commit | None] = field(default_factory=dict)
    """By shard; None where the record is missing or damaged."""
    broken: list[BrokenFile] = field(default_factory=list)
    known: set[str] = field(default_factory=set)
    """Paths, relative to the cache, that are part of it."""

    def add_broken(self, path: str, reason: object, shard: str | None = None) -> None:
        """Note that a file is broken, and part of the cache all the same."""
        self.broken.append(BrokenFile(path=path, shard=shard, reason=str(reason)))
        self.known.add(path)


def entries_of(manifest: Manifest, index: Mapping[str, np.ndarray], table: str) -> np.ndarray:
    """The entries of a table's index, those of the mirrored pictures behind the others."""
    arrays = [index[name] for name in manifest.wants.arrays(table)]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def sample_of(manifest: Manifest, index: Mapping[str, np.ndarray], table: str, entry: int) -> int | None:
    """The number of the sample that has the entry with this number among those; None for a reserved row."""
    if kind_of(table).per == "caption":
        sample = int(np.searchsorted(index[CAPTION_BOUNDS], entry, side="right")) - 1
        return sample if sample < manifest.samples else None
    standing = Standing(manifest.shape_sets, index, manifest.samples)
    place = entry - len(index[table]) if entry >= len(index[table]) else entry
    if place >= standing.rows(table):
        return None
    holders = standing.holders(table)
    return place if holders is None else int(holders[place])


def read_records(folder: Place) -> Records:
    """Read and check the small files of the cache at `folder`, each as far as those before it allow.

    Raises CacheNotFoundError or CacheMismatchError where there is no cache that this version reads.
    """
    records = Records(folder=folder)
    _read_manifest(records)
    _read_derived(records)
    _read_commits(records)
    _read_plan(records)
    return records


def _read_manifest(records: Records) -> None:
    records.known.add(MANIFEST)
    try:
        records.manifest = read_manifest(records.folder)
        if (records.folder / MANIFEST).read_bytes() != json_bytes(records.manifest.to_json()):
            raise CacheCorruptError("it says what was written, but not byte for byte")
    except CacheCorruptError as error:
        records.add_broken(MANIFEST, error)


def _read_derived(records: Records) -> None:
    """Index, samples and rejections, which the manifest has digests of."""
    folder, manifest = records.folder, records.manifest
    if manifest is None:
        return
    arrays = (manifest.wants.arrays(table) for table in manifest.tables)
    names = [CAPTION_BOUNDS, *COUNTS, *order_dtypes(manifest.shape_sets), *chain.from_iterable(arrays)]
    records.known |= {manifest.samples_file, "rejected.jsonl", f"{manifest.index_folder}/{PARTS}"}
    records.known |= {f"{manifest.index_folder}/{name}.npy" for name in names}
    try:
        samples = samples_in_columns(folder, manifest)
        if samples_digest(samples) != manifest.samples_digest:
            raise CacheCorruptError("its samples are not those of the manifest")
        records.samples = samples
    except CacheCorruptError as error:
        records.add_broken(manifest.samples_file, error)
    try:
        digest = hashlib.sha256((folder / "rejected.jsonl").read_bytes()).hexdigest()
        if digest != manifest.rejected_digest:
            records.add_broken("rejected.jsonl", f"its sha256 is {digest[:16]}…, not {manifest.rejected_digest[:16]}…")
    except OSError as error:
        check_withheld(error, folder / "rejected.jsonl")
        records.add_broken("rejected.jsonl", error.strerror or error)
    try:
        records.index = open_index(folder, manifest, whole=True)
    except CacheCorruptError as error:
        records.add_broken(manifest.index_folder, error)
    _read_card(records, manifest)


def _read_card(records: Records, manifest: Manifest) -> None:
    """The card, which says what the manifest does unless its owner took it over; nothing reads it."""
    path = records.folder / CARD
    records.known.add(CARD)
    if records.samples is not None and path.is_file() and is_derived(content := path.read_bytes()):
        most_captions = int(np.diff(records.samples.caption_bounds).max()) if len(records.samples) else 1
        if content != card_text(manifest, most_captions).encode():
            records.add_broken(CARD, "it says something else than the manifest does")


def _read_commits(records: Records) -> None:
    """The commit records of all tables, those of the manifest or not."""
    for name, is_folder in sorted(listed(records.folder)):
        if is_folder and _TABLE_FOLDER.fullmatch(name):
            paths = [path for path in (records.folder / name).glob("*.json") if SHARD_NAME.fullmatch(path.stem)]
            for number, found in sorted(_checked(paths).items()):
                records.known.add(f"{name}/{number}.json")
                records.commits[f"{name}/{number}"] = found if isinstance(found, Commit) else None
                if isinstance(found, CacheCorruptError):
                    records.add_broken(f"{name}/{number}.json", found, f"{name}/{number}")
    for shard in _manifest_shards(records.manifest):
        if shard not in records.commits:
            records.commits[shard] = None
            records.add_broken(f"{shard}.json", "the commit record is missing", shard)
    for shard, commit in records.commits.items():
        parent = shard.partition("/")[0]
        if commit is not None:
            records.known |= {f"{parent}/{file.path}" for file in commit.files}
        else:  # nothing says which files are the shard's: all that bear its name count as such
            number = shard.partition("/")[2]
            own = (path.name for path in (records.folder / parent).glob(f"{number}*"))
            records.known |= {f"{parent}/{name}" for name in own if shard_number(name) == number}


def _checked(paths: Sequence[Place]) -> dict[str, Commit | CacheCorruptError]:
    """By number, the commit records at `paths`, or what is wrong with them."""
    found: dict[str, Commit | CacheCorruptError] = {}

    def check(path: Place) -> None:
        try:
            found[path.stem] = commit = read_commit(path)
            if path.read_bytes() != json_bytes(record_json(commit)):
                raise CacheCorruptError("it says what was written, but not byte for byte")
            if not path.parent.name.endswith("-" + commit.fingerprint[:8]):
                raise CacheCorruptError(f"it is of another table, with fingerprint {commit.fingerprint[:8]}")
        except CacheCorruptError as error:
            found[path.stem] = error

    at_once(check, paths)
    return found


def _read_plan(records: Records) -> None:
    """The plan of an unfinished build, if there is one."""
    if (records.folder / "plans").is_dir():
        records.known.add("plans")
        try:
            open_plan(records.folder)
        except UnreadableError:
            raise
        except KcacheError as error:
            records.add_broken("plans", error)


def _manifest_shards(manifest: Manifest | None) -> list[str]:
    tables = manifest.tables.values() if manifest else ()
    return sorted({shard.label for table in tables for shard in table.shards})
