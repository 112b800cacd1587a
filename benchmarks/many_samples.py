"""What a hundred million samples take: planning them, their index, opening, a first batch; time and memory.

    python benchmarks/many_samples.py --samples 10000000
    python benchmarks/many_samples.py --samples 100000000 --output benchmarks/results

Each step runs in a process of its own, whose peak of memory is told; what it maps of files and has not changed is told
apart. Nothing is encoded: keys are random, as digests are, and come in parts of a million, as a survey by many machines
leaves them; the shards are all one real shard of tiny rows, by hard links, so that what is read is verified as ever.
Then the decoder's rows are given files of their own, and the way from opening to the first batches is measured with
nothing of the cache in the system's memory: streamed, mapped, in a full shuffle, and of a selection.
Ceilings for a hundred million on two cores: planning 15 minutes and 8 GB, opening 3 s and 1 GB,
the first batch of a streamed order 2 s.
"""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measuring.record import write_outcome
from measuring.synthetic import write_synthetic_cache

from kcache import Cache
from kcache.build.plan import Plan, freeze_plan, open_plan, plan_table
from kcache.loader import CacheLoader
from kcache.store.digests import Keys
from kcache.store.formats.columns import SAMPLES_PER_TABLE, sample_schema
from kcache.store.formats.parts import Rows
from kcache.store.index import CAPTION_BOUNDS, open_index, write_index
from kcache.store.manifest import MANIFEST, read_manifest, write_manifest
from kcache.training.validation import split_by_key

PART = 1_000_000
"""Samples in a part of the source."""
SHARD = 50_000
"""Rows in a shard: such a one of latents at 768 pixels would have 3.7 GB, fourteen times what they have."""
STAGE_BYTES = 1 << 30
DECODER = ["image_embeds", "latents"]
FIELDS = ["image_embeds", "text_embeds", "text_encoder_hidden_states", "latents"]


def make_source(scratch: Path, samples: int) -> dict[str, Any]:
    """The keys of the samples' images, in parts."""
    rng = np.random.default_rng(0)
    for part in range(-(-samples // PART)):
        rows = min(PART, samples - part * PART)
        np.save(scratch / f"keys-{part:04d}.npy", np.frombuffer(rng.bytes(16 * rows), np.uint8).reshape(-1, 16))
    return {}


def plan(scratch: Path, samples: int) -> dict[str, Any]:
    """The parts joined, what is missing of them cut into shards, and the plan frozen and opened again."""
    cache = scratch / "planned"
    cache.mkdir()
    start = time.perf_counter()
    keys = Keys(np.concatenate([np.load(path) for path in sorted(scratch.glob("keys-*.npy"))]))
    joined = time.perf_counter()
    recipe = read_manifest(scratch / "seed").tables["image_embeds"].recipe
    stored = np.sort(keys.packed[: samples // 10].view("S16").reshape(-1)).view(np.uint8).reshape(-1, 16)
    table = plan_table(recipe, keys, Keys(stored), (), rows_per_shard=SHARD, first_shard=0)
    planned = time.perf_counter()
    freeze_plan(cache, made := Plan(tables=(table,)))
    frozen = time.perf_counter()
    found = open_plan(cache)
    if found is None or (found.digest, found.rows) != (made.digest, samples - samples // 10):
        raise SystemExit("the plan that was opened is not the one that was frozen")
    return {
        "join_seconds": joined - start, "plan_seconds": planned - joined, "freeze_seconds": frozen - planned,
        "open_plan_seconds": time.perf_counter() - frozen, "shards": len(table.shards),
    }  # fmt: skip


def make_cache(scratch: Path, samples: int) -> dict[str, Any]:
    """A cache of as many samples: its shards are links to those of a small one."""
    start = time.perf_counter()
    seed, cache, count = scratch / "seed", scratch / "cache", -(-samples // SHARD)
    manifest = read_manifest(seed)
    cache.mkdir()
    tables, indexed, arrays = {}, dict[str, Rows](), open_index(seed, manifest, whole=True)
    for name, entry in manifest.tables.items():
        [shard] = entry.shards
        names = [f"{entry.recipe.directory}/{i:05d}-{shard.data.rpartition('-')[2]}" for i in range(count)]
        (cache / entry.recipe.directory).mkdir()
        for path in names:
            for file in sorted(file for file in (seed / shard.data).rglob("*") if file.is_file()):
                link = cache / path / file.relative_to(seed / shard.data)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.hardlink_to(file)
        shards = tuple(replace(shard, name=f"{i:05d}", data=path) for i, path in enumerate(names))
        tables[name] = replace(entry, rows=count * shard.rows, bytes=count * shard.bytes, shards=shards)
        indexed[name] = entries(arrays[name], samples, reserved=not name.startswith("latents"))
    linked = time.perf_counter()
    indexed[CAPTION_BOUNDS] = Rows(np.dtype(np.int64), samples + 1, bounds(samples))
    digest = write_index(cache, indexed, in_parts=True)
    written = time.perf_counter()
    made = replace(manifest, tables=tables, samples=samples, index_digest=digest)
    write_manifest(cache, made, None)
    return {
        "link_seconds": linked - start, "index_seconds": written - linked,
        "manifest_seconds": time.perf_counter() - written,
        "index_bytes": sum(path.stat().st_size for path in (cache / made.index_folder).iterdir()),
        "manifest_bytes": (cache / "manifest.json").stat().st_size,
    }  # fmt: skip


def entries(seed: np.ndarray, samples: int, *, reserved: bool) -> Rows:
    """The index of a table of as many samples, each shard of which is the seed's."""

    def runs() -> Iterator[np.ndarray]:
        for first in range(0, samples, SHARD):
            run = seed[: min(SHARD, samples - first)].copy()
            run["shard"] = first // SHARD
            yield run
        if reserved:
            yield seed[-1:]

    return Rows(seed.dtype, samples + reserved, runs())


def bounds(samples: int) -> Iterator[np.ndarray]:
    """Where captions begin, of samples with one each."""
    for first in range(0, samples + 1, PART):
        yield np.arange(first, min(first + PART, samples + 1), dtype=np.int64)


def read(scratch: Path, samples: int) -> dict[str, Any]:
    """The cache opened, and batches of it: in the order of a full shuffle."""
    begun = memory()
    start = time.perf_counter()
    cache = Cache.open(scratch / "cache")
    opened, open_memory = time.perf_counter(), memory()
    batches = CacheLoader(cache, FIELDS, 64, residency="mmap").forever()
    next(batches)
    first, first_memory = time.perf_counter(), memory()
    taken = []
    for _ in range(300):
        began = time.perf_counter()
        next(batches)
        taken.append(time.perf_counter() - began)
    return {
        "open_seconds": opened - start, "open_anonymous_bytes": open_memory - begun,
        "first_batch_seconds": first - opened, "first_batch_anonymous_bytes": first_memory - begun,
        "batch_milliseconds_first_100": 1e3 * float(np.median(taken[:100])),
        "batch_milliseconds_last_100": 1e3 * float(np.median(taken[-100:])),
    }  # fmt: skip


def make_samples(scratch: Path, samples: int) -> dict[str, Any]:
    """The list of the samples of `make_cache`: random keys, sides of 256 to 1279 pixels, one of a thousand captions."""
    import pyarrow.parquet as pq

    cache, rng = scratch / "cache", np.random.default_rng(1)
    made = cache / "samples.parquet"
    with pq.ParquetWriter(made, sample_schema(), compression="zstd") as writer:
        for first in range(0, samples, 16 * SAMPLES_PER_TABLE):
            writer.write_table(some_samples(first, min(16 * SAMPLES_PER_TABLE, samples - first), rng))
    with made.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    manifest = replace(read_manifest(cache), samples_file_digest=digest)
    made.rename(cache / manifest.samples_file)
    write_manifest(cache, manifest, (cache / MANIFEST).read_bytes())
    return {"bytes": (cache / manifest.samples_file).stat().st_size}


def some_samples(first: int, count: int, rng: np.random.Generator) -> Any:
    """Samples `first` to `first` + `count` in columns."""
    import pyarrow as pa

    def binary(rows: np.ndarray) -> Any:
        return pa.FixedSizeBinaryArray.from_buffers(pa.binary(rows.shape[1]), len(rows), [None, pa.py_buffer(rows)])

    def text(rows: np.ndarray) -> Any:
        ends = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
        return pa.StringArray.from_buffers(len(rows), pa.py_buffer(ends), pa.py_buffer(np.ascontiguousarray(rows)))

    keys, caption_keys = (np.frombuffer(rng.bytes(16 * count), np.uint8).reshape(-1, 16) for _ in range(2))
    hexadecimal = np.frombuffer(b"0123456789abcdef", np.uint8)
    names = (np.arange(first, first + count)[:, None] // 10 ** np.arange(8, -1, -1) % 10 + ord("0")).astype(np.uint8)
    captions = pa.array([f"a caption, number {i}" for i in range(1000)]).take(pa.array(rng.integers(1000, size=count)))
    ends = pa.array(np.arange(count + 1, dtype=np.int32))
    sides = [pa.array(rng.integers(256, 1280, count, dtype=np.int32)) for _ in range(2)]
    ids = text(hexadecimal[np.stack([keys >> 4, keys & 15], axis=2).reshape(count, 32)])
    lists = [pa.ListArray.from_arrays(ends, each) for each in (captions, binary(caption_keys))]
    return pa.table([ids, text(names), binary(keys), *lists, *sides], schema=sample_schema())


def own_rows(scratch: Path, samples: int) -> dict[str, Any]:
    """Each shard of what the decoder reads as files of its own, so that the disk has to give what is read."""
    size = 0
    for table in ("image_embeds", "latents-16"):
        folder = (scratch / "cache" / read_manifest(scratch / "cache").tables[table].shards[0].data).parent
        for path in sorted(file for file in folder.rglob("*") if file.is_file()):
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(content)
            size += len(content)
    os.sync()
    return {"bytes": size}


def begin(
    scratch: Path,
    samples: int,
    residency: str = "stream",
    shuffle: str = "stream",
    where: str = "",
    held_out: float = 0,
) -> dict[str, Any]:
    """What the decoder reads, from opening to the first batches, with nothing of it in the system's memory yet."""
    for path in sorted(file for file in (scratch / "cache").rglob("*") if file.is_file()):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before, start = memory(), time.perf_counter()
    cache = Cache.open(scratch / "cache")
    cache = cache.where(where) if where else cache
    cache = split_by_key(cache, held_out)[0] if held_out else cache
    opened = time.perf_counter()
    batches = CacheLoader(cache, DECODER, 64, shuffle=shuffle, residency=residency, stage_bytes=STAGE_BYTES).forever()
    next(batches)
    first, first_memory = time.perf_counter(), memory()
    moments = [first]
    for _ in range(2000):
        next(batches)
        moments.append(time.perf_counter())
    taken = np.diff(moments)
    return {
        "samples": len(cache), "open_seconds": opened - start, "first_batch_seconds": first - start,
        "first_batch_anonymous_bytes": first_memory - before, "anonymous_bytes": memory() - before,
        "next_100_seconds": float(taken[:100].sum()), "longest_seconds": float(taken.max()),
        "batch_milliseconds_last_1000": 1e3 * float(np.mean(taken[-1000:])),
    }  # fmt: skip


def memory() -> int:
    """Memory of this process that no file gives back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


STEPS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "make_source": make_source, "plan": plan, "make_cache": make_cache, "read": read,
    "make_samples": make_samples, "own_rows": own_rows, "begin_stream": begin,
    "begin_mmap": partial(begin, residency="mmap"), "begin_full": partial(begin, residency="mmap", shuffle="full"),
    "begin_where": partial(begin, where="width >= 512"), "begin_val_fraction": partial(begin, held_out=0.01),
}  # fmt: skip


def step(name: str, scratch: Path, samples: int) -> dict[str, Any]:
    """What a step measures, in a process of its own, with its seconds and its peak of memory."""
    words = [sys.executable, __file__, "--samples", str(samples), "--step", name, "--scratch", str(scratch)]
    ran = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(ran.stdout))


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=PART)
    parser.add_argument("--scratch", type=Path, help="a folder with 350 bytes of room for each sample")
    parser.add_argument("--steps", choices=STEPS, nargs="+", default=list(STEPS), help="only these, in their order")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="where to write the JSON: a file or a folder")
    arguments = parser.parse_args(given)
    if arguments.step:
        start = time.perf_counter()
        found = STEPS[arguments.step](arguments.scratch, arguments.samples)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        print(json.dumps({**found, "seconds": time.perf_counter() - start, "peak_bytes": peak, "anonymous": memory()}))
        return
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        scratch = Path(folder)
        write_synthetic_cache(scratch / "seed", SHARD, dim=8, latent_side=2, rows_per_shard=SHARD + 1)
        results = {}
        for name in arguments.steps:
            results[name] = step(name, scratch, arguments.samples)
            told = [f"{key} {value:,.3f}" for key, value in results[name].items()]
            print(f"{name}: {', '.join(told)}", flush=True)
    write_outcome(arguments.output, "many_samples", vars(arguments), results, str(arguments.samples))


if __name__ == "__main__":
    main()
