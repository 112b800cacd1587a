"""Batches: every sample once an epoch, the same whoever reads them, and exactly resumable."""

import json
import threading
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measuring.synthetic import write_synthetic_cache

from kcache import Cache
from kcache.errors import CacheCorruptError, CacheMismatchError, ConfigError
from kcache.loader import CacheLoader
from kcache.loader.chance import draw_noise, epoch_order
from kcache.loader.state import changed_samples
from kcache.upkeep.convert import convert_cache

SAMPLES = 23
FIELDS = ["latents", "image_embeds", "text_embeds", "text_encoder_hidden_states"]


class Reread:
    """A cache that the loader does not know for one: it has no residency, every row is read and verified anew."""

    def __init__(self, cache: Cache) -> None:
        self.read, self.samples_digest, self.caption_bounds = cache.read, cache.samples_digest, cache.caption_bounds
        self.counts = cache.counts

    def __len__(self) -> int:
        return SAMPLES


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    path = tmp_path_factory.mktemp("loader") / "cache"
    write_synthetic_cache(path, SAMPLES, dim=4, latent_side=2, captions=3, rows_per_shard=8)
    return Cache.open(path)


def numbers(cache: Cache, batches: Iterator[dict[str, torch.Tensor]]) -> list[list[int]]:
    """Which samples the batches consist of, told from their latents."""
    known = {row.tobytes(): i for i, row in enumerate(cache.read(range(SAMPLES), ["latents"])["latents"])}
    return [[known[row.tobytes()] for row in batch["latents"].numpy()] for batch in batches]


def test_an_epoch_has_every_sample_once_and_a_short_last_batch(cache: Cache) -> None:
    loader = CacheLoader(cache, ["latents"], 5)
    first, second = numbers(cache, iter(loader)), numbers(cache, iter(loader))
    assert [len(batch) for batch in first] == [5, 5, 5, 5, 3]
    assert len(loader) == 5
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(SAMPLES))
    assert first != second


def test_forever_never_drops_a_sample_at_an_epochs_end(cache: Cache) -> None:
    batches = numbers(cache, islice(CacheLoader(cache, ["latents"], 5).forever(), SAMPLES))
    assert all(len(batch) == 5 for batch in batches)
    stream = sum(batches, [])
    for epoch in range(5):
        assert sorted(stream[epoch * SAMPLES : (epoch + 1) * SAMPLES]) == list(range(SAMPLES))


@pytest.fixture(scope="module")
def tars(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    path = tmp_path_factory.mktemp("loader") / "tars"
    convert_cache(cache.path, path, "webdataset", rows_per_shard=8)
    return Cache.open(path)


@given(
    residency=st.sampled_from(["gpu", "ram", "mmap"]),
    form=st.sampled_from(["zarr", "webdataset"]),
    shuffle=st.sampled_from(["full", "block"]),
    fields=st.lists(st.sampled_from(FIELDS), min_size=1, unique=True),
    batch_size=st.integers(1, 2 * SAMPLES),
    seed=st.integers(0, 2**32),
    caption_dropout=st.sampled_from([0.0, 0.4]),
    image_dropout=st.sampled_from([0.0, 0.4]),
)
@settings(max_examples=40, deadline=None)  # threads and files, on machines that are busy
def test_residency_and_format_do_not_change_batches(
    cache: Cache, tars: Cache, residency: str, form: str, fields: list[str], **wishes: Any
) -> None:
    """Two epochs: "mmap" does not verify the second again. `read`, which keeps nothing, gives what is expected."""
    chosen = Cache.open((cache if form == "zarr" else tars).path)
    loader = CacheLoader(chosen, fields, residency=residency, **wishes)
    plain = CacheLoader(cast(Cache, Reread(cache)), fields, **wishes)
    assert loader.residency == residency
    for _ in range(2):
        for a, b in zip(plain, loader, strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def test_processes_share_what_one_would_read(cache: Cache) -> None:
    """Two processes of batch 3 read what one of batch 6 reads, in the same order."""
    one = numbers(cache, islice(CacheLoader(cache, ["latents"], 6).forever(), 10))
    loaders = [CacheLoader(cache, ["latents"], 3, rank=rank, world_size=2) for rank in (0, 1)]
    two = [numbers(cache, islice(loader.forever(), 10)) for loader in loaders]
    assert [a + b for a, b in zip(*two, strict=True)] == one


@pytest.mark.parametrize(("batch_size", "world_size"), [(3, 2), (4, 3), (11, 2), (1, 4), (6, 4)])
def test_processes_see_equally_many_batches_of_an_epoch(cache: Cache, batch_size: int, world_size: int) -> None:
    ranks = [
        numbers(cache, iter(CacheLoader(cache, ["latents"], batch_size, rank=r, world_size=world_size)))
        for r in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    seen = sum((sum(batches, []) for batches in ranks), [])
    assert len(seen) == len(set(seen)) > SAMPLES - world_size


def test_state_resumes_after_any_batch_with_any_number_of_processes(cache: Cache) -> None:
    whole = numbers(cache, islice(CacheLoader(cache, ["latents"], 4).forever(), 20))
    for taken in (0, 1, 5, 6, 11):
        loader = CacheLoader(cache, ["latents"], 4)
        running = loader.forever()
        head = numbers(cache, islice(running, taken))
        state = loader.state_dict()
        halves = []
        for rank in (0, 1):
            resumed = CacheLoader(cache, ["latents"], 2, rank=rank, world_size=2)
            resumed.load_state_dict(state)
            halves.append(numbers(cache, islice(resumed.forever(), 20 - taken)))
        assert head + [a + b for a, b in zip(*halves, strict=True)] == whole


def test_resuming_within_an_epoch_gives_its_rest(cache: Cache) -> None:
    loader = CacheLoader(cache, ["latents"], 5)
    whole = numbers(cache, iter(CacheLoader(cache, ["latents"], 5)))
    running = iter(loader)
    next(running)
    resumed = CacheLoader(cache, ["latents"], 5)
    resumed.load_state_dict(loader.state_dict())
    assert numbers(cache, iter(resumed)) == whole[1:]
    assert resumed.state_dict()["epoch"] == 1


@pytest.mark.parametrize(("taken", "epoch"), [(0, 0), (1, 1), (3, 1), (11, 4)])
def test_a_new_order_begins_with_the_next_epoch_and_is_gone_on_with(cache: Cache, taken: int, epoch: int) -> None:
    """From 12 samples, 4 at a time, to all 23: one epoch of the new ones is one of a run that always had them."""
    before = CacheLoader(cache.select(range(12)), ["latents"], 4, seed=3)
    list(islice(before.forever(), taken))
    state, consumed = before.state_dict(), before.consumed
    assert changed_samples(state, cache) == "12 samples before, 23 now, 36 captions before, 69 now"
    turns: list[int] = []

    def draws(numbers: np.ndarray) -> dict[str, np.ndarray]:
        turns.extend(numbers.tolist())
        return {}

    def begun(**settings: Any) -> CacheLoader:
        loader = CacheLoader(cache, ["latents"], 5, seed=3, **settings)
        loader.begin_new_order(state, consumed)
        return loader

    loader = begun(draws=draws)
    assert loader.batches_until(epoch + 2) == 10  # of 46 samples, 5 at a time
    whole = numbers(cache, islice(loader.forever(), 9))
    order = epoch_order(3, epoch, 23, "full").tolist() + epoch_order(3, epoch + 1, 23, "full").tolist()
    assert sum(whole, []) == order[:45]
    assert sorted(turns)[:45] == list(range(consumed, consumed + 45))

    again = begun()
    head = numbers(cache, islice(again.forever(), 6))
    resumed = CacheLoader(cache, ["latents"], 5, seed=3)
    resumed.load_state_dict(json.loads(json.dumps(again.state_dict())))
    assert head + numbers(cache, islice(resumed.forever(), 3)) == whole
    assert resumed.state_dict() == loader.state_dict()


def test_another_order_is_refused(cache: Cache) -> None:
    state = CacheLoader(cache, ["latents"], 4, seed=1).state_dict()
    with pytest.raises(CacheMismatchError, match="has seed 1, this loader has 2"):
        CacheLoader(cache, ["latents"], 4, seed=2).load_state_dict(state)
    with pytest.raises(CacheMismatchError, match="23 samples as before, but other pictures, captions, w"):
        CacheLoader(cache, ["latents"], 4, seed=1).load_state_dict({**state, "samples_digest": "0"})


def test_captions_are_all_used_and_depend_on_the_turn_alone(cache: Cache) -> None:
    def embeds(batch_size: int) -> np.ndarray:
        batches = islice(CacheLoader(cache, ["text_embeds"], batch_size, seed=4).forever(), 60 // batch_size)
        return np.concatenate([batch["text_embeds"].numpy() for batch in batches])

    assert (embeds(4) == embeds(6)).all()
    assert len(np.unique(embeds(4), axis=0)) > SAMPLES


@pytest.mark.parametrize("residency", ["gpu", "ram", "mmap"])
def test_dropout_takes_the_reserved_rows_and_changes_nothing_else(cache: Cache, residency: str) -> None:
    fields = ["latents", "image_embeds", "text_embeds", "text_encoder_hidden_states"]

    def stream(**dropout: float) -> list[dict[str, torch.Tensor]]:
        loader = CacheLoader(Cache.open(cache.path), fields, 1, seed=2, residency=residency, **dropout)
        return list(islice(loader.forever(), 200))

    drop = np.array([True])
    reserved = cache.read([0], fields, drop_caption=drop, drop_image=drop)
    dropped = {"caption": 0, "image": 0}
    for plain, other in zip(stream(), stream(caption_dropout=0.25, image_dropout=0.5), strict=True):
        assert torch.equal(plain["latents"], other["latents"])
        for condition, names in {"caption": fields[2:], "image": fields[1:2]}.items():
            is_reserved = [np.array_equal(other[name], reserved[name]) for name in names]
            assert len(set(is_reserved)) == 1
            dropped[condition] += is_reserved[0]
            assert is_reserved[0] or all(torch.equal(plain[name], other[name]) for name in names)
    assert 35 <= dropped["caption"] <= 65
    assert 80 <= dropped["image"] <= 120


def test_draws_join_the_batch_by_turn(cache: Cache) -> None:
    loader = CacheLoader(cache, ["latents"], 4, draws=lambda turns: {"noise": draw_noise(0, turns, (2,))})
    noise = torch.cat([batch["noise"] for batch in islice(loader.forever(), 8)])
    assert torch.equal(noise, torch.from_numpy(draw_noise(0, np.arange(32), (2,))))


@pytest.mark.parametrize("residency", ["gpu", "ram", "mmap"])
def test_a_corrupt_row_stops_the_loop_with_its_name(tmp_path: Path, residency: str) -> None:
    write_synthetic_cache(tmp_path / "c", 9, dim=4, latent_side=2)
    damaged = Cache.open(tmp_path / "c")
    file = damaged.field_files("latents").files[0].path
    content = bytearray(file.read_bytes())
    content[40] ^= 4
    file.write_bytes(content)
    with pytest.raises(CacheCorruptError, match="latents/c/0/0/0/0 is corrupt in the row at byte 32"):
        list(CacheLoader(Cache.open(tmp_path / "c"), ["latents"], 2, residency=residency))


@pytest.mark.parametrize("free", [10**12, 0])
def test_mapped_rows_are_verified_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """Whether the tables fit into memory or not."""
    monkeypatch.setattr("kcache.loader.residency.free_memory", lambda: free)
    write_synthetic_cache(tmp_path / "c", 9, dim=4, latent_side=2)
    opened = Cache.open(tmp_path / "c")
    loader = CacheLoader(opened, ["latents"], 2, residency="mmap")
    list(loader)
    file = opened.field_files("latents").files[0].path
    content = file.read_bytes()
    with file.open("r+b") as damaged:  # in place: the loader has mapped this very file
        damaged.seek(40)
        damaged.write(bytes([content[40] ^ 4]))
    with pytest.raises(CacheCorruptError, match="is corrupt in the row at byte 32"):
        list(loader)


def test_leaving_the_loop_early_ends_the_thread(cache: Cache) -> None:
    import threading

    before = threading.active_count()
    for _ in CacheLoader(cache, ["latents"], 1).forever():
        break
    assert threading.active_count() == before


def test_the_time_spent_waiting_is_counted(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count()
    monkeypatch.setattr("kcache.loader.batches.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    loader = CacheLoader(cache, ["latents"], 5)
    assert loader.waited == 0
    list(islice(loader.forever(), 4))
    assert loader.waited == 4  # of that clock, which goes on by one whenever it is read


def test_wrong_settings_are_refused(cache: Cache, tmp_path: Path) -> None:
    for wrong in (
        {"batch_size": 0},
        {"rank": 2, "world_size": 2},
        {"shuffle": "none"},
        {"residency": "tape"},
        {"image_dropout": 2},
    ):
        with pytest.raises(ConfigError, match="expected"):
            CacheLoader(cache, ["latents"], **{"batch_size": 1, **wrong})


class Silent(Reread):
    """One whose rows never come."""

    def __init__(self, cache: Cache) -> None:
        super().__init__(cache)
        self.silence = threading.Event()
        self.read = self._wait

    def _wait(self, *_: Any, **__: Any) -> Any:
        self.silence.wait()


@pytest.mark.timeout(30)
def test_a_wait_can_be_ended_and_whoever_hangs_is_left_behind(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kcache.loader.batches.POLL_SECONDS", 0.01)
    monkeypatch.setattr("kcache.stopping.LAST_WORD_SECONDS", 0.01)
    silent, seconds = Silent(cache), list[float]()
    loader = CacheLoader(silent, ["latents"], 5)

    def look(waited: float) -> None:
        seconds.append(waited)
        if len(seconds) == 3:
            raise KeyboardInterrupt

    loader.while_waiting = look
    with pytest.raises(KeyboardInterrupt):
        next(loader.forever())
    assert seconds == sorted(seconds)
    assert loader.consumed == 0
    assert [thread for thread in threading.enumerate() if thread.name.startswith("kcache-loader")] != []
    silent.silence.set()
