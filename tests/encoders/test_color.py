"""Colours become sRGB as arithmetic says, by the profile that a picture carries; without a usable one they stay."""

import io
import struct
import zlib

import numpy as np
import pytest
from photos import P3, SRGB_CURVE, chunk, gamma, jpeg_with, matrix_profile, png_with, saved
from PIL import Image, ImageCms

from kcache.encoders.color import check_color_management
from kcache.encoders.decoding import Decoding, decode_image
from kcache.errors import ConfigError

ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
ORANGE, GREEN = (200, 60, 40), (90, 160, 60)
COLORS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)


def in_srgb(content: bytes, alpha: str = "white") -> np.ndarray:
    return np.asarray(decode_image(content, Decoding(color="srgb", alpha=alpha)))


def as_is(content: bytes, alpha: str = "white") -> np.ndarray:
    return np.asarray(decode_image(content, Decoding(alpha=alpha)))


def flat(mode: str, color: object) -> Image.Image:
    return Image.new(mode, (8, 8), color)


def computed(values: np.ndarray, colorants: tuple[tuple[float, float, float], ...], power: float | None) -> np.ndarray:
    """sRGB of `values` (…, 3) in an RGB space, its curve sRGB's or a power; what sRGB lacks is clipped."""
    x = values / 255
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4) if power is None else x**power
    found = np.clip(linear @ np.array(colorants) @ np.linalg.inv(np.array(SRGB)), 0, 1)
    return 255 * np.where(found <= 0.0031308, 12.92 * found, 1.055 * found ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize(
    ("colorants", "power"), [(P3, None), (ADOBE, 563 / 256), (SRGB, 1.8)], ids=["P3", "Adobe RGB", "gamma"]
)
def test_matrix_profiles_give_what_arithmetic_does(
    colorants: tuple[tuple[float, float, float], ...], power: float | None
) -> None:
    profile = matrix_profile(colorants, SRGB_CURVE if power is None else gamma(power))
    content = saved(Image.fromarray(COLORS), "PNG", icc_profile=profile)
    assert np.abs(in_srgb(content) - computed(COLORS, colorants, power)).max() < 1.5
    np.testing.assert_array_equal(as_is(content), COLORS)


def test_known_colours() -> None:
    p3, adobe = matrix_profile(P3, SRGB_CURVE), matrix_profile(ADOBE, gamma(563 / 256))
    found = [
        in_srgb(saved(flat("RGB", c), "PNG", icc_profile=p))[0, 0].tolist()
        for p in (p3, adobe)
        for c in (ORANGE, GREEN)
    ]
    assert found == [[217, 42, 23], [61, 162, 39], [231, 57, 34], [0, 161, 47]]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
def test_every_format_that_holds_a_profile_is_asked_for_it(kind: str) -> None:
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}, "AVIF": {"quality": 100}}
    content = saved(flat("RGB", ORANGE), kind, icc_profile=matrix_profile(P3, SRGB_CURVE), **options.get(kind, {}))
    assert np.abs(in_srgb(content).astype(int) - (217, 42, 23)).max() <= 3


@pytest.mark.parametrize(
    "profile",
    [
        pytest.param(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), id="littlecms"),
        pytest.param(matrix_profile(SRGB, SRGB_CURVE), id="by hand"),
    ],
)
def test_what_is_srgb_already_keeps_its_bits(profile: bytes) -> None:
    for image in (
        Image.fromarray(COLORS),
        Image.fromarray(COLORS).quantize(9),
        Image.fromarray(COLORS).convert("RGBA"),
    ):
        content = saved(image, "PNG", icc_profile=profile)
        np.testing.assert_array_equal(in_srgb(content), as_is(content))
    grey = saved(Image.fromarray(COLORS).convert("L"), "PNG", icc_profile=matrix_profile(SRGB, SRGB_CURVE, b"GRAY"))
    np.testing.assert_array_equal(in_srgb(grey), as_is(grey))


@pytest.mark.parametrize(
    ("mode", "profile"),
    [
        ("RGB", b"no profile"),
        ("RGB", matrix_profile(P3, SRGB_CURVE)[:200]),
        ("RGB", bytes(2_000_000)),
        ("RGB", matrix_profile(P3, gamma(1.8), b"GRAY")),
        ("L", matrix_profile(P3, SRGB_CURVE)),
        ("1", matrix_profile(P3, gamma(1.8), b"GRAY")),
        ("RGB", matrix_profile(P3, SRGB_CURVE).replace(b"mntr", b"abst")),
    ],
)
def test_a_profile_that_says_nothing_of_the_picture_is_left_alone(mode: str, profile: bytes) -> None:
    content = saved(Image.fromarray(COLORS).convert(mode), "PNG", icc_profile=profile)
    np.testing.assert_array_equal(in_srgb(content), as_is(content))


def test_grey_palettes_wide_samples_and_transparency_are_converted_too() -> None:
    p3, grey = matrix_profile(P3, SRGB_CURVE), matrix_profile(P3, gamma(1.8), b"GRAY")
    lighter = round(float(computed(np.array([100, 100, 100.0]), SRGB, 1.8)[0]))
    assert in_srgb(saved(flat("L", 100), "PNG", icc_profile=grey))[0, 0].tolist() == [lighter] * 3
    wide = Image.fromarray(np.full((8, 8), 100 * 257, np.uint16))
    assert in_srgb(saved(wide, "PNG", icc_profile=grey))[0, 0].tolist() == [lighter] * 3
    assert in_srgb(saved(flat("LA", (100, 0)), "PNG", icc_profile=grey)).min() == 255
    assert in_srgb(saved(flat("LA", (100, 0)), "PNG", icc_profile=grey), "drop").max() == lighter
    assert in_srgb(saved(flat("RGB", ORANGE).quantize(4), "PNG", icc_profile=p3))[0, 0].tolist() == [217, 42, 23]
    half = in_srgb(saved(flat("RGBA", (*ORANGE, 128)), "PNG", icc_profile=p3))[0, 0]
    assert np.abs(half - (np.array([217, 42, 23]) * 128 + 255 * 127) / 255).max() <= 1


def cmyk_profile() -> bytes:
    """A press whose cyan is a dull blue: a table of the 16 mixtures of whole inks, in Lab."""
    corners = []
    for ink in range(16):
        c, m, y, k = (ink >> shift & 1 for shift in (3, 2, 1, 0))
        lightness = 255 * (1 - 0.5 * c) * (1 - 0.5 * m) * (1 - 0.1 * y) * (1 - k)
        corners += [round(lightness), 128 - 10 * c + 60 * m, 128 - 40 * c + 60 * y]
    same = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 * (i in (0, 4, 8)) for i in range(9)))
    table = b"mft1\0\0\0\0\4\3\2\0" + matrix + same * 4 + bytes(corners) + same * 3
    tag = struct.pack(">I4s2I", 1, b"A2B0", 144, len(table))
    head = struct.pack(">I4xI4s4s4s12x4s", 144 + len(table), 0x02400000, b"prtr", b"CMYK", b"Lab ", b"acsp")
    return (head.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061)).ljust(128, b"\0") + tag + table


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_inks_are_converted_by_the_press_that_the_profile_describes(kind: str) -> None:
    colors = {"paper": (0, 0, 0, 0), "cyan": (255, 0, 0, 0), "black": (0, 0, 0, 255)}
    files = {name: saved(flat("CMYK", inks), kind, icc_profile=cmyk_profile()) for name, inks in colors.items()}
    found = {name: in_srgb(content)[0, 0].astype(int) for name, content in files.items()}
    assert found["paper"].min() >= 252
    assert found["black"].max() <= 3
    assert np.abs(found["cyan"] - lab_in_srgb(50, -10, -40)).max() <= 4
    assert as_is(files["cyan"])[0, 0].tolist() == [0, 255, 255]


def lab_in_srgb(lightness: float, a: float, b: float) -> np.ndarray:
    y = (lightness + 16) / 116
    curve = [t**3 if t > 6 / 29 else (t - 4 / 29) * 3 * (6 / 29) ** 2 for t in (y + a / 500, y, y - b / 200)]
    linear = np.clip(np.array(curve) * (0.9642, 1, 0.8249) @ np.linalg.inv(np.array(SRGB)), 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize(("index", "space", "expected"), [("R03", 65535, 231), ("R98", 65535, 200), ("R03", 1, 200)])
def test_the_mark_that_cameras_set_counts_where_no_profile_is(index: str, space: int, expected: int) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA001] = space
    exif.get_ifd(0x8769)[0xA005] = {1: index}
    content = saved(flat("RGB", ORANGE), "JPEG", quality=100, exif=exif)
    assert abs(int(in_srgb(content)[0, 0, 0]) - expected) <= 2
    profiled = saved(flat("RGB", ORANGE), "JPEG", quality=100, exif=exif, icc_profile=matrix_profile(SRGB, SRGB_CURVE))
    assert abs(int(in_srgb(profiled)[0, 0, 0]) - 200) <= 2


def test_other_marks_of_colour_do_not_count() -> None:
    content = saved(flat("RGB", ORANGE), "PNG")
    marked = png_with(
        content, chunk(b"gAMA", struct.pack(">I", 100_000)), chunk(b"cHRM", struct.pack(">8I", *[30_000] * 8))
    )
    np.testing.assert_array_equal(in_srgb(marked), as_is(content))


def test_a_profile_counts_that_pillow_finds_too_large_to_unpack() -> None:
    profile = matrix_profile(P3, SRGB_CURVE) + bytes(2_000_000)
    content = png_with(saved(flat("RGB", ORANGE), "PNG"), chunk(b"iCCP", b"x\0\0" + zlib.compress(profile)))
    assert in_srgb(content)[0, 0].tolist() == [217, 42, 23]


def test_without_littlecms_it_is_refused_before_any_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kcache.encoders.color.features.check", lambda name: False)
    for attempt in (check_color_management, lambda: Decoding(color="srgb")):
        with pytest.raises(ConfigError, match=r"without littlecms2.* or give --color as-is"):
            attempt()
    assert Decoding().color == "as-is"


def test_a_broken_profile_in_a_jpeg_leaves_it_upright() -> None:
    plain = saved(Image.fromarray(COLORS), "JPEG")
    broken = jpeg_with(plain, 0xE2, b"ICC_PROFILE\0\1\1" + b"no profile")
    np.testing.assert_array_equal(in_srgb(broken), np.asarray(Image.open(io.BytesIO(plain))))
