"""The streamed order: each sample once, any window known alone, the same for whoever reads it, and recorded."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kcache.loader.streaming.streamed import StreamOrder, StreamShape, share_of_lanes, stream_shape

RECORDED = ["3757aa6543cf46a4", "8fc135703a1d2bca", "07293d6415084555"]
SHAPES = st.builds(StreamShape, block_rows=st.integers(1, 5), lanes=st.integers(1, 6), window_blocks=st.integers(1, 4))


def whole(seed: int, epoch: int, samples: int, shape: StreamShape) -> np.ndarray:
    return StreamOrder(seed, epoch, samples, shape)[np.arange(samples)]


@given(samples=st.integers(1, 400), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 3), shape=SHAPES)
@settings(max_examples=100)
def test_every_sample_comes_once_and_any_part_is_known_alone(
    samples: int, seed: int, epoch: int, shape: StreamShape
) -> None:
    order = whole(seed, epoch, samples, shape)
    assert np.array_equal(np.sort(order), np.arange(samples))
    for first in (0, samples // 3, samples - 1):
        alone = StreamOrder(seed, epoch, samples, shape)[np.arange(first, min(first + 7, samples))]
        assert np.array_equal(alone, order[first : first + 7])


@given(samples=st.integers(1, 400), seed=st.integers(0, 2**32), shape=SHAPES)
@settings(max_examples=60)
def test_a_block_is_wanted_within_one_window_of_one_lane(samples: int, seed: int, shape: StreamShape) -> None:
    order, positions = whole(seed, 0, samples, shape), np.arange(samples)
    windows = shape.windows(positions, samples)
    last = samples // (shape.window_rows)
    assert windows.max() <= last
    for block in range(-(-samples // shape.block_rows)):
        at = positions[order // shape.block_rows == block]
        assert len(np.unique(windows[at])) == 1
        if windows[at[0]] < last:
            assert len(np.unique(at % shape.lanes)) == 1


def test_the_order_is_what_it_was() -> None:
    """Runs go on in it: another one would be another run."""
    orders = [whole(7, 2, samples, stream_shape(samples)) for samples in (1000, 20_000, 300_000)]
    found = [hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()[:16] for order in orders]
    assert found == RECORDED


def test_epochs_and_seeds_differ() -> None:
    shape = stream_shape(1000)
    orders = [whole(seed, epoch, 1000, shape) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert len({order.tobytes() for order in orders}) == 3


@pytest.mark.parametrize(("samples", "blocks"), [(1, 16), (65_535, 16), (65_536, 16), (131_072, 32), (10**8, 64)])
def test_a_small_cache_has_small_windows(samples: int, blocks: int) -> None:
    assert stream_shape(samples) == StreamShape(block_rows=16, lanes=64, window_blocks=blocks)


def test_samples_of_a_batch_are_hardly_ever_neighbours() -> None:
    """Of 64 lanes each gives one sample, and lanes share no block; beyond them chance decides: 15 of 1,023."""
    order = whole(0, 0, 300_000, stream_shape(300_000)) // 16
    inside = order[: 300_000 // 65_536 * 65_536]
    pairs = [len(batch) - len(np.unique(batch)) for batch in inside.reshape(-1, 64)]
    assert sum(pairs) == 0
    wide = [len(batch) - len(np.unique(batch)) for batch in inside.reshape(-1, 256)]
    assert np.mean(wide) == pytest.approx(64 * 6 * 15 / 1023, rel=0.1)  # six pairs of four samples of each lane


def test_the_state_of_a_hundred_million_samples_is_small() -> None:
    order = StreamOrder(0, 0, 10**8, stream_shape(10**8))
    first = order[np.arange(64)]
    assert len(np.unique(first)) == 64
    arrays = [value for value in vars(order).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in arrays) == 4 * 10**8 // 16


@given(world_size=st.integers(1, 8), lanes=st.integers(1, 12), batches=st.integers(1, 4), start=st.integers(0, 99))
def test_lanes_are_shared_out_evenly_or_not_at_all(world_size: int, lanes: int, batches: int, start: int) -> None:
    positions = np.arange(start, start + batches * lanes)
    shares = [share_of_lanes(positions, lanes, rank, world_size) for rank in range(world_size)]
    if lanes % world_size:
        assert shares == [None] * world_size
        return
    masks = np.array(shares)
    assert (masks.sum(0) == 1).all()
    assert (masks.sum(1) == len(positions) // world_size).all()
    owners = masks.argmax(0)
    for lane in range(lanes):
        assert len(set(owners[positions % lanes == lane].tolist())) == 1
    assert share_of_lanes(np.arange(batches * lanes + 1), lanes, 0, world_size) is None or lanes == 1
