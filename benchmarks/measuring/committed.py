"""What a build of many samples finds committed, and what it does then: rows that nobody encoded, samples in columns.

Only what a build reads is there: commit records and side files, whose shards have no data. Keys are random, as digests
are, and come from the parts of a source; those of captions are those of the pictures with all bits turned.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np

from kcache.build.build import _counts
from kcache.build.departures import beside_earlier
from kcache.build.finish import finish_build
from kcache.build.pictures.sizes import PictureSizes
from kcache.build.plan import freeze_plan
from kcache.build.survey import Survey, missing_rows
from kcache.config import BuildConfig
from kcache.sources import Source
from kcache.store.digests import Keys, Positions, pack_keys
from kcache.store.formats.checksums import crc32c
from kcache.store.formats.columns import SAMPLES_PER_TABLE, Samples, sample_schema
from kcache.store.formats.shard_files import CommittedFile
from kcache.store.formats.side_files import side_dtype, side_name
from kcache.store.index import open_index, tally_of
from kcache.store.manifest import read_manifest
from kcache.store.recipe import TEXT, Recipe, kind_of
from kcache.store.shaped.wants import Wants, squares_of
from kcache.store.shards import record_commit

HAS = 0.99
"""Of the samples that a source offers, as many the cache has."""


def recipes_of(seed: Path) -> dict[str, Recipe]:
    """Those of a small cache."""
    return {name: entry.recipe for name, entry in read_manifest(seed).tables.items()}


def write_committed(cache: Path, recipes: dict[str, Recipe], parts: list[Path], rows: int, per_shard: int) -> None:
    """Commit `rows` rows of each table, and the reserved ones."""
    for name, recipe in recipes.items():
        folder, kind = cache / recipe.directory, kind_of(name)
        folder.mkdir(parents=True)
        reserved = pack_keys(() if kind.reserved is None else (kind.reserved,))
        for number, keys in enumerate(_runs(parts, rows, per_shard)):
            own = np.concatenate([reserved if not number else reserved[:0], ~keys if name == TEXT.name else keys])
            side = np.zeros(len(own), side_dtype(recipe.fields))
            side["key"] = own
            for field in recipe.fields:
                size = 2 * int(np.prod(field.shape)) * (10 if field.ragged else 1)
                side[field.name]["offset"], side[field.name]["length"] = np.arange(len(own)) * size, size
            stem = f"{number:05d}-{number:016x}"
            np.save(folder / side_name(stem), side)
            content = (folder / side_name(stem)).read_bytes()
            files = [CommittedFile(path=side_name(stem), bytes=len(content), crc32c=crc32c(content))]
            record_commit(folder, stem[:5], recipe, rows=len(own), data=stem, files=files, provenance={})


def _runs(parts: list[Path], rows: int, most: int) -> Iterator[np.ndarray]:
    """The first `rows` keys of some parts, at most so many together, no run of two parts."""
    for path in parts:
        keys = np.load(path)[:rows]
        rows -= len(keys)
        yield from (keys[first : first + most] for first in range(0, len(keys), most))


def in_columns(parts: list[Path], samples: int, side: int) -> Samples:
    """The first samples of a source, with a name and a caption of its own each, and pictures of one size."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def tables() -> Iterator[pa.Table]:
        first = 0
        for keys in _runs(parts, samples, SAMPLES_PER_TABLE):
            numbers = pc.cast(pa.array(np.arange(first, first + len(keys))), pa.string())
            captions = pc.binary_join_element_wise("a picture of the thing with the number", numbers, " ")
            names = pc.binary_join_element_wise("pictures/", numbers, ".jpg", "")
            bounds, sides = pa.array(np.arange(len(keys) + 1, dtype=np.int32)), np.full(len(keys), side, np.int32)
            columns = [
                pa.array([""] * len(keys)), names, _binary(keys), pa.ListArray.from_arrays(bounds, captions),
                pa.ListArray.from_arrays(bounds, _binary(~keys)), pa.array(sides), pa.array(sides),
            ]  # fmt: skip
            yield pa.table(columns, schema=sample_schema())
            first += len(keys)

    return Samples(tables())


def _binary(keys: np.ndarray) -> Any:
    import pyarrow as pa

    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(keys), [None, pa.py_buffer(keys.tobytes())])


def a_job(cache: Path, recipes: dict[str, Recipe], samples: Samples, before: Samples) -> Survey:
    """What a survey would have found out about a source of `samples`."""
    numbers = np.arange(len(samples))
    return Survey(
        folder=cache, config=BuildConfig(device="cpu"), source=cast("Source", None), samples=samples,
        positions=Positions(samples.image_keys, numbers), refused=[], repositories={}, recipes=recipes,
        wants=Wants(squares_of(recipes)), controls={}, earlier=recipes, notes=(), before=before,
    )  # fmt: skip


Peak = Callable[[], int]


@contextmanager
def _timed(found: dict[str, Any], step: str, peak: Peak) -> Iterator[None]:
    start = time.perf_counter()
    yield
    found |= {f"{step}_seconds": time.perf_counter() - start, f"{step}_peak_bytes": peak()}


def finish(cache: Path, recipes: dict[str, Recipe], parts: list[Path], samples: int, peak: Peak) -> dict[str, Any]:
    """All that makes committed rows a cache."""
    found: dict[str, Any] = {}
    offered = in_columns(parts, samples, 64)
    job = a_job(cache, recipes, offered, offered)
    with _timed(found, "committed", peak):
        committed = job.committed()
    with _timed(found, "finish", peak):
        manifest = finish_build(job, committed.tables, PictureSizes(job, lambda _: None))
    with _timed(found, "tally", peak):
        tally_of(cache, manifest, open_index(cache, manifest))
    found["samples_file_bytes"] = (cache / manifest.samples_file).stat().st_size
    return found


def rebuild(cache: Path, recipes: dict[str, Recipe], parts: list[Path], samples: int, peak: Peak) -> dict[str, Any]:
    """Everything up to a frozen plan, of a source with `samples`, beside a cache that has most of them."""
    found: dict[str, Any] = {}
    job = a_job(cache, recipes, in_columns(parts, samples, 0), Samples(()))
    found["begun_peak_bytes"] = peak()
    with _timed(found, "departures", peak):
        job = beside_earlier(job)
    with _timed(found, "committed", peak):
        committed = job.committed()
    with _timed(found, "count", peak):
        _counts(job, committed)
    with (
        _timed(found, "plan", peak),
        mock.patch("kcache.build.survey.check_request"),
        mock.patch.object(Survey, "repository"),
    ):
        plan = missing_rows(job, committed.tables, retry=False, seen={})
    with _timed(found, "freeze", peak):
        freeze_plan(cache, plan)
    new = samples - int(HAS * samples)
    if plan.rows != new * len(recipes) or len(job.leaving) or not isinstance(plan.tables[0].keys, Keys):
        raise SystemExit(f"the plan has {plan.rows} rows, {len(job.leaving)} samples leave; expected {new} and none")
    return found
