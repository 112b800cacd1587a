"""How fast the loader is, against a plain in-memory gather of the same rows, and other readers, in the same run.

    python benchmarks/loader.py --output loader.json
    python benchmarks/loader.py --cold --output loader-cold.json

Writes a synthetic cache of float16 latents at 768 pixels (73,728 bytes a row) in each format, reads it once so that it
lies in the page cache, then takes turns: gathers from an array in memory, the loader in each residency, and what else
reads such files. "gpu" uploads its tables to --device, which is the CPU unless said, and verifies them on the way, as
"ram" does; "mmap" verifies each row as it copies it. "mmap, first epoch" has its pages still to map, "mmap" has been
through one epoch. "plain copy of mapped files" copies their rows with nothing else done, in one thread. All give
batches in random order, but for webdataset, which has none: it streams through a shuffle buffer. zarr-python and
tensorstore verify the checksums of chunks of 64 rows, webdataset none. --cold drops the files from the page cache
before each turn (Linux): its first way reads the same files in sequence, and the loader's share of that rate is what it
makes of the disk. Prints tables and writes JSON with the hardware
and the versions.
"""

import argparse
import gc
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring.record import write_outcome
from measuring.synthetic import write_synthetic_cache

from kcache import Cache
from kcache.loader import CacheLoader
from kcache.store.formats import FORMATS
from kcache.store.index import open_index
from kcache.upkeep.convert import convert_cache

ROW_BYTES = 4 * 96 * 96 * 2


def gather_batches(rows: np.ndarray, batch_size: int, *, reuse: bool) -> Iterator[np.ndarray]:
    """Random batches gathered from memory: into one reused buffer, or into a new array each."""
    rng = np.random.default_rng(0)
    buffer = np.empty((batch_size, *rows.shape[1:]), rows.dtype)
    while True:
        order = rng.permutation(len(rows))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            chosen = order[start : start + batch_size]
            # mode="clip" spares numpy a copy through a buffer of its own: the fastest gather it has.
            yield np.take(rows, chosen, axis=0, out=buffer, mode="clip") if reuse else rows[chosen]


def copied_batches(cache: Cache, batch_size: int) -> Iterator[np.ndarray]:
    """Random batches copied out of the mapped files into one reused buffer and not verified: what mapping can give."""
    rng, files = np.random.default_rng(0), cache.field_files("latents")
    entries = open_index(cache.path, cache.manifest)[cache.table_of("latents")]
    shards, offsets = entries["shard"].tolist(), entries["latents"]["offset"].tolist()
    places = list(zip(shards, offsets, strict=True))
    buffer = np.empty(batch_size * ROW_BYTES, np.uint8)
    while True:
        order = rng.permutation(len(cache)).tolist()
        for start in range(0, len(order) - batch_size + 1, batch_size):
            chosen = [places[i] for i in order[start : start + batch_size]]
            pieces = [piece for shard, offset in chosen for piece in files.pieces(shard, offset, ROW_BYTES)]
            yield np.concatenate(pieces, out=buffer)


def shard_rows(cache: Cache) -> list[tuple[str, int]]:
    """Data and first row of each shard of the latents."""
    shards = cache.manifest.tables[cache.table_of("latents")].shards
    starts = np.cumsum([0, *[shard.rows for shard in shards]]).tolist()
    return [(shard.data, start) for shard, start in zip(shards, starts, strict=False)]


def selected_batches(arrays: list[tuple[Any, int]], rows: int, batch_size: int) -> Iterator[list[Any]]:
    """Random batches out of one array per shard, read by the `read` that each of them has for sorted row numbers."""
    rng = np.random.default_rng(0)
    firsts = np.array([first for _, first in arrays])
    while True:
        order = rng.permutation(rows)
        for start in range(0, rows - batch_size + 1, batch_size):
            chosen = np.sort(order[start : start + batch_size])
            shards = np.searchsorted(firsts, chosen, "right") - 1
            yield [arrays[s][0](chosen[shards == s] - firsts[s]) for s in np.unique(shards).tolist()]


def zarr_batches(cache: Cache, batch_size: int) -> Iterator[list[Any]]:
    """zarr-python's own random reads."""
    import zarr

    arrays: list[tuple[Any, int]] = [
        (zarr.open_group(cache.path / data, mode="r")["latents"], first) for data, first in shard_rows(cache)
    ]
    return selected_batches([(a.oindex.__getitem__, first) for a, first in arrays], len(cache), batch_size)


def tensorstore_batches(cache: Cache, batch_size: int) -> Iterator[list[Any]]:
    """tensorstore's own random reads."""
    import tensorstore

    def opened(data: str) -> Callable[[np.ndarray], Any]:
        store = {"driver": "file", "path": str(cache.path / data / "latents")}
        array = tensorstore.open({"driver": "zarr3", "kvstore": store}).result()
        return lambda rows: array[rows].read().result()

    return selected_batches([(opened(data), first) for data, first in shard_rows(cache)], len(cache), batch_size)


def webdataset_batches(cache: Cache, batch_size: int) -> Iterator[np.ndarray]:
    """webdataset's own pipeline, with a decoder that does no more than it must."""
    import webdataset

    tars = [str(cache.path / data) for data, _ in shard_rows(cache)]

    def decode(sample: dict[str, Any]) -> np.ndarray:
        return np.load(io.BytesIO(sample["latents.npy"]), allow_pickle=False)

    pipeline = webdataset.WebDataset(tars, shardshuffle=len(tars), seed=0, empty_check=False).shuffle(1000).map(decode)
    while True:
        samples = iter(pipeline)
        while len(batch := list(islice(samples, batch_size))) == batch_size:
            yield np.stack(batch)


def sequential_batches(cache: Cache, batch_size: int) -> Iterator[int]:
    """The shards' files read from their start to their end, as many bytes at a time as a batch has."""
    files = cache.field_files("latents").files
    buffer = bytearray(batch_size * ROW_BYTES)
    while True:
        for file in files:
            with Path(str(file.path)).open("rb", buffering=0) as opened:
                while opened.readinto(buffer) == len(buffer):
                    yield len(buffer)


def drop_from_page_cache(folder: Path) -> None:
    """Have the system forget the files, which nothing may have mapped."""
    gc.collect()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def rate(batches: Iterator[Any], count: int, batch_size: int) -> tuple[float, float]:
    """Rows per second, and CPU seconds per gigabyte, over `count` batches."""
    next(batches)
    start, cpu = time.perf_counter(), time.process_time()
    for _ in islice(batches, count):
        pass
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return count * batch_size / seconds, cpu / (count * batch_size * ROW_BYTES / 1e9)


def measure(
    ways: dict[str, tuple[Callable[[], Iterator[Any]], int]],
    rounds: int,
    batch_size: int,
    before: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Medians over `rounds` rounds in which the ways take turns, and each way's ratio to the first, round by round.

    A way is what makes its batches, and how many of them to time; `before` is called before each.
    """
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (make, count) in ways.items():
            before()
            batches = make()
            samples[name].append(rate(batches, count, batch_size))
            batches.close()  # type: ignore[attr-defined]
            del batches
    baseline = [rows for rows, _ in samples[next(iter(ways))]]
    return {
        name: {
            "rows_per_second": round(statistics.median(rows for rows, _ in runs)),
            "gigabytes_per_second": round(statistics.median(rows for rows, _ in runs) * ROW_BYTES / 1e9, 3),
            "cpu_seconds_per_gigabyte": round(statistics.median(cpu for _, cpu in runs), 3),
            "ratio": round(statistics.median(rows / base for (rows, _), base in zip(runs, baseline, strict=True)), 4),
        }
        for name, runs in samples.items()
    }


def warm_ways(folder: Path, arguments: argparse.Namespace) -> dict[str, tuple[Callable[[], Iterator[Any]], int]]:
    """Everything that is compared in the page cache: the baseline first."""
    size, count, few = arguments.batch_size, arguments.batches, arguments.slow_batches
    rows = Cache.open(folder).read(range(arguments.rows), ["latents"])["latents"]

    def loader(residency: str) -> CacheLoader:
        device = arguments.device if residency == "gpu" else "cpu"
        return CacheLoader(Cache.open(folder), ["latents"], size, residency=residency, device=device)

    mapped = Cache.open(folder)
    for _ in islice(copied_batches(mapped, size), arguments.rows // size):  # each page is mapped
        pass
    ready = {residency: loader(residency) for residency in ("gpu", "ram", "mmap")}
    for _ in ready["mmap"]:  # each page is mapped
        pass
    ways: dict[str, tuple[Callable[[], Iterator[Any]], int]] = {
        "gather, reused buffer": (lambda: gather_batches(rows, size, reuse=True), count),
        "gather, new arrays": (lambda: gather_batches(rows, size, reuse=False), count),
        "plain copy of mapped files": (lambda: copied_batches(mapped, size), count),
        f"loader, gpu on {arguments.device}": (ready["gpu"].forever, count),
        "loader, ram": (ready["ram"].forever, count),
        "loader, mmap": (ready["mmap"].forever, count),
        "loader, mmap, first epoch": (lambda: loader("mmap").forever(), len(ready["mmap"]) - 4),
    }
    if Cache.open(folder).manifest.format == "webdataset":
        return {**ways, "webdataset": (lambda: webdataset_batches(Cache.open(folder), size), few)}
    return {
        **ways,
        "zarr-python": (lambda: zarr_batches(Cache.open(folder), size), few),
        "tensorstore": (lambda: tensorstore_batches(Cache.open(folder), size), few),
    }


def cold_ways(folder: Path, arguments: argparse.Namespace) -> dict[str, tuple[Callable[[], Iterator[Any]], int]]:
    """Reading what is only on the disk: in sequence, which is the baseline, and by the loader in random order."""
    size, count = arguments.batch_size, arguments.rows // arguments.batch_size - 4

    def loader() -> Iterator[Any]:
        return CacheLoader(Cache.open(folder), ["latents"], size, residency="mmap").forever()

    return {
        "files in sequence": (lambda: sequential_batches(Cache.open(folder), size), count),
        "loader, mmap, random": (loader, count),
    }


def show(title: str, results: dict[str, Any]) -> None:
    print(f"{title:28}{'rows/s':>10}{'GB/s':>8}{'CPU s/GB':>10}{'ratio':>8}")
    for name, row in results.items():
        print(f"{name:28}{row['rows_per_second']:>10,}{row['gigabytes_per_second']:>8.2f}", end="")
        print(f"{row['cpu_seconds_per_gigabyte']:>10}{row['ratio']:>8.3f}")


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=("zarr", "webdataset", "both"), default="both")
    parser.add_argument("--rows", type=int, default=8192, help="rows of the cache (default 8192: 604 MB)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=128, help="batches timed per round and way")
    parser.add_argument("--slow-batches", type=int, default=8, help="the same, for readers other than kcache")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu", help="where residency gpu keeps its tables")
    parser.add_argument("--cold", action="store_true", help="read from the disk instead")
    parser.add_argument("--output", type=Path, help="where to write the JSON: a file or a folder")
    arguments = parser.parse_args(given)
    torch.set_num_threads(1)
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"zarr": Path(scratch) / "zarr", "webdataset": Path(scratch) / "webdataset"}
        write_synthetic_cache(folders["zarr"], arguments.rows, tables=("latents",))
        for form in FORMATS if arguments.format == "both" else (arguments.format,):
            folder = folders[form]
            if form != "zarr":
                convert_cache(folders["zarr"], folder, form)
            ways, before = warm_ways, lambda: None
            if arguments.cold:
                ways, before = cold_ways, partial(drop_from_page_cache, folder)
            results[form] = measure(ways(folder, arguments), arguments.rounds, arguments.batch_size, before)
            show(form, results[form])
    settings = {
        name: getattr(arguments, name)
        for name in ("rows", "batch_size", "batches", "slow_batches", "rounds", "device", "cold")
    }
    write_outcome(arguments.output, "loader", settings, results, "cold" if arguments.cold else "")


if __name__ == "__main__":
    main()
