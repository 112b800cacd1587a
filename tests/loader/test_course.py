"""The course: samples come as often as they have repeats, in any order, from anywhere, after any interruption."""

from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shaped_caches import ALL, write_shaped_cache

from kcache import Cache
from kcache.errors import CacheMismatchError
from kcache.loader import CacheLoader, chance
from kcache.loader.course import Course, Repeats, repeats_of
from kcache.loader.schedule import Schedule
from kcache.loader.state import changed_samples
from kcache.loader.streaming.streamed import StreamShape

STREAM = StreamShape(block_rows=2, lanes=2, window_blocks=3)
COUNTS = ((1.0, 1), (0.5, 3), (0.0, 1), (2.0, 2), (1.0, 1), (1.0, 40), (0.1, 3))
"""Weights and repeats of samples, over and over: one comes forty times."""
REPEATS = st.lists(st.sampled_from([1, 1, 1, 2, 3, 50]), min_size=1, max_size=60).map(
    lambda each: np.array(each, "<i4")
)


@given(repeats=REPEATS)
def test_an_epoch_has_all_samples_and_behind_them_round_by_round_those_that_come_again(repeats: np.ndarray) -> None:
    whole = Repeats(repeats)
    samples = whole.samples(np.arange(len(whole))).tolist()
    first = 0
    for again in range(repeats.max()):
        round_ = samples[first : first + int((repeats > again).sum())]
        assert sorted(round_) == np.flatnonzero(repeats > again).tolist()
        assert again or round_ == sorted(round_)
        assert round_ == sorted(round_, key=lambda i: (-repeats[i] if again else 0, i))  # neighbours stay neighbours
        first += len(round_)
    assert len(samples) == first == repeats.sum()


@given(
    repeats=REPEATS,
    seed=st.integers(0, 2**32),
    shuffle=st.sampled_from(["full", "block", "stream"]),
    processes=st.integers(1, 4),
    batch=st.integers(1, 9),
)
@settings(max_examples=60, deadline=None)
def test_in_each_epoch_a_sample_comes_as_often_as_it_has_repeats(
    repeats: np.ndarray, seed: int, shuffle: str, processes: int, batch: int
) -> None:
    """Whoever takes it: of all passes of three epochs the processes have every place once."""
    course = Course(len(repeats), seed, shuffle, STREAM, 0, repeats_of(repeats))
    assert len(course) == repeats.sum()
    schedule = Schedule([len(course)], [batch], seed, processes)
    passes = list(islice(schedule.forever(schedule.begin()), 3 * len(course) // (batch * processes) + 1))
    shares = [course.share(each, rank, processes) for each in passes for rank in range(processes)]
    places = np.concatenate([share.places for share in shares])
    turns = np.concatenate([share.turns for share in shares])
    assert sorted(turns.tolist()) == list(range(len(turns)))
    samples = np.concatenate([course.samples(share.places) for share in shares if len(share)])
    for epoch in range(3):
        counts = Counter(samples[places // len(course) == epoch].tolist())
        assert counts == dict(enumerate(repeats.tolist()))


@pytest.mark.parametrize("shuffle", ["full", "block", "stream"])
def test_without_repeats_there_is_no_array_and_the_order_is_that_of_before(shuffle: str) -> None:
    assert repeats_of(None) is None
    assert repeats_of(np.ones(50, np.int32)) is None
    plain, places = Course(50, 3, shuffle), np.arange(50)
    if shuffle != "stream":
        assert np.array_equal(plain.samples(places), chance.epoch_order(3, 0, 50, shuffle))
    told = Course(50, 3, shuffle, repeats=repeats_of(np.ones(50, np.int32)))
    assert np.array_equal(plain.samples(places), told.samples(places))


def test_ten_thousand_turns_of_one_sample_take_the_memory_of_one() -> None:
    repeats = np.ones(1000, np.int32)
    repeats[7] = 10_000
    whole = Repeats(repeats)
    assert sum(array.nbytes for array in vars(whole).values() if isinstance(array, np.ndarray)) < 100
    assert (whole.samples(np.arange(1000, len(whole))) == 7).all()
    # In a streamed order they are all over the epoch, as far as they do not fill it.
    course = Course(1000, 0, "stream", repeats=whole)
    at = np.flatnonzero(course.samples(np.arange(len(course))) == 7)
    assert np.diff(at).max() < 100


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty samples at two resolutions, the one of five shapes, with mirrored pictures."""
    folder = tmp_path_factory.mktemp("counted") / "cache"
    write_shaped_cache(folder, 30, ALL, flip=True, counts=COUNTS)
    return folder


def begun(cache: Cache, batch: int = 4, **wishes: Any) -> CacheLoader:
    def told(turns: np.ndarray, _: object = None) -> dict[str, np.ndarray]:
        return {"turns": turns}

    order: dict[str, Any] = {"seed": 3, "shuffle": "stream", "shape": STREAM, "draws": told}
    return CacheLoader(cache, ["latents", "text_embeds"], batch, **(order | wishes))


def known(cache: Cache) -> dict[bytes, tuple[str, Any]]:
    """By the bytes of their latents the names and shapes of samples."""
    found = {}
    for part in cache.by_shape("latents"):
        for mirrored in (False, True):
            rows = part.read(range(len(part)), ["latents"], mirrored=np.full(len(part), mirrored))["latents"]
            names = part.samples["name"].to_pylist()
            found |= {row.tobytes(): (name, row.shape) for row, name in zip(rows, names, strict=True)}
    return found


def seen(cache: Cache, batches: Iterable[dict[str, torch.Tensor]]) -> tuple[Counter[tuple[str, Any]], list[int]]:
    """How often each sample came at each shape, and the turns; each with its weight."""
    of, counts, turns = known(cache), Counter[tuple[str, Any]](), list[int]()
    for batch in batches:
        assert (batch["weight"].dtype, batch["weight"].shape) == (torch.float32, batch["turns"].shape)
        for row, weight in zip(batch["latents"].numpy(), batch["weight"].tolist(), strict=True):
            name, shape = of[row.tobytes()]
            counts[name, shape] += 1
            assert weight == np.float32(COUNTS[number(name) % len(COUNTS)][0])
        turns += batch["turns"].tolist()
    return counts, turns


def number(name: str) -> int:
    return int(name.removeprefix("sample "))


@pytest.mark.parametrize("residency", ["gpu", "ram", "mmap", "stream"])
@pytest.mark.parametrize("resolution", [(32,), (32, 64)], ids=["one shape", "several"])
def test_batches_have_each_sample_as_often_as_it_says_and_what_it_weighs(
    path: Path, residency: str, resolution: tuple[int, ...]
) -> None:
    cache = Cache.open(path, resolution)
    loader = begun(cache, residency=residency, stage_bytes=1 << 24 if residency == "stream" else None)
    for epoch in range(2):
        counts, turns = seen(cache, batches := list(loader))
        for (name, _), times in counts.items():
            assert times == COUNTS[number(name) % len(COUNTS)][1]
        assert len({name for name, _ in counts}) == 30
        assert turns == list(range(epoch * loader.turns, (epoch + 1) * loader.turns))
        assert len(batches) == len(loader)
    assert loader.turns == sum(counts.values())
    assert [each.get("turns", each["samples"]) for each in loader.shapes] == list(loader._schedule.counts)[
        : len(loader.shapes)
    ]


@pytest.mark.parametrize("resolution", [(32,), (32, 64)], ids=["one shape", "several"])
@pytest.mark.parametrize("shuffle", ["full", "stream"])
def test_a_run_goes_on_from_any_place_with_any_number_of_processes(
    path: Path, resolution: tuple[int, ...], shuffle: str
) -> None:
    cache = Cache.open(path, resolution)
    whole = list(islice(begun(cache, shuffle=shuffle).forever(), 90))
    for taken in (0, 1, 37, 62):
        loader = begun(cache, shuffle=shuffle)
        list(islice(loader.forever(), taken))
        state = loader.state_dict()
        two = len(resolution) == 1
        halves = [begun(cache, 2 if two else 4, shuffle=shuffle, rank=r, world_size=2) for r in (0, 1)]
        for half in halves:
            half.load_state_dict(state)
        rest = zip(*(islice(half.forever(), 28 if two else 14) for half in halves), strict=True)
        if two:
            rows = [sorted(map(bytes, torch.cat([a["latents"], b["latents"]]).numpy())) for a, b in rest]
        else:
            rows = [sorted(map(bytes, each["latents"].numpy())) for pair in rest for each in pair]
        assert rows == [sorted(map(bytes, each["latents"].numpy())) for each in whole[taken : taken + 28]]


def test_states_count_turns_and_other_repeats_are_other_samples(path: Path, tmp_path: Path) -> None:
    cache = Cache.open(path, 32)
    loader = begun(cache)
    turns = sum(COUNTS[i % len(COUNTS)][1] for i in range(30))
    list(islice(loader.forever(), turns // 4 + 1))
    state = loader.state_dict()
    assert (state["samples"], state["turns"], state["epoch"], state["samples_consumed"]) == (
        30,
        turns,
        1,
        4 - turns % 4,
    )
    assert loader.batches_until(5) == -(-(5 * turns - loader.consumed) // 4)
    several = begun(Cache.open(path, (32, 64)))
    list(islice(several.forever(), 60))
    after = begun(Cache.open(path, (32, 64)))
    after.begin_new_order(several.state_dict(), several.consumed)
    assert after.state_dict()["epoch"] == several.state_dict()["epoch"] + 1
    write_shaped_cache(tmp_path / "plain", 30, ALL, flip=True)
    plain = Cache.open(tmp_path / "plain", 32)
    assert changed_samples(state, plain) == "30 samples as before, but other pictures, captions, weights or repeats"
    assert "turns" not in begun(plain).state_dict()
    with pytest.raises(CacheMismatchError, match="other pictures, captions, weights or repeats"):
        begun(plain).load_state_dict(state)


def test_a_selection_keeps_what_its_samples_count(path: Path) -> None:
    """And batches have weights only where a sample has another than 1."""
    cache = Cache.open(path, 32)
    chosen = cache.where("weight in [0.1, 2] and repeats > 1")
    counts, _ = seen(chosen, begun(chosen))
    assert {number(name): times for (name, _), times in counts.items()} == {
        i: COUNTS[i % 7][1] for i in range(30) if i % 7 in (3, 6)
    }
    alike = cache.where("weight == 1").select([0, 3])
    loader = begun(alike)
    assert (loader.turns, loader.is_weighted) == (2, False)
    assert "weight" not in next(iter(loader))
    assert len(cache.where("not weight <= 0.1")) == sum(COUNTS[i % 7][0] > 0.2 for i in range(30))
    assert len(cache.where("weight < 1e300 and weight > -1e300")) == 30
