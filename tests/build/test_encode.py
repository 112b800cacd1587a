"""Encoding shards: rows in plan order and of the same bits however batches fall, and where the time went."""

import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_builds import build, copy_pictures, digests, encoded

from kcache import Cache
from kcache.build.build import BuildResult
from kcache.build.work.meter import Input, Meter
from kcache.encoders.frozen import TextEncoder
from kcache.encoders.online import OnlineEncoders
from kcache.loader import CacheLoader
from kcache.sources import open_source
from kcache.store.shards import read_commits
from kcache.upkeep.compare import compare_online
from kcache.upkeep.repair import repair_cache

PICTURES = 5
WORDS = [[1, 60, 3], [20, 2], [7, 6, 5], [1, 80, 12, 70], [30]]
"""Words of each picture's captions: some of the same padded length, some longer than the tokenizer takes."""
FIELDS = ["text_embeds", "text_encoder_hidden_states"]


@pytest.fixture(scope="module")
def source(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_pictures(oracle, tmp_path_factory.mktemp("encoding") / "pictures", PICTURES)
    for i, counts in enumerate(WORDS):
        captions = [
            " ".join(["red", "circle", "blue"][(i + c + w) % 3] for w in range(n)) for c, n in enumerate(counts)
        ]
        (folder / f"img_{i:02d}.txt").write_text("\n".join(captions))
    return folder


@pytest.fixture(scope="module")
def trimmed(source: Path, oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BuildResult, list]:
    """A cache with trimmed captions, what its build said, and the padded lengths of each batch that was encoded."""
    folder, batches, encode = tmp_path_factory.mktemp("trimmed") / "cache", [], TextEncoder.encode

    def recorded(encoder: TextEncoder, prepared: list) -> Any:
        batches.append([encoder.batch_shape(caption)[1] for caption in prepared])
        return encode(encoder, prepared)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextEncoder, "encode", recorded)
        result = build(source, folder, oracle, stage="prior", text_padding="trimmed")
    return folder, result, batches


def texts(cache: Path) -> dict[str, np.ndarray]:
    """The rows of every caption, by sample, number of the caption and field."""
    whole = Cache.open(cache)
    return {
        f"{sample} {caption} {name}": rows
        for sample in range(len(whole))
        for caption in range(int(np.diff(whole.caption_bounds)[sample]))
        for name, rows in whole.read([sample], FIELDS, caption).items()
    }


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], rows) for name, rows in expected.items())


def test_trimmed_captions_give_the_rows_of_padded_ones(
    trimmed: tuple, source: Path, oracle: Path, tmp_path: Path
) -> None:
    build(source, tmp_path / "full", oracle, stage="prior")
    padded = texts(tmp_path / "full")
    found = texts(trimmed[0])
    assert found.keys() == padded.keys()
    for name, rows in padded.items():
        np.testing.assert_allclose(found[name], rows, rtol=0, atol=1e-6)
    assert encoded(build(source, tmp_path / "full", oracle, stage="prior", text_padding="trimmed")) == {"text": 13}


def test_batches_hold_captions_of_one_length_and_are_full(trimmed: tuple) -> None:
    _, result, batches = trimmed
    lengths = [length for batch in batches for length in batch]
    assert len(lengths) == encoded(result)["text"] == 13
    assert all(len(set(batch)) == 1 for batch in batches)
    assert len(batches) == sum(-(-lengths.count(length) // 4) for length in set(lengths))
    assert {8, 16, 77} <= set(lengths) <= {*range(8, 77, 8), 77}


def test_cache_info_tells_of_trimming(
    trimmed: tuple, kcache_command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert kcache_command("cache-info", str(trimmed[0])) == 0
    assert capsys.readouterr().out.count("batches of 4 × 77, captions trimmed to the next multiple of 8 tokens") == 1


def test_rows_are_stored_in_the_order_of_the_plan(trimmed: tuple, source: Path) -> None:
    cache = Cache.open(trimmed[0])
    recipe = cache.recipes["text"]
    [commit] = read_commits(trimmed[0] / recipe.directory, recipe)
    keys = [bytes(row["key"]) for row in np.load(trimmed[0] / recipe.directory / f"{commit.stem}.rows.npy")]
    wanted = [key for sample in cache.samples["caption_keys"].to_pylist() for key in sample]
    assert keys[1:] == list(dict.fromkeys(wanted))


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_no_plan_nor_order_changes_a_trimmed_row(
    trimmed: tuple, source: Path, oracle: Path, tmp_path: Path, form: str
) -> None:
    settings = {"stage": "prior", "text_padding": "trimmed", "format": form}
    if form == "zarr":
        build(source, tmp_path / "again", oracle, num_workers=1, **settings)
        assert digests(tmp_path / "again") == digests(trimmed[0])
    # A few captions first, the others by a later plan, in shards of three.
    build(source, tmp_path / "cut", oracle, max_train_samples=2, rows_per_shard=3, **settings)
    build(source, tmp_path / "cut", oracle, rows_per_shard=3, **settings)
    assert_same(texts(tmp_path / "cut"), texts(trimmed[0]))


def test_trimmed_rows_are_those_of_the_encoders_in_the_loop(trimmed: tuple, source: Path) -> None:
    differences = compare_online(str(source), trimmed[0], PICTURES, device="cpu")
    assert {(d.field, d.absolute) for d in differences} == {(name, 0.0) for name in ["image_embeds", *FIELDS]}
    cache = Cache.open(trimmed[0])
    online = OnlineEncoders(cache, open_source(str(source)), [*FIELDS, "image_embeds"], torch.device("cpu"))
    loaders = [CacheLoader(rows, [*FIELDS, "image_embeds"], 4, seed=1, caption_dropout=0.3) for rows in (cache, online)]
    for cached, now in zip(*loaders, strict=True):
        assert all(torch.equal(cached[name], now[name]) for name in cached)


def test_repair_encodes_trimmed_captions_again(trimmed: tuple, source: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(trimmed[0], tmp_path / "cache"))
    before = texts(cache)
    [states] = cache.glob("text-*/00000*/text_encoder_hidden_states/c/0/0")
    content = bytearray(states.read_bytes())
    content[40] ^= 1
    states.write_bytes(content)
    assert repair_cache(str(source), cache, device="cpu").encoded == {"text": 1}
    assert_same(texts(cache), before)


def test_the_time_adds_up_by_table(trimmed: tuple, source: Path, oracle: Path) -> None:
    _, result, _ = trimmed
    for table in ("image_embeds", "text"):
        seconds = result.tables[table].seconds
        assert seconds.keys() == {"decode", "encode", "write", "held_up"}
        assert 0 <= seconds["held_up"] <= seconds["decode"]
        assert seconds["encode"] > 0
        assert sum(seconds[stage] for stage in ("decode", "encode", "write")) <= result.seconds
    nothing = build(source, trimmed[0], oracle, stage="prior", text_padding="trimmed")
    assert [table.seconds for table in nothing.tables.values()] == [{}, {}]


class Late(Future):
    """An input that is decoded at `ready`, and awaited by turning the clock to then."""

    def __init__(self, clock: list[float], ready: float) -> None:
        super().__init__()
        self._clock, self._ready = clock, ready

    def done(self) -> bool:
        return self._clock[0] >= self._ready

    def result(self, timeout: float | None = None) -> Input:
        self._clock[0] = max(self._clock[0], self._ready)
        return Input(b"", ready=self._ready)

    def exception(self, timeout: float | None = None) -> None:
        return None


@pytest.mark.parametrize(
    ("behind", "lacking", "held_up"),
    [
        ([], 1, 0),  # nothing else is decoded
        ([12, 20], 1, 0),  # later than the first one
        ([6, 7], 3, 0),  # too few for a batch
        ([6, 3], 2, 10 - 6),  # enough for a batch from 6 on
        ([1, 2, 3], 2, 10 - 5),  # enough for a batch all the while
    ],
)
def test_waiting_with_a_batch_at_hand_is_told_apart(behind: list[float], lacking: int, held_up: float) -> None:
    clock = [5.0]
    meter = Meter(clock=lambda: clock[0])
    inputs = [Late(clock, ready) for ready in behind]
    meter.decoded(Late(clock, 10.0), inputs, lacking)
    assert (meter.seconds["decode"], meter.held_up) == (5.0, held_up)
    meter.decoded(Late(clock, 8.0), inputs, lacking)  # decoded already: no wait
    assert (meter.seconds["decode"], meter.held_up) == (5.0, held_up)


def test_stages_are_timed_even_when_they_fail() -> None:
    clock = [0.0]
    meter = Meter(clock=lambda: clock[0])

    def work(seconds: float, error: Exception | None = None) -> Callable[[], float]:
        def run() -> float:
            clock[0] += seconds
            if error:
                raise error
            return clock[0]

        return run

    assert meter.timed("encode", work(3.0)) == 3.0
    with pytest.raises(OSError, match="full"):
        meter.timed("write", work(1.0, OSError("full")))
    assert meter.shares() == {"decode": 0.0, "encode": 0.75, "write": 0.25}
