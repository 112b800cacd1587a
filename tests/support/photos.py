"""Photos with all that cameras and programs put into image files, and damaged ones, drawn from a seed."""

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

SIZE = (48, 32)
ENDINGS = {
    "JPEG": "jpg", "PNG": "png", "TIFF": "tiff", "WEBP": "webp", "AVIF": "avif", "BMP": "bmp", "GIF": "gif",
    "PPM": "ppm", "JPEG2000": "jp2",
}  # fmt: skip
P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
"""XYZ, under D50, of the red, green and blue of Display P3."""
SRGB_CURVE = b"para\0\0\0\0\0\3\0\0" + struct.pack(
    ">5i", *(round(value * 65536) for value in (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045))
)


@dataclass(frozen=True, kw_only=True)
class Photo:
    """An image file, and what should become of it."""

    name: str
    content: bytes
    size: tuple[int, int] | None
    """As decoded and upright; None where that is not known, as the file is damaged."""
    sound: bool = True
    """Whether it has to be cached: all that is wrong with it, if anything, is metadata."""


def picture(seed: int = 0, size: tuple[int, int] = SIZE) -> Image.Image:
    """A smooth picture in colours."""
    values = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """The bytes of a picture in a format."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif_block(tag: int, kind: int, count: int, data: bytes, order: str = "<") -> bytes:
    """A TIFF directory of one entry; longer data stand behind it."""
    head = b"II*\0" if order == "<" else b"MM\0*"
    inline = data.ljust(4, b"\0") if len(data) <= 4 else struct.pack(order + "I", 26)
    return head + struct.pack(order + "IHHHI", 8, 1, tag, kind, count) + inline + bytes(4) + data * (len(data) > 4)


def jpeg_with(content: bytes, marker: int, segment: bytes) -> bytes:
    """A JPEG with a segment more, behind its start."""
    return content[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(segment) + 2) + segment + content[2:]


def chunk(name: bytes, data: bytes, sound: bool = True) -> bytes:
    """A chunk of a PNG; with a wrong checksum where it is not sound."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data) ^ (not sound))


def png_with(content: bytes, *chunks: bytes, behind: bool = False) -> bytes:
    """A PNG with chunks more, behind its header or before its end."""
    at = len(content) - 12 if behind else 33
    return content[:at] + b"".join(chunks) + content[at:]


def matrix_profile(colorants: tuple[tuple[float, float, float], ...], curve: bytes, space: bytes = b"RGB ") -> bytes:
    """An ICC profile of a space that a matrix and a curve describe; of grey, only the curve counts."""

    def xyz(values: tuple[float, ...]) -> bytes:
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))

    tags = {b"wtpt": xyz((0.9642, 1.0, 0.8249))}
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        for letter, values in zip((b"r", b"g", b"b"), colorants, strict=True):
            tags |= {letter + b"XYZ": xyz(values), letter + b"TRC": curve}
    table, data, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">2I", start + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    head = struct.pack(">I4xI4s4s4s12x4s", start + len(data), 0x04000000, b"mntr", space, b"XYZ ", b"acsp")
    white = struct.pack(">3i", 63190, 65536, 54061)
    return (head.ljust(68, b"\0") + white).ljust(128, b"\0") + table + data


def gamma(value: float) -> bytes:
    """A curve that is a power."""
    return struct.pack(">4s4xIH2x", b"curv", 1, round(value * 256))


def photos(seed: int, damaged: int = 60) -> list[Photo]:
    """Some 200 of them; `damaged` are cut or have bits turned, anywhere."""
    rng = np.random.default_rng(seed)
    sound = [*_oriented(), *_profiled(), *_annotated(), *_modes(), *_formats()]
    broken = []
    for number in range(damaged):
        photo = sound[int(rng.integers(len(sound)))]
        content = bytearray(photo.content)
        if number % 3 == 0:
            content = content[: int(rng.integers(1, len(content)))]
        else:
            for at in rng.integers(0, min(len(content), 600 if number % 3 == 1 else len(content)), 3):
                content[at] ^= 1 << int(rng.integers(8))
        stem, _, ending = photo.name.rpartition(".")
        name = f"broken-{number:02d}-{stem}.{ending}"
        broken.append(Photo(name=name, content=bytes(content), size=None, sound=False))
    return [*sound, *broken]


def _oriented() -> Iterator[Photo]:
    """Orientation of every TIFF type, count and value, in either byte order."""
    kinds = {1: "B", 2: "s", 3: "H", 4: "I", 5: "II", 6: "b", 7: "B", 8: "h", 9: "i", 10: "ii", 11: "f", 12: "d"}
    values = {3: (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 65535), 5: (6,), 4: (6, 1 << 31), 9: (8, -1), 11: (6, float("nan"))}
    image = picture()
    base = saved(image, "JPEG")
    for kind, code in kinds.items():
        for value in values.get(kind, (6,)):
            for count in (0, 1, 2, 70_000) if value == 6 and kind in (3, 2, 5, 12) else (1,):
                order = ">" if value == 6 and count == 1 else "<"
                one = str(value).encode() if code == "s" else struct.pack(order + code, *[value, 1][: len(code)])
                block = exif_block(274, kind, count, (one * min(count or 1, 3)), order)
                turned = kind not in (1, 2, 7) and count in (1, 2) and value in (5, 6, 7, 8)
                yield Photo(
                    name=f"orientation-{kind}-{value}-{count}.jpg",
                    content=jpeg_with(base, 0xE1, b"Exif\0\0" + block),
                    size=SIZE[::-1] if turned else SIZE,
                )
    block = exif_block(274, 3, 1, struct.pack("<H", 6))
    upright = SIZE[::-1]
    for name, segment in {
        "cut": block[:15], "empty": b"", "zeros": bytes(40), "far": block[:4] + struct.pack("<I", 1 << 30),
        "loop": block[:22] + struct.pack("<I", 8), "many": block[:8] + b"\xff\xff" + block[10:],
    }.items():  # fmt: skip
        size = upright if name in ("loop", "many") else SIZE
        yield Photo(name=f"exif-{name}.jpg", content=jpeg_with(base, 0xE1, b"Exif\0\0" + segment), size=size)
    png, webp = saved(image, "PNG"), saved(image, "WEBP", exif=b"Exif\0\0" + block)
    yield Photo(name="exif.png", content=png_with(png, chunk(b"eXIf", block)), size=upright)
    yield Photo(name="exif-behind.png", content=png_with(png, chunk(b"eXIf", block), behind=True), size=upright)
    yield Photo(name="exif-broken.png", content=png_with(png, chunk(b"eXIf", b"garbage")), size=SIZE)
    yield Photo(name="exif-checksum.png", content=png_with(png, chunk(b"eXIf", block, sound=False)), size=SIZE)
    yield Photo(name="exif.webp", content=webp, size=upright)
    yield Photo(name="exif-broken.webp", content=saved(image, "WEBP", exif=b"Exif\0\0garbage"), size=SIZE)
    yield Photo(name="exif.avif", content=saved(image, "AVIF", exif=b"Exif\0\0" + block), size=upright)
    broken = saved(image, "AVIF", exif=b"Exif\0\0" + exif_block(305, 2, 4, b"abc\0")).replace(b"II*\0", b"????")
    yield Photo(name="exif-broken.avif", content=broken, size=SIZE)
    for value in (1, 6, 9):
        tiff = saved(image, "TIFF", tiffinfo={274: value})
        yield Photo(name=f"turned-{value}.tiff", content=tiff, size=upright if value == 6 else SIZE)


def _profiled() -> Iterator[Photo]:
    """Colour profiles: good, broken, huge, of other spaces."""
    good = matrix_profile(P3, SRGB_CURVE)
    profiles = {
        "p3": good, "cut": good[:200], "garbage": b"no profile at all", "zeros": bytes(2_000_000), "head": good[:128],
        "grey": matrix_profile(P3, gamma(1.8), b"GRAY"), "huge": good + bytes(2_000_000), "empty": b"\0",
    }  # fmt: skip
    for name, profile in profiles.items():
        for kind in ("JPEG", "PNG", "TIFF", "WEBP", "AVIF"):
            if len(profile) < 1_000_000 or kind in ("PNG", "TIFF"):
                image = picture(1).convert("L") if name == "grey" and kind in ("JPEG", "PNG") else picture(1)
                content = saved(image, kind, icc_profile=profile)
                yield Photo(name=f"profile-{name}.{ENDINGS[kind]}", content=content, size=SIZE)
    base, block = saved(picture(2), "JPEG"), b"Exif\0\0" + exif_block(274, 3, 1, struct.pack("<H", 6))
    for name, segment in {
        "short": b"ICC_PROFILE\0",
        "numbers": b"ICC_PROFILE\0\7\1abc",
        "none": b"ICC_PROFILE\0\0\0",
    }.items():
        content = jpeg_with(jpeg_with(base, 0xE2, segment), 0xE1, block)
        yield Photo(name=f"profile-segment-{name}.jpg", content=content, size=SIZE[::-1])


def _annotated() -> Iterator[Photo]:
    """Texts and other blocks, too large, with wrong checksums, cut off within themselves."""
    png, jpeg = saved(picture(3), "PNG"), saved(picture(3), "JPEG")
    large = zlib.compress(bytes(3_000_000))
    eighty = [chunk(b"zTXt", b"k%d\0\0" % i + zlib.compress(bytes(1_000_000))) for i in range(80)]
    turn = chunk(b"eXIf", exif_block(274, 3, 1, struct.pack("<H", 6)))
    chunks = {
        "ztxt": [chunk(b"zTXt", b"Comment\0\0" + large)], "itxt": [chunk(b"iTXt", b"k\0\1\0\0\0" + large)],
        "many": eighty, "method": [chunk(b"zTXt", b"Comment\0\7" + large)], "iccp": [chunk(b"iCCP", b"x\0\7abc")],
        "iccp-short": [chunk(b"iCCP", b"x")], "checksum": [chunk(b"tEXt", b"k\0v", sound=False)],
        "raw": [chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  9\nnot hex")],
        "xmp": [chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation='x'/>")],
        "time": [chunk(b"tIME", b"\0")], "phys": [chunk(b"pHYs", b"\0")], "gamma": [chunk(b"gAMA", b"")],
        "chrm": [chunk(b"cHRM", b"\0" * 5)], "srgb": [chunk(b"sRGB", b"")], "unknown": [chunk(b"vpAg", bytes(9))],
        "animation": [chunk(b"acTL", b"\0")], "frames": [chunk(b"acTL", bytes(8)), chunk(b"fcTL", b"\0")],
    }  # fmt: skip
    for name, added in chunks.items():
        for behind in (False, True):
            content = png_with(png, turn, *added) if not behind else png_with(png_with(png, turn), *added, behind=True)
            yield Photo(name=f"text-{name}-{behind}.png", content=content, size=SIZE[::-1])
    segments = {
        "app2-mpf": (0xE2, b"MPF\0II*\0" + bytes(20)), "app13": (0xED, b"Photoshop 3.0\08BIM\4"),
        "app0": (0xE0, b"JFIF\0"),
        "app14": (0xEE, b"Adobe"), "xmp": (0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff\xfe"), "flash": (0xE2, b"FPXR\0"),
        "comment": (0xFE, b"\xff" * 60_000), "app1": (0xE1, b"Exif"), "mpf-junk": (0xE2, b"MPF\0junk"),
    }  # fmt: skip
    for name, (marker, segment) in segments.items():
        yield Photo(name=f"segment-{name}.jpg", content=jpeg_with(jpeg, marker, segment), size=SIZE)


def _modes() -> Iterator[Photo]:
    rgb = picture(4)
    clear = rgb.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(SIZE))
    wide = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257)
    palette = rgb.quantize(16)
    for mode, kinds in {
        "1": ("PNG", "TIFF", "BMP", "GIF", "PPM"), "L": ("PNG", "JPEG", "TIFF", "PPM", "GIF"), "LA": ("PNG", "TIFF"),
        "P": ("PNG", "GIF", "TIFF", "BMP"), "RGBA": ("PNG", "WEBP", "TIFF", "JPEG2000"), "CMYK": ("JPEG", "TIFF"),
        "YCbCr": ("JPEG", "TIFF"), "LAB": ("TIFF",), "F": ("TIFF",), "I": ("TIFF",), "PA": ("TIFF",),
    }.items():  # fmt: skip
        image = {"P": palette, "PA": palette.convert("PA")}.get(mode) or (
            clear if mode in ("LA", "RGBA") else rgb
        ).convert(mode)
        for kind in kinds:
            if mode == "PA":
                continue
            yield Photo(name=f"mode-{mode}.{ENDINGS[kind]}", content=saved(image, kind), size=SIZE)
    for kind in ("PNG", "TIFF", "PPM"):
        yield Photo(name=f"wide.{ENDINGS[kind]}", content=saved(wide, kind), size=SIZE)
    big = Image.frombytes("I;16B", SIZE, np.asarray(wide).astype(">u2").tobytes())
    yield Photo(name="wide-big-endian.tiff", content=saved(big, "TIFF"), size=SIZE)
    for bits in (1, 2, 4):
        yield Photo(name=f"bits-{bits}.png", content=saved(palette.quantize(2**bits), "PNG", bits=bits), size=SIZE)
    clears: dict[str, object] = {"one": 3, "many": bytes(range(0, 240, 16))}
    for name, transparency in clears.items():
        yield Photo(name=f"clear-{name}.png", content=saved(palette, "PNG", transparency=transparency), size=SIZE)
    yield Photo(name="clear-grey.png", content=saved(rgb.convert("L"), "PNG", transparency=7), size=SIZE)
    yield Photo(name="clear-colour.png", content=saved(rgb, "PNG", transparency=(1, 2, 3)), size=SIZE)


def _formats() -> Iterator[Photo]:
    """What formats can do with pixels."""
    rgb, frames = picture(5), [picture(6), picture(7)]
    moving = {"save_all": True, "append_images": frames}
    options: list[tuple[str, str, dict[str, object]]] = [
        ("progressive", "JPEG", {"progressive": True}), ("restart", "JPEG", {"restart_marker_blocks": 1}),
        *((f"sampled-{n}", "JPEG", {"subsampling": n}) for n in (0, 1, 2)), ("rgb", "JPEG", {"keep_rgb": True}),
        ("plain", "PNG", {"compress_level": 0}), ("moving", "PNG", moving),
        ("moving-default", "PNG", moving | {"default_image": True}), ("interlaced", "GIF", {"interlace": 1}),
        ("moving", "GIF", moving | {"disposal": 2}), ("moving-3", "GIF", moving | {"disposal": 3}),
        ("lossless", "WEBP", {"lossless": True}), ("moving", "WEBP", moving), ("pages", "TIFF", moving),
        *((f"packed-{n}", "TIFF", {"compression": n}) for n in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg")),
        ("big", "TIFF", {"big_tiff": True}), ("strips", "TIFF", {"compression": "tiff_lzw", "strip_size": 500}),
        ("lossless", "JPEG2000", {"irreversible": False}), ("tiled", "JPEG2000", {"tile_size": (16, 16)}),
        ("fine", "AVIF", {"quality": 90}),
        ("predicted", "TIFF", {"compression": "tiff_lzw", "tiffinfo": {317: 2}}), ("moving", "AVIF", moving),
    ]  # fmt: skip
    for name, kind, given in options:
        yield Photo(name=f"{name}.{ENDINGS[kind]}", content=saved(rgb, kind, **given), size=SIZE)
    grey = saved(rgb.convert("1"), "TIFF", compression="group4")
    yield Photo(name="fax.tiff", content=grey, size=SIZE)
    yield Photo(name="two.jpg", content=saved(rgb, "MPO", save_all=True, append_images=frames), size=SIZE)
    rows = np.asarray(rgb)

    def lines(values: np.ndarray) -> bytes:
        return b"\n".join(b" ".join(b"%d" % v for v in row) for row in values.reshape(32, -1))

    yield Photo(name="ascii.ppm", content=b"P3\n# a comment\n48 32\n255\n" + lines(rows), size=SIZE)
    yield Photo(name="ascii.pgm", content=b"P2\n48 32\n65535\n" + lines(rows[..., 0].astype(int) * 257), size=SIZE)
    yield Photo(name="wide.ppm", content=b"P6\n48 32\n65535\n" + (rows.astype(">u2") * 257).tobytes(), size=SIZE)
    top_down = bytearray(saved(rgb, "BMP"))
    top_down[22:26] = struct.pack("<i", -32)
    yield Photo(name="top-down.bmp", content=bytes(top_down), size=SIZE)
    os2 = struct.pack("<2sI4xIIHHHH", b"BM", 26 + 4608, 26, 12, 48, 32, 1, 24) + rows[::-1, :, ::-1].tobytes()
    yield Photo(name="os2.bmp", content=os2, size=SIZE)
    rle = b"".join(bytes([48, row, 0, 0]) for row in range(32)) + b"\0\1"
    head = struct.pack(
        "<2sI4xIIiiHHIIiiII", b"BM", 54 + 1024 + len(rle), 54 + 1024, 40, 48, 32, 1, 8, 1, len(rle), 0, 0, 256, 0
    )
    yield Photo(name="run-lengths.bmp", content=head + bytes(range(256)) * 4 + rle, size=SIZE)
    sixteen = (
        struct.pack("<2sI4xIIiiHHIIiiII", b"BM", 54 + 3072, 54, 40, 48, 32, 1, 16, 0, 3072, 0, 0, 0, 0)
        + bytes(range(256)) * 12
    )
    yield Photo(name="sixteen.bmp", content=sixteen, size=SIZE)
    tiff = saved(rgb, "TIFF")
    for name, tag in {
        "soft": (305, 12, 1, bytes(4)),
        "exif-ifd": (34665, 2, 4, b"abc\0"),
        "xmp": (700, 5, 9, bytes(4)),
        "profile": (34675, 2, 4, b"abc\0"),
    }.items():
        yield Photo(name=f"tag-{name}.tiff", content=_with_tag(tiff, *tag), size=SIZE)


def _with_tag(tiff: bytes, tag: int, kind: int, count: int, data: bytes) -> bytes:
    """A little-endian TIFF whose directory is written again behind it, with an entry more."""
    (start,) = struct.unpack_from("<I", tiff, 4)
    (entries,) = struct.unpack_from("<H", tiff, start)
    old = [tiff[start + 2 + 12 * i : start + 14 + 12 * i] for i in range(entries)]
    new = sorted(
        [*old, struct.pack("<HHI", tag, kind, count) + data], key=lambda entry: struct.unpack_from("<H", entry)[0]
    )
    return tiff[:4] + struct.pack("<I", len(tiff)) + tiff[8:] + struct.pack("<H", len(new)) + b"".join(new) + bytes(4)
