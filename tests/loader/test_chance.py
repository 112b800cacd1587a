"""Draws depend on the seed and the sample's turn and on nothing else; an epoch has every sample once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kcache.loader.chance import (
    BLOCK_ROWS,
    draw_choice,
    draw_dropout,
    draw_noise,
    draw_seed,
    draw_timesteps,
    epoch_order,
)


@given(seed=st.integers(0, 2**63), start=st.integers(0, 2**40), cut=st.integers(0, 8))
def test_a_batch_can_be_cut_anywhere(seed: int, start: int, cut: int) -> None:
    turns = np.arange(start, start + 8)
    for draw in (
        lambda t: draw_noise(seed, t, (3, 2)),
        lambda t: draw_timesteps(seed, t, 1000),
        lambda t: draw_choice(seed, t, np.full(len(t), 7)),
        lambda t: draw_dropout(seed, t, "caption", 0.5),
        lambda t: draw_dropout(seed, t, "image", 0.5),
    ):
        assert (draw(turns) == np.concatenate([draw(turns[:cut]), draw(turns[cut:])])).all()


def test_turns_and_seeds_differ() -> None:
    noise = draw_noise(0, np.arange(50), (16,))
    assert len(np.unique(noise)) == noise.size
    assert (noise != draw_noise(1, np.arange(50), (16,))).all()


def test_further_draws_are_new_and_leave_the_first_as_it_is() -> None:
    turns = np.arange(40, 60)
    noise, timesteps = draw_noise(3, turns, (8,), 4), draw_timesteps(3, turns, 2**62, 4)
    assert noise.shape == (80, 8)
    assert len(np.unique(noise)) == noise.size
    assert len(np.unique(timesteps)) == 80
    assert (noise[::4] == draw_noise(3, turns, (8,))).all()
    assert (timesteps[::4] == draw_timesteps(3, turns, 2**62)).all()
    assert (noise.reshape(20, 4, 8)[:, :2].reshape(40, 8) == draw_noise(3, turns, (8,), 2)).all()


def test_distributions() -> None:
    turns = np.arange(20_000)
    noise = draw_noise(7, turns, (4,))
    assert noise.dtype == np.float32
    assert noise.mean() == pytest.approx(0, abs=0.02)
    assert noise.std() == pytest.approx(1, abs=0.02)
    timesteps = draw_timesteps(7, turns, 10)
    assert timesteps.dtype == np.int64
    assert np.bincount(timesteps, minlength=10).min() > 1800
    assert len(np.bincount(timesteps)) == 10


def test_choice_stays_below_the_count_and_uses_all() -> None:
    counts = np.tile([1, 2, 5], 1000)
    choice = draw_choice(0, np.arange(3000), counts)
    assert (choice < counts).all()
    assert (choice[counts == 1] == 0).all()
    assert set(choice[counts == 5].tolist()) == {0, 1, 2, 3, 4}


def test_dropouts_have_their_probability_and_are_independent() -> None:
    turns = np.arange(10_000)
    caption, image = draw_dropout(3, turns, "caption", 0.1), draw_dropout(3, turns, "image", 0.1)
    assert caption.dtype == image.dtype == np.bool_
    assert caption.mean() == pytest.approx(0.1, abs=0.01)
    assert image.mean() == pytest.approx(0.1, abs=0.01)
    assert (caption & image).mean() == pytest.approx(0.01, abs=0.005)
    assert not draw_dropout(3, turns, "caption", 0.0).any()
    assert draw_dropout(3, turns, "image", 1.0).all()


def test_a_higher_probability_drops_more_and_keeps_what_was_dropped() -> None:
    few, more = (draw_dropout(0, np.arange(1000), "caption", probability) for probability in (0.1, 0.3))
    assert (more | ~few).all()
    assert more.sum() > few.sum()


def test_values_are_pinned() -> None:
    """The streams are part of what a seed means: a change of them must be a decision."""
    assert draw_noise(3, np.array([5]), (2,)).tolist() == [[1.8629230260849, 0.924121081829071]]
    assert draw_timesteps(3, np.array([5, 6, 7]), 1000).tolist() == [996, 865, 919]
    assert draw_choice(3, np.arange(12), np.full(12, 5)).tolist() == [0, 4, 2, 2, 4, 1, 0, 4, 1, 2, 0, 4]
    assert np.flatnonzero(draw_dropout(3, np.arange(40), "caption", 0.1)).tolist() == [26, 28, 33]
    assert np.flatnonzero(draw_dropout(3, np.arange(40), "image", 0.1)).tolist() == [0, 35, 37]


def test_seeds_of_generators_differ_by_seed_and_turn() -> None:
    seeds = [draw_seed(seed, turn) for seed in range(4) for turn in range(50)]
    assert len(set(seeds)) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert draw_seed(3, 7) == draw_seed(3, 7)


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
