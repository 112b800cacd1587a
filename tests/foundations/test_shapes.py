"""Shapes: the lists that `auto` makes, the choice and the crop, against exact fractions; lists that are none."""

import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kcache.config.shapes import (
    NO_SHAPE,
    Shape,
    ShapeSet,
    auto_set,
    crop_box,
    parse_shapes,
    resolutions_of,
    square_set,
)
from kcache.errors import ConfigError

RNG = np.random.default_rng(0)
WIDTHS, HEIGHTS = RNG.integers(64, 4001, 200), RNG.integers(64, 701, 200)
AUTO = auto_set(768, 64, 2.0)


def kept(width: int, height: int, shape: Shape) -> Fraction:
    """Share of a picture that is left of it: of the largest box with the shape's proportions, its sides not rounded."""
    scale = min(Fraction(height, shape[0]), Fraction(width, shape[1]))
    return scale * shape[0] * scale * shape[1] / (width * height)


def chosen(shapes: tuple[Shape, ...], width: int, height: int, max_upscale: float | None) -> int:
    best = max(range(len(shapes)), key=lambda number: (kept(width, height, shapes[number]), -number))
    enlarged = 1 / min(Fraction(height, shapes[best][0]), Fraction(width, shapes[best][1]))
    return NO_SHAPE if max_upscale is not None and enlarged > Fraction(max_upscale) else best


def test_auto_is_every_long_side_with_the_short_side_nearest_to_the_area() -> None:
    assert len(AUTO.shapes) == 15
    assert AUTO.shapes[0] == (512, 1216)
    assert AUTO.shapes[7] == (768, 768)
    for resolution, step in ((512, 64), (768, 64), (1024, 128), (32, 4)):
        expected = set()
        for long in range(resolution, 4 * resolution, step):
            sides = range(step, resolution + 1, step)
            short = min(sides, key=lambda side: (abs(side - Fraction(resolution**2, long)), -side))
            expected |= {(long, short), (short, long)} if 5 * long <= 12 * short else set()
        found = auto_set(resolution, step, None).shapes
        assert set(found) == expected
        assert list(found) == sorted(found, key=lambda shape: (Fraction(*shape), shape[0] * shape[1]))


@pytest.mark.parametrize("max_upscale", [None, 1.0, 1.5, 2.0])
def test_each_picture_has_the_shape_that_keeps_most_of_it(max_upscale: float | None) -> None:
    some = ShapeSet(768, AUTO.shapes, max_upscale)
    found = some.choose(WIDTHS, HEIGHTS)
    sizes = zip(WIDTHS.tolist(), HEIGHTS.tolist(), strict=True)
    assert found.tolist() == [chosen(AUTO.shapes, *size, max_upscale) for size in sizes]
    assert (found == NO_SHAPE).any() == (max_upscale is not None)
    shares = [
        0.0 if n < 0 else float(kept(int(w), int(h), AUTO.shapes[n]))
        for w, h, n in zip(WIDTHS, HEIGHTS, found, strict=True)
    ]
    np.testing.assert_allclose(some.kept(WIDTHS, HEIGHTS), shares, rtol=1e-15)


SIDES = st.integers(1, 100_000)
SHAPES = st.tuples(st.integers(1, 64), st.integers(1, 64))
LISTS = st.lists(SHAPES, min_size=1, max_size=9, unique=True)


@given(width=SIDES, height=SIDES, shapes=LISTS, max_upscale=st.none() | st.floats(0.1, 8))
def test_choice_is_exact_for_any_size_and_list(
    width: int, height: int, shapes: list[Shape], max_upscale: float | None
) -> None:
    some = ShapeSet(64, parse_shapes(";".join(f"{tall},{wide}" for tall, wide in shapes)), max_upscale)
    [found] = some.choose(np.array([width], np.int32), np.array([height], np.int32))
    expected = chosen(some.shapes, width, height, max_upscale)
    if max_upscale is not None and NO_SHAPE in (found, expected) and found != expected:
        tall, wide = some.shapes[max(found, expected)]
        assert max(tall / height, wide / width) == pytest.approx(max_upscale, rel=1e-15)  # the bound, as it is stored
    elif found != expected:  # two shares that are one as floating-point numbers
        shares = [float(kept(width, height, shape)) for shape in some.shapes]
        assert shares[found] == shares[expected]
        assert kept(width, height, some.shapes[found]) != kept(width, height, some.shapes[expected])


@given(width=SIDES, height=SIDES, shape=st.tuples(st.integers(1, 4096), st.integers(1, 4096)))
def test_the_box_is_the_middle_with_the_proportions_of_the_shape(width: int, height: int, shape: Shape) -> None:
    left, top, right, bottom = crop_box(width, height, shape)
    scale = min(Fraction(height, shape[0]), Fraction(width, shape[1]))
    for side, first, last, exact in ((width, left, right, scale * shape[1]), (height, top, bottom, scale * shape[0])):
        whole = max(1, int(exact + Fraction(1, 2)))
        assert 0 <= first <= last <= side
        assert abs(last - first - whole) <= (side - whole) % 2
        assert abs(first + last - side) <= (side - whole) % 2


@given(width=SIDES, height=SIDES, side=st.integers(1, 4096))
def test_the_box_of_a_square_is_that_of_the_diffusers_scripts(width: int, height: int, side: int) -> None:
    short = min(width, height)
    exact = ((width - short) / 2, (height - short) / 2, (width + short) / 2, (height + short) / 2)
    assert crop_box(width, height, (side, side)) == tuple(map(round, exact))


def test_of_equals_the_first_has_the_picture() -> None:
    some = ShapeSet(8, ((4, 16), (8, 8), (16, 16), (16, 4)), None)
    assert some.choose(np.array([30, 20, 10]), np.array([30, 10, 20])).tolist() == [1, 0, 1]


def test_a_bound_is_reached_but_not_passed() -> None:
    some = ShapeSet(768, AUTO.shapes, 2.0)
    found = some.choose(np.array([384, 383, 320, 255]), np.array([384, 384, 448, 2000]))
    assert [None if n < 0 else AUTO.shapes[n] for n in found] == [(768, 768), None, (896, 640), None]


def test_a_picture_of_unknown_size_has_the_shape_nearest_to_a_square() -> None:
    for widths, heights in ((0, 0), (0, 500)):
        assert AUTO.choose(np.array([widths]), np.array([heights])).tolist() == [7]
    assert ShapeSet(8, ((8, 16), (8, 8), (12, 8)), 2.0).choose(np.zeros(1), np.zeros(1)).tolist() == [1]


def test_names_and_squares() -> None:
    assert (square_set(768).name, AUTO.name) == ("768", "768 in 15 shapes")
    assert square_set(768).is_square
    assert not ShapeSet(768, ((768, 768),), 2.0).is_square
    assert ShapeSet(768, ((640, 896),)).name == "768 in 1 shape"
    assert resolutions_of([AUTO, square_set(512), square_set(768)]) == [512, 768]
    assert square_set(64).choose(np.array([1, 0]), np.array([900, 0])).tolist() == [0, 0]


def test_lists_are_read_and_sorted() -> None:
    assert parse_shapes(" 896,640; 768,768;640,896; ") == ((640, 896), (768, 768), (896, 640))


@pytest.mark.parametrize(
    "text", ["", ";", "640", "640,896;;", "0,64", "a,b", "640x896", "64,64;64,64", "-64,64", "1,2,3"]
)
def test_what_is_no_list_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--aspect-ratio-buckets is .*expected"):
        parse_shapes(text)


def test_too_many_shapes_and_a_resolution_between_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match="lists 255 shapes; expected 254 or fewer"):
        parse_shapes(";".join(f"{side},8" for side in range(1, 256)))
    with pytest.raises(ConfigError, match=re.escape("--resolution is 700; expected a multiple of 64")):
        auto_set(700, 64, 2.0)


@pytest.mark.parametrize(
    ("shapes", "max_upscale"),
    [
        ((), None),
        (((8, 8), (8, 8)), None),
        (((16, 8), (8, 16)), None),
        (((0, 8),), None),
        (((8.0, 8.0),), None),
        (((8, 8),), 0.0),
        (((8, 8),), float("nan")),
        (((8, 8),), float("inf")),
    ],
)
def test_sets_that_no_list_gives_are_refused(shapes: tuple[Shape, ...], max_upscale: float | None) -> None:
    with pytest.raises(ValueError, match=r"no sides|not 1 to 254 shapes|no factor"):
        ShapeSet(8, shapes, max_upscale)
