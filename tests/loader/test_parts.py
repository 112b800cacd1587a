"""Parts: batches of one shape each, from any residency, for any number of processes, gone on with after any of them."""

import json
from collections import Counter
from collections.abc import Mapping
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from measuring.synthetic import write_synthetic_cache

from kcache import Cache
from kcache.errors import CacheMismatchError
from kcache.loader import CacheLoader
from kcache.loader.chance import epoch_order
from kcache.loader.course import Course
from kcache.loader.parts import Part
from kcache.loader.schedule import Schedule
from kcache.loader.streaming.streamed import StreamShape

SAMPLES = 90
BOUNDS = (0, 50, 52, 90)
SHAPES = ((640, 896), (896, 640), (768, 768))
STREAM = StreamShape(block_rows=2, lanes=2, window_blocks=3)
FIELDS = ["latents", "text_embeds"]
Batches = list[dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parts") / "cache"
    write_synthetic_cache(path, SAMPLES, dim=4, latent_side=2, captions=2, rows_per_shard=40)
    return path


@pytest.fixture(autouse=True)
def three_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbouring samples of the cache are of one shape; one shape has two samples only."""

    def parts(
        rows: Cache,
        fields: list[str],
        batch: int,
        *,
        seed: int,
        shuffle: str,
        stream: Any,
        dropouts: Mapping[str, float],
    ) -> list[Part]:
        return [
            Part(rows.select(range(*bounds)), fields, batch, Course(
                bounds[1] - bounds[0], seed, shuffle, stream, shape[0] << 16 | shape[1]
            ), seed, dropouts, shape)
            for bounds, shape in zip(pairwise(BOUNDS), SHAPES, strict=True)
        ]  # fmt: skip

    monkeypatch.setattr("kcache.loader.batches.parts_of", parts)


def loader(path: Path, batch: int = 4, **wishes: Any) -> CacheLoader:
    return CacheLoader(Cache.open(path), FIELDS, batch, seed=5, device="cpu", draws=turns_told, **wishes)


def turns_told(turns: np.ndarray, rows: object = None) -> dict[str, np.ndarray]:
    return {"turns": turns}


def numbers(path: Path, batches: Batches) -> list[list[int]]:
    """Which samples of the cache the batches consist of."""
    cache = Cache.open(path)
    known = {row.tobytes(): i for i, row in enumerate(cache.read(range(SAMPLES), ["latents"])["latents"])}
    return [[known[row.tobytes()] for row in batch["latents"].numpy()] for batch in batches]


def assert_equal(found: Batches, expected: Batches) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_batches_are_of_one_shape_and_nothing_is_missed_or_repeated(path: Path) -> None:
    """Four epochs: in a batch of 4 the shape of two samples has both of them."""
    whole = loader(path)
    assert whole.batches_until(4) == 4 * 50 // 4 + 4 + 4 * 38 // 4
    found = numbers(path, list(islice(whole.forever(), whole.batches_until(4))))
    for batch in found:
        assert len(batch) == (2 if 50 in batch else 4)
        assert len(set(np.searchsorted(BOUNDS, batch, side="right").tolist())) == 1
    assert Counter(sum(found, [])) == dict.fromkeys(range(SAMPLES), 4)
    first = [sample for batch in found for sample in batch if sample < 50][:50]
    assert first == epoch_order(5, 0, 50, "full", 640 << 16 | 896).tolist()


@pytest.mark.parametrize("residency", ["gpu", "mmap", "stream"])
def test_residency_changes_nothing(path: Path, residency: str) -> None:
    wishes: dict[str, Any] = {"shuffle": "stream", "shape": STREAM, "caption_dropout": 0.3}
    expected = list(islice(loader(path, residency="ram", **wishes).forever(), 60))
    if residency == "stream":
        wishes["stage_bytes"] = 1 << 24
    assert_equal(list(islice(loader(path, residency=residency, **wishes).forever(), 60)), expected)


@pytest.mark.parametrize("residency", ["ram", "stream"])
def test_processes_take_one_pass_each(path: Path, residency: str) -> None:
    """Three processes are one that takes three times as many batches."""
    wishes: dict[str, Any] = {"shuffle": "stream", "shape": STREAM, "residency": residency}
    one = list(islice(loader(path, **wishes).forever(), 30))
    three = [list(islice(loader(path, rank=rank, world_size=3, **wishes).forever(), 10)) for rank in range(3)]
    assert_equal([batch for step in zip(*three, strict=True) for batch in step], one)


@pytest.mark.parametrize("taken", [0, 1, 13, 30])
def test_a_run_goes_on_in_any_number_of_processes(path: Path, taken: int) -> None:
    whole = loader(path)
    batches = list(islice(whole.forever(), 40))
    running = loader(path)
    head = list(islice(running.forever(), taken))
    state = json.loads(json.dumps(running.state_dict()))
    assert state["version"] == 3
    tails = []
    for rank in range(2):
        resumed = loader(path, rank=rank, world_size=2)
        resumed.load_state_dict(state)
        tails.append(list(islice(resumed.forever(), (40 - taken) // 2)))
    found = head + [batch for step in zip(*tails, strict=True) for batch in step]
    assert_equal(found, batches[: len(found)])


def test_with_other_batches_each_shape_goes_on_behind_what_it_has_given(path: Path) -> None:
    """Twice, in the middle of epochs: after three of them nothing is missed or repeated but what waits."""
    state, found = None, []
    for batch, taken in ((4, 17), (7, 9), (3, None)):
        running = loader(path, batch)
        if state is not None:
            running.load_state_dict(state)
        found += numbers(path, list(islice(running.forever(), taken or running.batches_until(3))))
        state = running.state_dict()
    counts = Counter(sum(found, []))
    assert set(counts.values()) == {2, 3}
    assert [sum(counts[i] for i in range(*bounds)) for bounds in pairwise(BOUNDS)] == [
        bucket["taken"] for bucket in running.state_dict()["buckets"]
    ]
    assert 3 * SAMPLES - sum(counts.values()) <= 2 + 1 + 2


def test_an_epoch_has_every_sample_once_and_short_batches_last(path: Path) -> None:
    whole = loader(path)
    for _ in range(2):
        batches = list(whole)
        assert sorted(sum(numbers(path, batches), [])) == list(range(SAMPLES))
        assert [len(batch["latents"]) for batch in batches][-2:] == [2, 2]
        assert len(batches) == len(whole) == 13 + 1 + 10
    assert torch.cat([batch["turns"] for batch in batches]).tolist() == list(range(SAMPLES, 2 * SAMPLES))
    several = [loader(path, rank=rank, world_size=5) for rank in range(5)]
    epochs = [numbers(path, [*each, *each]) for each in several]
    assert {len(batches) for batches in epochs} == {(24 // 5) + (24 + 24 % 5) // 5}
    seen = Counter(sample for batches in epochs for batch in batches for sample in batch)
    assert set(seen.values()) <= {1, 2}


def test_other_samples_begin_with_the_next_epoch(path: Path) -> None:
    before = loader(path)
    list(islice(before.forever(), 30))
    state = before.state_dict()
    after = loader(path)
    after.begin_new_order(state, before.consumed)
    assert after.state_dict()["epoch"] == 2
    assert next(after.forever())["turns"][0] == before.consumed
    again = loader(path)
    again.load_state_dict(after.state_dict())
    assert again.standing == after.standing


def test_a_state_of_one_shape_is_none_of_several(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = loader(path).state_dict()
    monkeypatch.undo()
    single = loader(path)
    with pytest.raises(CacheMismatchError, match="is of samples of several shapes, this loader has samples of one"):
        single.load_state_dict(state)
    with pytest.raises(CacheMismatchError, match="several shapes"):
        single.load_state_dict({**state, "version": 3})


HOSTILE: list[tuple[str, Any]] = [
    ("epoch", -1), ("epoch", 1.5), ("epoch", "1"), ("epoch", True), ("epoch", None), ("epoch", 2**70),
    ("passes", -1), ("passes", 2**64), ("passes", float("nan")), ("first_turn", 2**62), ("first_turn", []),
    ("first_epoch", 3), ("buckets", None), ("buckets", []), ("buckets", [1, 2, 3]), ("buckets", {}), ("taken", -1),
    ("taken", 2**62), ("taken", 51), ("taken", 0.0), ("samples", 51), ("shape", [1, 2]), ("shape", "640x896"),
    ("version", 4), ("version", "3"), ("version", None), ("seed", 6), ("shuffle", "block"), ("shuffle", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), HOSTILE)
def test_a_state_that_cannot_be_is_refused(path: Path, name: str, value: Any) -> None:
    state = json.loads(json.dumps(loader(path).state_dict()))
    if name in ("taken", "samples", "shape"):
        state["buckets"][0][name] = value
    else:
        state[name] = value
    with pytest.raises(CacheMismatchError, match=r"expected|give it|go on with"):
        loader(path).load_state_dict(state)


@pytest.mark.parametrize("missing", ["version", "epoch", "passes", "buckets", "taken", "samples_digest"])
def test_a_state_that_lacks_something_is_refused(path: Path, missing: str) -> None:
    state = loader(path).state_dict()
    state.pop(missing, None)
    for bucket in state.get("buckets", []):
        bucket.pop(missing, None)
    with pytest.raises(CacheMismatchError, match=f"has no '{missing}'; expected what"):
        loader(path).load_state_dict(state)


def test_what_a_state_does_not_say_is_how_many_samples_a_batch_must_have(path: Path) -> None:
    state = loader(path).state_dict()
    assert [bucket["batch"] for bucket in state["buckets"]] == [4, 4, 4]
    assert state["buckets"][0] == {"shape": [640, 896], "samples": 50, "batch": 4, "taken": 0}
    assert Schedule([50, 2, 38], [4, 4, 4], 5).sizes == (4, 2, 4)
