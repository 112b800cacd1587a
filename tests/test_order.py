"""The order of an epoch: every sample once, the same for the same seed, another for another epoch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kcache.order import BLOCK_ROWS, epoch_order


@given(seed=st.integers(0, 2**63), epoch=st.integers(0, 1000), samples=st.integers(1, 300))
@pytest.mark.parametrize("shuffle", ["full", "block"])
def test_every_sample_once_and_always_the_same(shuffle: str, seed: int, epoch: int, samples: int) -> None:
    order = epoch_order(seed, epoch, samples, shuffle)
    assert sorted(order.tolist()) == list(range(samples))
    assert (order == epoch_order(seed, epoch, samples, shuffle)).all()


@pytest.mark.parametrize("shuffle", ["full", "block"])
def test_epochs_and_seeds_differ(shuffle: str) -> None:
    order = epoch_order(0, 0, 1000, shuffle)
    assert (order != epoch_order(0, 1, 1000, shuffle)).any()
    assert (order != epoch_order(1, 0, 1000, shuffle)).any()


def test_block_shuffle_reads_whole_windows_of_blocks() -> None:
    order = epoch_order(0, 0, 40_000, "block")
    window = np.sort(order[:16_384])
    assert (np.unique(window // BLOCK_ROWS, return_counts=True)[1] == BLOCK_ROWS).all()
    assert (np.diff(order) == 1).mean() < 0.01
