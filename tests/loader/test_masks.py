"""Masks depend on the seed and the turn alone, have holes of all sizes, and grow as the stock pipeline grows them."""

import hashlib

import numpy as np
import pytest
import torch
from diffusers.pipelines.kandinsky2_2.pipeline_kandinsky2_2_inpainting import prepare_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kcache.loader import draw_masks, draw_noise, masks
from kcache.loader.masks import grow
from kcache.loader.turns import draw_turns

TURNS = np.arange(2000)
SIDES = st.integers(1, 24)


@given(seed=st.integers(0, 2**63), start=st.integers(0, 2**40), cut=st.integers(0, 6), height=SIDES, width=SIDES)
def test_a_mask_is_of_its_turn_alone_and_has_a_hole(seed: int, start: int, cut: int, height: int, width: int) -> None:
    turns = np.arange(start, start + 6)
    drawn, exact = (draw_masks(seed, turns, height, width, growth=growth) for growth in (True, False))
    parts = [draw_masks(seed, some, height, width) for some in (turns[:cut], turns[cut:])]
    assert drawn.shape == (6, 1, height, width)
    assert drawn.dtype == np.float32
    assert (drawn == np.concatenate(parts)).all()
    assert np.isin(drawn, (0, 1)).all()
    assert (drawn == grow(exact)).all()
    assert (exact.min((1, 2, 3)) == 0).all()


@settings(max_examples=40)
@given(arrays(np.float32, st.tuples(st.integers(1, 3), st.just(1), SIDES, SIDES), elements=st.sampled_from([0.0, 1.0])))
def test_holes_grow_as_in_the_stock_pipeline(drawn: np.ndarray) -> None:
    before = drawn.copy()
    assert (grow(drawn) == prepare_mask(torch.from_numpy(drawn.copy())).numpy()).all()
    assert (drawn == before).all()


@pytest.mark.parametrize(("height", "width"), [(8, 8), (32, 32), (96, 96), (16, 32)])
def test_grown_holes_are_of_all_sizes_and_few_are_the_whole_picture(height: int, width: int) -> None:
    shares = 1 - draw_masks(3, TURNS, height, width).mean((1, 2, 3))
    assert np.mean(shares == 1) == pytest.approx(0.1, abs=0.02)
    parts = shares[shares < 1]
    assert parts.max() <= 0.95
    counts, _ = np.histogram(parts, bins=9, range=(0.05, 0.95))
    assert counts.min() > len(parts) / 9 * 0.6
    assert parts.mean() == pytest.approx(0.5, abs=0.03)


def test_every_kind_comes_alike_and_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    def watched(shape: masks.Shape) -> masks.Shape:
        def draw(*arguments: np.ndarray) -> np.ndarray:
            drawn.append(shape.__name__)
            return shape(*arguments)

        return draw

    monkeypatch.setattr(masks, "_SHAPES", tuple(map(watched, masks._SHAPES)))
    draw_masks(0, TURNS, 8, 8)
    names, counts = np.unique(drawn, return_counts=True)
    assert len(names) == 4
    assert counts.min() > len(drawn) / 4 * 0.85
    boxes = draw_masks(0, TURNS, 96, 96, growth=False)[:, 0]
    corners = boxes[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 1).all(1).mean() > 0.15  # holes inside
    assert ((corners == 0).all(1) & (boxes.max((1, 2)) == 1)).mean() > 0.15  # and around what is kept


PINNED = {(2, 2): "0a0ee471", (12, 8): "ce99e134", (96, 96): "94cbe5f4"}
"""By height and width, the beginning of the sha256 of the first masks: any machine must draw these."""


@pytest.mark.parametrize("shape", PINNED)
def test_masks_are_the_same_on_every_machine(shape: tuple[int, int]) -> None:
    drawn = np.packbits(draw_masks(2**62 + 1, np.arange(2**41, 2**41 + 64), *shape) == 1)
    assert hashlib.sha256(drawn.tobytes()).hexdigest()[:8] == PINNED[shape]


def test_what_is_drawn_beside_the_rows_has_masks_where_they_are_asked_for() -> None:
    turns, shape = np.arange(5), (4, 6, 10)
    plain = draw_turns(7, turns, shape, 1000)
    drawn = draw_turns(7, turns, shape, 1000, drawn=("noise", "timesteps", "mask"), growth=False)
    assert plain.keys() == {"noise", "timesteps"}
    assert (drawn["mask"] == draw_masks(7, turns, 6, 10, growth=False)).all()
    assert (drawn["noise"] == draw_noise(7, turns, shape)).all()
    assert (drawn["timesteps"] == plain["timesteps"]).all()
