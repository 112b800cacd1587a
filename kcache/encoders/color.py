"""From a picture's own colour space to sRGB, which the networks were trained on, by the ICC profile that it carries.

What counts is an embedded ICC profile, wherever its format keeps one, and without any the mark that cameras set for
Adobe RGB in EXIF. PNG's gAMA, cHRM and cICP chunks do not count: files in the wild have gAMA and cHRM beside values
that are plain sRGB. Numbers are taken as they are where there is neither, where a profile is broken or of another
space than the picture's, where it says sRGB in other words, and in LAB, which is no matter of profiles.
"""

import io
import struct
from functools import lru_cache
from typing import Any

from PIL import Image, features

from kcache.errors import ConfigError

INTENT = "relative-colorimetric+black-point-compensation"
"""How colours that sRGB lacks are replaced: those that it has stay what they are, as "perceptual" does not promise."""

_NEAR = 2
"""Levels of 255 by which a profile may differ from sRGB and is sRGB in other words: makers round its curve."""
_STEPS = tuple(range(0, 256, 15))
_SPACES = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK"}
_CLASSES = ("mntr", "scnr", "prtr", "spac")
"""Kinds of profiles that say what numbers look like: monitor, scanner, printer, colour space."""
_MOST_BYTES = 1 << 24


def check_color_management() -> None:
    """Raise ConfigError where this Pillow cannot convert colours."""
    if not features.check("littlecms2"):
        raise ConfigError(
            "this Pillow was built without littlecms2, which converts colour profiles; expected it for --color srgb; "
            "install Pillow from its wheel, or give --color as-is"
        )


def littlecms_version() -> str:
    """Version of the library that converts colours; "none" where there is none."""
    return features.version("littlecms2") or "none"


def to_srgb(image: Image.Image, profile: Any) -> Image.Image:
    """The picture in sRGB, as RGB or with its transparency RGBA; itself where there is nothing to convert.

    `profile` is what the file holds as its ICC profile. Safe to call from several threads.
    """
    mode = _mode(image)
    if mode is None or not isinstance(profile, bytes) or len(profile) > _MOST_BYTES:
        return image
    transform = _transform(profile, mode)
    if transform is None:
        return image
    if not image.has_transparency_data:
        return transform.apply(image if image.mode == mode else image.convert(mode))
    clear = image.convert("LA" if mode == "L" else "RGBA")
    converted = transform.apply(clear.convert(mode))
    converted.putalpha(clear.getchannel("A"))
    return converted


def _mode(image: Image.Image) -> str | None:
    """The mode whose channels a profile of the picture is about; None for those that none is."""
    if image.mode in ("L", "LA", "CMYK"):
        return image.mode[:1] if image.mode == "LA" else image.mode
    return "RGB" if image.mode in ("RGB", "RGBA", "RGBX", "P", "PA") else None


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> Any:
    """What turns pictures of `mode` with that profile to sRGB; None where they are to be taken as they are."""
    from PIL import ImageCms

    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if given.profile.xcolor_space != _SPACES[mode] or given.profile.device_class not in _CLASSES:
            return None
        transform = ImageCms.buildTransform(
            given,
            ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    # What is wrong with a profile comes as nearly anything, and a broken one is as good as none.
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, AttributeError):
        return None
    return None if _changes_nothing(transform, mode) else transform


def _changes_nothing(transform: Any, mode: str) -> bool:
    """Whether a transform moves no colour of a grid by more than what makers of profiles round."""
    if mode == "CMYK":
        return False
    colors = [(v, v, v) for v in range(256)]
    if mode == "RGB":
        colors += [(r, g, b) for r in _STEPS for g in _STEPS for b in _STEPS]
    before = Image.frombytes("RGB", (len(colors), 1), bytes(value for color in colors for value in color))
    after = transform.apply(before if mode == "RGB" else before.convert(mode))
    return all(abs(a - b) <= _NEAR for a, b in zip(before.tobytes(), after.tobytes(), strict=True))


def _matrix_profile(colorants: tuple[tuple[float, float, float], ...], curve: bytes) -> bytes:
    """An ICC profile (version 2) of an RGB space: XYZ under D50 of its red, green and blue, and their common curve."""
    white = (0.9642, 1.0, 0.8249)

    def xyz(values: tuple[float, float, float]) -> bytes:
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))

    tags = {b"wtpt": xyz(white), b"rXYZ": xyz(colorants[0]), b"gXYZ": xyz(colorants[1]), b"bXYZ": xyz(colorants[2])}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, data, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">2I", start + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    head = struct.pack(">I4xI4s4s4s12x4s", start + len(data), 0x02400000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    head = head.ljust(68, b"\0") + struct.pack(">3i", *(round(value * 65536) for value in white))
    return head.ljust(128, b"\0") + table + data


ADOBE_RGB = _matrix_profile(
    ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)),
    struct.pack(">4s4xIH", b"curv", 1, 563),  # a gamma of 563/256
)
"""The profile that pictures marked as Adobe RGB lack."""
