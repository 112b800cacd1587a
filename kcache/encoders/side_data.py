"""Image files without what is not pixels: metadata that a decoder stumbles over should not cost the picture.

Only for files that could not be decoded as they are. Nothing in them is decompressed here but a colour profile, up to a
limit, and what the pixels need is copied as it stands: damage of those stays damage.
"""

import re
import struct
import zlib
from collections.abc import Iterator

EXIF, ICC = "EXIF", "ICC"
_KEEPING = (frozenset({EXIF, ICC}), frozenset({EXIF}), frozenset({ICC}), frozenset[str]())
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = (b"tRNS", b"sBIT")
"""Ancillary chunks that say what pixels look like."""
_PROFILE_BYTES = 1 << 24
_ADOBE_BYTES = 16
"""Of the segment in which Adobe says how the colours of a JPEG are coded, at least."""
_TIFF_PIXELS = {
    *range(254, 267), 273, 277, 278, 279, 280, 281, 284, *range(290, 294), 297, 317, *range(320, 326),
    *range(330, 348), *range(512, 522), *range(529, 533),
}  # fmt: skip
"""TIFF's tags of sizes, places, kinds and compression of pixels."""
_TIFF_KEPT = {EXIF: 274, ICC: 34675}


def without_side_data(content: bytes) -> Iterator[bytes]:
    """The same picture with less and less of its metadata; nothing where none can be taken off.

    Orientation (EXIF) and colour profile (ICC) are kept as long as either lets the picture be read.
    """
    tried = {content}
    for kept in _KEEPING:
        bare = _bare(content, kept)
        if bare is not None and bare not in tried:
            tried.add(bare)
            yield bare


def png_profile(content: bytes) -> bytes | None:
    """The ICC profile of a PNG, however large up to 16 MB; None for one that has none, a larger or a broken one."""
    for name, data, _, sound in _png_chunks(content):
        if name == b"iCCP" and sound:
            unpack = zlib.decompressobj()
            try:
                profile = unpack.decompress(data.partition(b"\0")[2][1:], _PROFILE_BYTES)
            except zlib.error:
                return None
            return profile if unpack.eof else None
    return None


def _bare(content: bytes, kept: frozenset[str]) -> bytes | None:
    if content.startswith(_PNG):
        return _bare_png(content, kept)
    if content.startswith(b"\xff\xd8\xff"):
        return _bare_jpeg(content, kept)
    if content[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _bare_tiff(content, kept)
    if content[4:12] in (b"ftypavif", b"ftypavis") and EXIF not in kept:
        # The items of metadata get another name, under which nobody looks for them.
        return re.sub(rb"(?s)(infe[\2\3].{3}.{4,6})Exif", rb"\1none", content)
    return None


def _png_chunks(content: bytes) -> Iterator[tuple[bytes, bytes, bytes, bool]]:
    """Name, data and all of each chunk, and whether its checksum is right; what is cut short comes last, as it is."""
    at = len(_PNG)
    while at + 12 <= len(content):
        length, name = struct.unpack_from(">I4s", content, at)
        whole = content[at : at + 12 + length]
        data = whole[8 : 8 + length]
        yield name, data, whole, whole[8 + length :] == struct.pack(">I", zlib.crc32(name + data))
        at += 12 + length
    yield b"", b"", content[at:], False


def _bare_png(content: bytes, kept: frozenset[str]) -> bytes:
    wanted = {*_PNG_PIXELS, *([b"eXIf"] if EXIF in kept else [])}
    chunks = [
        whole
        for name, _, whole, sound in _png_chunks(content)
        # An upper case letter first: a chunk that the picture cannot do without.
        if name[:1].isupper() or not name or (name in wanted and (sound or name in _PNG_PIXELS))
    ]
    return b"".join([_PNG, *chunks])


def _bare_jpeg(content: bytes, kept: frozenset[str]) -> bytes:
    parts, at = [content[:2]], 2
    while content[at : at + 1] == b"\xff" and at + 4 <= len(content):
        marker, length = content[at + 1], 2 + int.from_bytes(content[at + 2 : at + 4], "big")
        if marker in (0xD8, 0xDA, 0xFF) or 0xD0 <= marker <= 0xD7 or length < 4:
            break
        segment = content[at : at + length]
        is_kept = {
            0xE1: EXIF in kept and segment[4:].startswith(b"Exif\0\0"),
            0xE2: ICC in kept and segment[4:].startswith(b"ICC_PROFILE\0"),
            0xEE: length >= _ADOBE_BYTES,
            0xFE: False,  # a comment
        }
        if is_kept.get(marker, not 0xE0 <= marker <= 0xEF):
            parts.append(segment)
        at += length
    return b"".join([*parts, content[at:]])


def _bare_tiff(content: bytes, kept: frozenset[str]) -> bytes | None:
    """Its first directory with fewer entries, and none behind it."""
    order = "<" if content.startswith(b"I") else ">"
    place, count_of, entry = ("QQ", 8, 20) if content[2:4] in (b"+\0", b"\0+") else ("IH", 2, 12)
    try:
        (start,) = struct.unpack_from(order + place[0], content, 8 if entry == 20 else 4)
        (count,) = struct.unpack_from(order + place[1], content, start)
    except struct.error:
        return None
    first = start + count_of
    entries = [content[first + entry * i : first + entry * (i + 1)] for i in range(min(count, len(content) // entry))]
    wanted = _TIFF_PIXELS | {_TIFF_KEPT[kind] for kind in kept}
    left = [e for e in entries if len(e) == entry and struct.unpack_from(order + "H", e)[0] in wanted]
    directory = struct.pack(order + place[1], len(left)) + b"".join(left) + bytes(struct.calcsize(place[0]))
    return content[:start] + directory + content[start + len(directory) :]
