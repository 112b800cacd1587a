"""Damage of every kind to every kind of file: never a wrong value, and nothing that verifying overlooks."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from faults import Fault, Sweep, cuts, file_kind, flips, losses
from measuring.synthetic import write_synthetic_cache

from kcache.build.dataset_card import CARD
from kcache.store.samples import Refusal
from kcache.upkeep.convert import convert_cache

FLIPS = 240
"""Per form of a cache; benchmarks/integrity.py puts many more."""


@pytest.fixture(scope="module", params=["zarr", "webdataset"])
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four samples in one or two shards per table, or in two tars, and a refused input."""
    folder = tmp_path_factory.mktemp("small") / "zarr"
    refused = [Refusal(name="a.png", stage="decode", reason="the file is cut off")]
    write_synthetic_cache(folder, 4, dim=4, latent_side=2, rows_per_shard=4, refused=refused)
    if request.param == "webdataset":
        convert_cache(folder, folder.parent / "webdataset", "webdataset", rows_per_shard=3)
    return folder.parent / request.param


def sweep(cache: Path, faults: Iterator[Fault], loader_every: int) -> dict[str, int]:
    """Put all faults into the cache; returns how many were put into each kind of file."""
    swept = Sweep(cache)
    for number, fault in enumerate(faults):
        swept.put(fault, loader=number % loader_every == 0)
    assert swept.silent == []
    return {kind: counts["faults"] for kind, counts in swept.caught.items()}


def kinds(cache: Path) -> set[str]:
    files = {path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file()}
    return {file_kind(path) for path in files - {CARD}}


def test_no_flip_is_silent(cache: Path) -> None:
    put = sweep(cache, flips(cache, FLIPS, seed=0), loader_every=8)
    assert sum(put.values()) == FLIPS
    assert set(put) == kinds(cache)
    assert min(put.values()) >= 20


def test_no_cut_is_silent(cache: Path) -> None:
    put = sweep(cache, islice(cuts(cache), 0, None, 3), loader_every=8)
    assert sum(put.values()) > 100


def test_no_loss_is_silent(cache: Path) -> None:
    put = sweep(cache, losses(cache), loader_every=1)
    assert set(put) == kinds(cache)
