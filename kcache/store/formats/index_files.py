"""The index on disk: arrays that are written once, and opened mapped and checked.

Where shards are named by their content, the arrays are in parts, which are checked when they are first touched; in a
bucket those parts are fetched then, and kept on this machine. Older indexes are read and checked whole.
"""

import filecmp
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from kcache.disk.durable import read_npy, remove_temporary, write_bytes
from kcache.disk.filesystems import mapped
from kcache.disk.memo import own_folder
from kcache.disk.sweeping import hold, sweep
from kcache.foreign import corrupt
from kcache.places import Place
from kcache.places.effects import publish, read_all, remove, temporary_folder
from kcache.store.formats.checksums import crc32c
from kcache.store.formats.chosen import CAPTION_BOUNDS as CAPTION_BOUNDS
from kcache.store.formats.chosen import Chosen
from kcache.store.formats.parts import PARTS, Parts, Rows, list_parts, read_parts, write_rows
from kcache.store.formats.sample_extras import COUNTS, check_counts
from kcache.store.formats.side_files import LOCATOR
from kcache.store.manifest import Manifest, TableEntry
from kcache.store.recipe import TEXT, Field, json_digest, kind_of
from kcache.store.shaped.joined import Joined
from kcache.store.shaped.standing import Standing, check_order, order_dtypes
from kcache.store.shaped.wants import MIRRORED

_MOST_BYTES = 64 << 30
"""What indexes of buckets take of this machine's disk; that of a hundred million samples takes eight billion bytes."""
_SOON = 64 << 20
"""Bytes of index arrays up to which all parts are checked when a cache is opened: it takes less than a tenth second."""


def index_dtype(fields: Sequence[Field]) -> np.dtype[np.void]:
    """Dtype of an index entry: position of the shard in the manifest, then a locator per field."""
    return np.dtype([("shard", "<u4"), *[(field.name, LOCATOR) for field in fields]])


def write_index(cache: Place, arrays: Mapping[str, Rows], *, in_parts: bool) -> str:
    """Write the index arrays under the name that their digest gives; returns the digest (sha256 hex).

    They are `in_parts` from schema version 2 on.
    """
    with temporary_folder(cache) as temporary:
        for name, rows in arrays.items():
            write_rows(temporary / f"{name}.npy", rows)
        if in_parts:
            write_bytes(temporary / PARTS, content := list_parts(temporary, arrays))
            digest = hashlib.sha256(content).hexdigest()
        else:
            digest = _index_digest(temporary, sorted(arrays))
        final = cache / f"index-{digest[:16]}"
        if _equal(temporary, final):
            remove(temporary)
        else:
            remove(final)  # damaged, if there is anything
            publish(temporary, final)
    return digest


def _equal(made: Path, final: Place) -> bool:
    """Whether `final` holds the files of `made`; of large ones in a bucket only the size is compared."""
    names = sorted(path.name for path in made.iterdir())
    if not isinstance(final, Path):
        sizes = {path.name: size for path, size in final.below()}
        return sizes == {name: (made / name).stat().st_size for name in names}
    return final.is_dir() and filecmp.cmpfiles(made, final, names, shallow=False)[0] == names


def open_index(cache: Place, manifest: Manifest, *, whole: bool = False) -> dict[str, np.ndarray]:
    """The index arrays, memory-mapped and checked against the manifest; raises CacheCorruptError.

    Large ones in parts are checked part by part when they are touched, unless they are wanted `whole`.
    """
    folder = cache / manifest.index_folder
    do = "build the cache again with its source to write these index arrays anew: no row is encoded for that"
    if not isinstance(folder, Path):
        do = f"remove {folder} and {do}"
    try:
        if manifest.schema_version == 1:
            return _open_whole(folder, manifest)
        arrays = _open_parts(folder, manifest, do)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise corrupt(error, folder, do) from error
    if whole or sum(array.nbytes for array in arrays.values()) <= _SOON:
        return {name: array.whole() for name, array in arrays.items()}
    return cast("dict[str, np.ndarray]", arrays)  # what is asked of them comes as from an array


def bytes_of(entries: np.ndarray, field: str) -> int:
    """Bytes of the rows of `field` that the entries of a table point to."""
    if isinstance(entries, Joined):
        return sum(bytes_of(part, field) for part in entries.parts)
    if isinstance(entries, Parts):
        return entries.parted.lengths[field]
    if isinstance(entries, Chosen):
        return entries.lengths(field)
    return int(entries[field]["length"].sum(dtype=np.int64))


def _open_whole(folder: Place, manifest: Manifest) -> dict[str, np.ndarray]:
    counts = [name for name in COUNTS if (folder / f"{name}.npy").exists()]
    names = sorted([*manifest.tables, CAPTION_BOUNDS, *counts])
    folder = _at_hand(folder, names, manifest.index_digest)
    digest = _index_digest(folder, names)
    if digest != manifest.index_digest:
        raise ValueError(f"their digest is {digest[:16]}, the manifest says {manifest.index_digest[:16]}")
    # Plain views of the mapped arrays: a batch takes them apart several times, 3 µs each where they are np.memmap.
    arrays = {name: np.asarray(read_npy(folder / f"{name}.npy", mapped=True)) for name in names}
    bounds = arrays[CAPTION_BOUNDS]
    if bounds.dtype != np.int64 or bounds.ndim != 1 or not len(bounds):
        raise ValueError(f"{CAPTION_BOUNDS}.npy holds {bounds.shape} of {bounds.dtype}")
    _check_lengths(manifest, {name: array.shape for name, array in arrays.items()}, int(bounds[-1]), arrays)
    _check_bounds(manifest, bounds, 0)
    for name in counts:
        check_counts(name, 0, arrays[name])
    for name, entry in manifest.tables.items():
        if arrays[name].dtype != index_dtype(entry.recipe.fields):
            raise ValueError(f"{name}.npy has dtype {arrays[name].dtype}, not {index_dtype(entry.recipe.fields)}")
        _check_entries(name, entry, arrays[name])
    return arrays


def _at_hand(folder: Place, names: Sequence[str], digest: str) -> Path:
    """Where on this machine the index arrays of `folder` lie; those of a bucket are fetched, once."""
    if isinstance(folder, Path):
        return folder
    # Held before it is looked into, and never put in the place of what another process is opening.
    final = _in_use(own_folder() / "index" / folder.name)
    with suppress(OSError, ValueError):
        if _index_digest(final, names) == digest:
            return final
    remove_temporary(final)
    paths = [folder / f"{name}.npy" for name in names]
    for path, content in zip(paths, read_all(paths), strict=True):
        write_bytes(final / path.name, content)
    return final


def _in_use(folder: Path) -> Path:
    """A folder that keeps an index: it stays while this process lives, unused ones go where they are many."""
    hold(folder)
    sweep(folder.parent, _MOST_BYTES)
    return folder


def _open_parts(folder: Place, manifest: Manifest, do: str) -> dict[str, Parts]:
    listed = read_parts((folder / PARTS).read_bytes(), manifest.index_digest)
    bounds = listed[CAPTION_BOUNDS].borders
    kept = folder if isinstance(folder, Path) else _in_use(own_folder() / "index" / folder.name)

    def check_bounds(part: int, found: np.ndarray) -> None:
        if found[0] != bounds[part]:
            raise ValueError(f"it begins with {found[0]} instead of {bounds[part]}")
        is_last = part == len(bounds) - 2
        _check_bounds(manifest, found if is_last else np.append(found, bounds[part + 1]), bounds[part])
        if is_last and found[-1] != bounds[-1]:
            raise ValueError(f"it ends with {found[-1]} instead of {bounds[-1]}")

    def parts(name: str, dtype: np.dtype[Any], check: Callable[[int, np.ndarray], None]) -> Parts:
        return Parts(folder / f"{name}.npy", kept / f"{name}.npy", dtype, listed[name], check, do)

    arrays = {CAPTION_BOUNDS: parts(CAPTION_BOUNDS, np.dtype(np.int64), check_bounds)}
    for name, entry in manifest.tables.items():
        check = partial(_check_part, name, entry)
        for array in manifest.wants.arrays(name):
            arrays[array] = parts(array, index_dtype(entry.recipe.fields), check)
    for name, dtype in order_dtypes(manifest.shape_sets).items():
        arrays[name] = parts(name, dtype, partial(check_order, name, manifest.samples))
    for name in COUNTS.keys() & listed.keys():
        arrays[name] = parts(name, COUNTS[name], partial(check_counts, name))
    _check_lengths(manifest, {name: array.shape for name, array in arrays.items()}, bounds[-1], arrays)
    return arrays


def _check_lengths(
    manifest: Manifest,
    shapes: Mapping[str, tuple[int, ...]],
    captions: int,
    arrays: Mapping[str, Any],
) -> None:
    """Raise ValueError when there are not as many entries as the numbers of samples and captions say."""
    standing = Standing(manifest.shape_sets, arrays, manifest.samples)
    expected = {CAPTION_BOUNDS: manifest.samples + 1, **standing.lengths()}
    expected |= dict.fromkeys(COUNTS.keys() & arrays.keys(), manifest.samples)
    for name in manifest.tables:
        kind = kind_of(name)
        rows = captions if kind.per == "caption" else standing.rows(name)
        expected[name] = rows + (kind.reserved is not None)
        expected |= {name + MIRRORED: rows} if manifest.flip and kind.per != "caption" else {}
    for name, rows in expected.items():
        if shapes[name] != (rows,):
            raise ValueError(f"{name}.npy has shape {shapes[name]} instead of ({rows},)")


def _check_bounds(manifest: Manifest, bounds: np.ndarray, first: int) -> None:
    # Where there are texts every sample has one or more; else none has any.
    fits = np.greater if TEXT.name in manifest.tables else np.equal
    if bounds[0] != first or not fits(bounds[1:], bounds[:-1]).all():
        raise ValueError(f"{CAPTION_BOUNDS}.npy does not bound the captions of {manifest.samples} samples")


def _check_part(name: str, entry: TableEntry, _: int, array: np.ndarray) -> None:
    _check_entries(name, entry, array)


def _check_entries(name: str, entry: TableEntry, array: np.ndarray) -> None:
    """Raise ValueError when entries name shards that are none, or rows of another size than the recipe's."""
    recipe = entry.recipe
    if len(array) and array["shard"].max() >= len(entry.shards):
        raise ValueError(f"{name}.npy names shard {array['shard'].max()} of {len(entry.shards)}")
    for field in recipe.fields:
        size = math.prod(field.shape) * np.dtype(recipe.stored_dtype).itemsize
        lengths = array[field.name]["length"]
        if size >= 1 << 32 or (lengths % size).any() or (not field.ragged and (lengths != size).any()):
            raise ValueError(f"{name}.npy has rows of {field.name} that are not {field.shape} of {recipe.stored_dtype}")


def _index_digest(folder: Path, names: Sequence[str]) -> str:
    sums = []
    for name in names:
        content = np.frombuffer(mapped(folder / f"{name}.npy"), np.uint8)
        sums.append([name, content.size, crc32c(content)])
    return json_digest(sums)
