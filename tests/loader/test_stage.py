"""Streaming: the batches of any other residency, within the memory it was given, each byte asked for once."""

import logging
import re
import shutil
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from in_bucket import put
from measuring.synthetic import write_synthetic_cache

from kcache import Cache
from kcache.errors import CacheCorruptError, CacheMismatchError, ConfigError
from kcache.loader import CacheLoader
from kcache.loader.streaming.beside import Streamed, make_stages
from kcache.loader.streaming.fetches import Layout
from kcache.loader.streaming.ranges import Ranges
from kcache.loader.streaming.stage import Arrival, Stage
from kcache.loader.streaming.streamed import StreamShape
from kcache.places.bucket import BucketPath
from kcache.upkeep.convert import convert_cache

if TYPE_CHECKING:
    from faulty_s3 import Faults

SAMPLES = 300
FIELDS = ["latents", "image_embeds", "text_embeds", "text_encoder_hidden_states"]
SHAPE = StreamShape(block_rows=4, lanes=4, window_blocks=3)
Batches = list[dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stage") / "cache"
    write_synthetic_cache(path, SAMPLES, dim=4, latent_side=2, rows_per_shard=130)
    return path


@pytest.fixture(scope="module")
def tars(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tars = tmp_path_factory.mktemp("stage") / "tars"
    convert_cache(path, tars, "webdataset", rows_per_shard=130)
    return tars


@pytest.fixture(scope="module")
def many_captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stage") / "captions"
    write_synthetic_cache(path, 60, dim=4, latent_side=2, rows_per_shard=50, captions=3)
    return path


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[Stage]:
    """The stages that loaders make."""
    made = []

    def remember(self: Stage, *arguments: Any, begin: Any = Stage.__init__) -> None:
        begin(self, *arguments)
        made.append(self)

    monkeypatch.setattr(Stage, "__init__", remember)
    return made


def loader(cache: Path | str | BucketPath | Cache, batch_size: int = 8, **wishes: Any) -> CacheLoader:
    opened = cache if isinstance(cache, Cache) else Cache.open(cache)
    defaults = {"shuffle": "stream", "residency": "stream", "shape": SHAPE, "stage_bytes": 1 << 24}
    return CacheLoader(opened, wishes.pop("fields", FIELDS), batch_size, **(defaults | wishes))


def assert_equal(found: Batches, expected: Batches) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert list(a) == list(b)
        assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@given(
    form=st.sampled_from(["path", "tars", "many_captions"]),
    fields=st.lists(st.sampled_from(FIELDS), min_size=1, unique=True),
    batch_size=st.integers(1, 70),
    seed=st.integers(0, 2**32),
    caption_dropout=st.sampled_from([0.0, 0.4]),
    image_dropout=st.sampled_from([0.0, 0.4]),
    lanes=st.integers(1, 5),
    selected=st.booleans(),
)
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_batches_are_those_of_rows_in_memory(
    request: pytest.FixtureRequest, form: str, fields: list[str], lanes: int, selected: bool, **wishes: Any
) -> None:
    """Two epochs, and beyond; at a time all samples, or every third."""
    cache = Cache.open(request.getfixturevalue(form))
    if selected:
        cache = cache.select(range(1, len(cache), 3))
    wishes |= {"fields": fields, "shape": StreamShape(block_rows=4, lanes=lanes, window_blocks=3)}
    count = 2 * len(cache) // wishes["batch_size"] + 2
    streamed = list(islice(loader(cache, **wishes).forever(), count))
    assert_equal(streamed, list(islice(loader(cache, residency="ram", **wishes).forever(), count)))


@pytest.mark.parametrize("taken", [0, 5, 11])
def test_any_processes_go_on_with_the_same_samples(path: Path, taken: int) -> None:
    """Two of them share out the lanes, three do not."""
    whole = list(islice(loader(path, 12, residency="ram").forever(), 30))
    first = loader(path, 12)
    head = list(islice(first.forever(), taken))
    assert_equal(head, whole[:taken])
    state = first.state_dict()
    for world_size in (2, 3):
        parts = []
        for rank in range(world_size):
            resumed = loader(path, 12 // world_size, rank=rank, world_size=world_size)
            resumed.load_state_dict(state)
            parts.append(list(islice(resumed.forever(), 30 - taken)))
        for batches, expected in zip(zip(*parts, strict=True), whole[taken:], strict=True):
            rows = torch.cat([batch["latents"] for batch in batches]).numpy()
            assert sorted(row.tobytes() for row in rows) == sorted(row.tobytes() for row in expected["latents"].numpy())


def test_the_first_batch_asks_for_its_own_part_of_a_large_index(
    path: Path, stages: list[Stage], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Which grows, so that the samples of the first window come in several runs; and each comes once, all the same."""
    monkeypatch.setattr("kcache.store.formats.index_files._SOON", 0)
    monkeypatch.setattr("kcache.loader.parts._MUCH", 0)
    runs: list[int] = []
    plan = Stage._fetches
    monkeypatch.setattr(Stage, "_fetches", lambda *given: runs.append(len(given[1])) or plan(*given))
    shape = StreamShape(block_rows=4, lanes=4, window_blocks=8)
    batches = loader(path, shape=shape).forever()
    found = list(islice(batches, 60))
    assert runs[:4] == [8, 32, 88, 128]
    batches.close()
    assert_equal(found, list(islice(loader(path, residency="ram", shape=shape).forever(), 60)))
    assert "streaming" not in caplog.text


def test_another_shape_is_another_order(path: Path) -> None:
    state = loader(path).state_dict()
    assert state["stream"] == {"block_rows": 4, "lanes": 4, "window_blocks": 3}
    other = StreamShape(block_rows=4, lanes=4, window_blocks=2)
    with pytest.raises(CacheMismatchError, match=r"has stream .*'window_blocks': 3.*, this loader has .*: 2"):
        loader(path, shape=other).load_state_dict(state)


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 8), (1, 5), (2, 4), (4, 3), (2, 2), (4, 1)])
@pytest.mark.parametrize("form", ["path", "tars"])
def test_each_byte_is_asked_for_once_an_epoch(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, form: str, world_size: int, batch_size: int
) -> None:
    """By all processes together, where they share out the lanes: in 48 × 6 samples no window is cut short."""
    asked: dict[Any, list[tuple[int, int]]] = defaultdict(list)

    def fetch(self: Ranges, place: Any, start: int, length: int, real: Any = Ranges.fetch) -> Any:
        asked[place].append((start, length))
        return real(self, place, start, length)

    monkeypatch.setattr(Ranges, "fetch", fetch)
    cache = Cache.open(request.getfixturevalue(form)).select(range(288))
    for rank in range(world_size):
        list(loader(cache, batch_size, rank=rank, world_size=world_size))
    total = 0
    for place, ranges in asked.items():
        times = np.zeros(place.stat().st_size, np.int8)
        for start, length in ranges:
            times[start : start + length] += 1
        assert times.max() == 1, place
        total += len(ranges)
    wanted = sum(int(cache.index[cache.table_of(name)][name]["length"][:288].sum()) for name in FIELDS)
    fetched = sum(length for ranges in asked.values() for _, length in ranges)
    assert wanted <= fetched
    # A block is a request: one for each field in zarr, one for all fields in tars, and one more at a shard's border.
    blocks = 288 // 4 * (len(FIELDS) if form == "path" else 1)
    assert blocks <= total <= blocks * 1.1


def least(error: str) -> int:
    found = re.search(r"expected at least ([\d,]+)", error)
    assert found is not None
    return int(found[1].replace(",", ""))


@pytest.mark.parametrize("wishes", [{}, {"fields": ["latents"]}, {"caption_dropout": 0.5}, {"batch_size": 200}])
def test_memory_stays_within_the_least_that_is_named(path: Path, stages: list[Stage], wishes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--stage-bytes is 1 bytes; expected at least") as refused:
        loader(path, stage_bytes=1, **wishes)
    assert stages == []
    given = least(str(refused.value))
    with pytest.raises(ConfigError, match=f"expected at least {given:,}"):
        loader(path, stage_bytes=given - 1, **wishes)
    assert_equal(list(loader(path, stage_bytes=given, **wishes)), list(loader(path, residency="ram", **wishes)))
    assert 0 < stages[0].most_bytes <= given
    assert stages[0].held_bytes <= given


def test_half_of_the_free_memory_is_taken_unless_it_is_said(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"bytes": 0}
    monkeypatch.setattr("kcache.loader.streaming.ration.free_memory", lambda: free["bytes"])
    with pytest.raises(ConfigError, match="half of the free memory, a share per process, is 0 bytes") as refused:
        loader(path, stage_bytes=None)
    free["bytes"] = 2 * least(str(refused.value))
    loader(path, stage_bytes=None)
    free["bytes"] -= 2
    with pytest.raises(ConfigError, match="half of the free memory"):
        loader(path, stage_bytes=None)


def test_texts_longer_than_any_that_were_counted_are_read_in_parts(
    path: Path, monkeypatch: pytest.MonkeyPatch, stages: list[Stage]
) -> None:
    """What a window takes is estimated; where it takes more, rows wait until others are gone."""
    expected = list(loader(path, residency="ram"))
    monkeypatch.setattr(Layout, "mean_bytes", lambda self, name: 40.0)
    monkeypatch.setattr(Layout, "most_bytes", lambda self, name: 240)
    with pytest.raises(ConfigError) as refused:
        loader(path, stage_bytes=1)
    given = least(str(refused.value))
    assert_equal(list(loader(path, stage_bytes=given)), expected)
    assert stages[0].most_bytes <= given


def test_a_bucket_gives_what_a_disk_gives(path: Path, bucket: str) -> None:
    put(path, bucket)
    streamed = loader(bucket)
    assert_equal(list(streamed), list(loader(path, residency="ram")))
    assert streamed.waits.keys() == {"store", "verification", "copying"}
    assert sum(streamed.waits.values()) == pytest.approx(streamed.waited)


def test_bytes_that_changed_on_their_way_are_asked_for_again(path: Path, faulty: "Faults", stages: list[Stage]) -> None:
    put(path, faulty.url)
    cache = Cache.open(faulty.url)
    faulty.rates["wrong_bytes"] = 0.05  # so that hardly any range is wrong four times in a row, which is damage
    assert_equal(list(loader(cache)), list(loader(path, residency="ram")))
    assert 0 < stages[0].refetched <= faulty.happened["wrong_bytes"]


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("bit", r"is corrupt in the row of latents at byte 512, key KEY: crc32c is \w{8}, expected \w{8}; .*--repair"),
        ("cut", "is corrupt in the row of latents at byte .*, key .*: the file ends .* before"),
        ("gone", "is not there; if the cache was copied, finish that, else build the cache again"),
    ],
)
@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_damage_is_named(
    path: Path, tmp_path: Path, bucket: str, stages: list[Stage], where: str, harm: str, said: str
) -> None:
    root: Any = put(path, bucket) if where == "bucket" else Path(shutil.copytree(path, tmp_path / "cache"))
    cache = Cache.open(root)
    key = cache.samples["image_key"][16].as_py().hex()
    file: Any = cache.field_files("latents").files[0].path
    if harm == "bit":
        _harm(file, lambda content: content[:520] + bytes([content[520] ^ 1]) + content[521:])
    elif harm == "cut":
        _harm(file, lambda content: content[: len(content) // 2])
    else:
        file.unlink() if where == "disk" else file.store.delete(file.key)
    with pytest.raises(CacheCorruptError, match=said.replace("KEY", key)) as raised:
        list(loader(cache))
    assert str(file) in str(raised.value)
    assert stages[-1].refetched >= (3 if harm == "bit" else 0)
    assert alive() == set()


def _harm(file: Any, change: Any) -> None:
    if isinstance(file, BucketPath):
        file.store.put(file.key, change(file.read_bytes()))
    else:
        content = change(file.read_bytes())
        file.chmod(0o644)
        file.write_bytes(content)


def alive() -> set[str]:
    """Threads of ours, but for the one that tells who waits, which stays."""
    return {t.name for t in threading.enumerate() if t.name.startswith("kcache") and t.name != "kcache-watch"}


def test_whoever_stops_early_leaves_no_thread(path: Path, bucket: str) -> None:
    put(path, bucket)
    for cache in (path, bucket):
        batches = loader(cache).forever()
        next(batches)
        assert "kcache-stage" in alive()
        batches.close()
        assert alive() == set()


def test_what_lies_apart_is_said_once(
    many_captions: Path, path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING, "kcache.loader.streaming.stage")
    monkeypatch.setattr(
        "kcache.loader.streaming.fetches._ALONE", 0.02
    )  # blocks at the borders of small shards are more than 1 %
    list(loader(path))
    list(loader(path, caption_dropout=0.3, image_dropout=0.3))
    assert caplog.messages == []
    list(islice(loader(many_captions).forever(), 400))
    assert caplog.messages == []  # a small cache, and for all that a long run
    monkeypatch.setattr("kcache.loader.streaming.stage.ENOUGH_ROWS", 240)
    list(loader(many_captions))
    assert caplog.messages == []  # and a short one
    list(islice(loader(many_captions).forever(), 40))
    (said,) = caplog.messages
    assert re.match(r"streaming: \d\.\d% of the rows take a request for themselves, and 2\.\d\d bytes are read", said)
    monkeypatch.setattr("kcache.loader.streaming.fetches.GAP_BYTES", 0)
    list(islice(loader(many_captions).forever(), 40))
    assert re.match(
        r"streaming: \d\d\.\d% of the rows take a request for themselves, and 1.0\d bytes", caplog.messages[1]
    )


def test_waits_are_told_apart() -> None:
    def parts(came: float, ready: float) -> Iterator[float]:
        return iter(Arrival(came, ready).parts(10.0, 16.0).values())

    assert list(parts(11, 13)) == [1, 2, 3]  # the store, verification, copying
    assert list(parts(5, 12)) == [0, 2, 4]
    assert list(parts(5, 6)) == [0, 0, 6]
    assert list(parts(12, 20)) == [2, 4, 0]
    assert list(parts(20, 21)) == [6, 0, 0]


@pytest.mark.timeout(30)
def test_a_program_that_ends_waits_for_no_rows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it ends in the middle of a pass, pools of threads take nothing any more, and those that wait are joined."""
    cache = Cache.open(put(path, "memory://ends/cache"))
    monkeypatch.setattr("concurrent.futures.thread._shutdown", True)
    wishes = (np.arange(8), np.zeros(8, np.int64), {})
    [new_stage] = make_stages([Streamed(cache, FIELDS, SHAPE, 8, len(cache))], 1, 1 << 24)
    stage = new_stage(iter([wishes]))
    with closing(stage), pytest.raises(RuntimeError, match="shutdown"):
        stage.take(0, 8, np.empty)
