"""What is kept around a hole has the pixels of the picture, softly where it meets what was drawn."""

import numpy as np
import pytest
from PIL import Image

from kcache.report.drawn.kept import put_back


def levels(drawn: int, given: int, hole: Image.Image, downsampling: int) -> np.ndarray:
    """The first channel of what is made of pictures that are all of one level each."""
    one, other = (Image.new("RGB", hole.size, (level, level, level)) for level in (drawn, given))
    return np.asarray(put_back(one, other, hole, downsampling))[:, :, 0].astype(int)


@pytest.mark.parametrize("downsampling", [4, 8])
def test_the_grown_hole_is_drawn_and_beyond_the_next_latent_all_is_the_picture(downsampling: int) -> None:
    d = downsampling
    hole = Image.new("L", (16 * d, 8 * d))
    hole.paste(255, (0, 0, 6 * d, 8 * d))  # the left, which grows to the right
    found = levels(200, 100, hole, d)
    assert (found == found[0]).all()
    row = found[0]
    assert (row[: 7 * d] == 200).all()
    assert (row[8 * d :] == 100).all()
    between = row[7 * d - 1 : 8 * d]
    assert (np.diff(between) < 0).all()
    assert np.abs(between - np.linspace(200, between[-1], d + 1)).max() <= 1
    assert between[-1] > 100


def test_a_thin_line_grows_as_the_pipeline_lets_it() -> None:
    hole = Image.new("L", (64, 64))
    hole.paste(255, (32, 0, 40, 64))
    found = levels(0, 255, hole, 8)
    assert (found[:, 24:48] == 0).all()
    assert (found[:, :16] == 255).all()
    assert (found[:, 56:] == 255).all()


def test_a_whole_hole_is_all_drawn() -> None:
    assert (levels(7, 99, Image.new("L", (32, 16), 255), 8) == 7).all()
