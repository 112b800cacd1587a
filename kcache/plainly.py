"""What a file plainly is, told by its first bytes, where it is not what its name promised; and words of it, made safe.

Nothing here decides whether a file is read: it only finds words, and what to do, for one that could not be.
"""

import html
import re
import struct
import unicodedata

from kcache.places import Place
from kcache.places.opened import opened

HEAD_BYTES = 4096
"""How much of a file `plainly` wants to see; less is enough for most, more is not looked at."""

_AGAIN = "fetch it again"
_CONVERT = "convert it to JPEG or PNG"
_UNPACK = "unpack it, and give what was in it"
_TAKE_OUT = "take pictures out of it first"
_FIRST = "by its first bytes"

_POINTERS = (
    (rb"version https://(git-lfs|hawser)\.github\.com/spec/", "a Git LFS pointer", "run: git lfs pull"),
    (rb"(\.\./)*(\.git)?/?annex/objects/", "a git-annex pointer", "run: git annex get"),
    (rb"# xet version \d", "a Xet pointer", _AGAIN),
    (rb"(?s)(md5:.{0,60})?(wdir:.{0,60})?outs:\s", "a DVC pointer", "run: dvc pull"),
)
"""Small texts that version control leaves in place of a large file: what is in them, their names, what to do."""
_NO_WORDS = re.compile(
    rb"(\xef\xbb\xbf)?\s*"
    rb"(version https://|(\.\.?|\.git|annex)?/|# xet|md5:|wdir:|outs:|(?i:<!doc|<html|<\?xml)|\{\\rtf)"
)
"""How text begins that may be none of people's; words in angle brackets may stand in captions."""
_KNOWN = (
    ("a JPEG picture", 0, b"\xff\xd8\xff"),
    ("a PNG picture", 0, b"\x89PNG\r\n\x1a\n"),
    ("a GIF picture", 0, b"GIF8"),
    ("a WebP picture", 8, b"WEBP"),
    ("a JPEG 2000 picture", 0, b"\0\0\0\x0cjP  "),
    ("a JPEG 2000 picture", 0, b"\xff\x4f\xff\x51"),
    ("a tar", 257, b"ustar"),
    ("a Parquet file", 0, b"PAR1"),
    ("an Arrow file", 0, b"ARROW1"),
    ("an Arrow stream", 0, b"\xff\xff\xff\xff"),
    ("a BMP picture", 0, b"BM"),
)
"""Kinds that kcache reads, in their place: name, where it stands, what stands there."""
_TO_CONVERT = (
    ("a JPEG XL picture", 0, b"\0\0\0\x0cJXL "),
    ("a JPEG XL picture", 0, b"\xff\x0a"),
    ("a Photoshop document (PSD)", 0, b"8BPS"),
    ("a GIMP document (XCF)", 0, b"gimp xcf"),
    ("an icon (ICO)", 0, b"\0\0\1\0"),
    ("an icon (ICNS)", 0, b"icns"),
    ("an OpenEXR picture", 0, b"v/1\x01"),
    ("a Radiance HDR picture", 0, b"#?RADIANCE"),
    ("a DDS texture", 0, b"DDS "),
    ("a QOI picture", 0, b"qoif"),
    ("a FITS picture", 0, b"SIMPLE  ="),
    ("a DICOM picture", 128, b"DICM"),
    ("a DjVu document", 0, b"AT&TFORM"),
    ("a Windows metafile (WMF)", 0, b"\xd7\xcd\xc6\x9a"),
    ("a Windows metafile (EMF)", 40, b" EMF"),
    ("camera RAW (ORF)", 0, b"IIRO"),
    ("camera RAW (ORF)", 0, b"IIRS"),
    ("camera RAW (ORF)", 0, b"MMOR"),
    ("camera RAW (RW2)", 0, b"IIU\0"),
    ("camera RAW (RAF)", 0, b"FUJIFILMCCD-RAW"),
    ("camera RAW (X3F)", 0, b"FOVb"),
    ("camera RAW (CRW)", 6, b"HEAPCCDR"),
    ("camera RAW (CR2)", 8, b"CR\x02\0"),
    ("a PDF document", 0, b"%PDF"),
    ("PostScript", 0, b"%!PS"),
    ("PostScript (EPS)", 0, b"\xc5\xd0\xd3\xc6"),
)
_VIDEOS = (
    ("a video (Matroska or WebM)", 0, b"\x1aE\xdf\xa3"),
    ("a video (AVI)", 8, b"AVI "),
    ("a video (FLV)", 0, b"FLV\1"),
    ("a video (MPEG)", 0, b"\0\0\1\xba"),
    ("a video (MPEG)", 0, b"\0\0\1\xb3"),
    ("a video (WMV)", 0, b"0&\xb2u\x8ef\xcf\x11"),
    ("a video or a sound (Ogg)", 0, b"OggS"),
)
_ARCHIVES = (
    ("a gzip archive", 0, b"\x1f\x8b"),
    ("a bzip2 archive", 0, b"BZh"),
    ("an xz archive", 0, b"\xfd7zXZ"),
    ("a 7z archive", 0, b"7z\xbc\xaf"),
    ("a RAR archive", 0, b"Rar!"),
    ("a zstd archive", 0, b"(\xb5/\xfd"),
    ("an LZ4 archive", 0, b"\x04\x22\x4d\x18"),
)
_OTHERS = (
    ("a sound (WAV)", 8, b"WAVE"),
    ("a sound (MP3)", 0, b"ID3"),
    ("an encrypted Parquet file; decrypt it first", 0, b"PARE"),
    ("a Feather file; save it as Parquet", 0, b"FEA1"),
    ("an Avro file; save it as Parquet", 0, b"Obj\1"),
    ("an HDF5 file; save it as Parquet, or weights as safetensors", 0, b"\x89HDF"),
    ("a NumPy array (.npy)", 0, b"\x93NUMPY"),
    ("an SQLite database", 0, b"SQLite format 3"),
    ("weights in GGUF; only safetensors are read", 0, b"GGUF"),
    ("what macOS keeps beside a file (AppleDouble, ._*); remove it", 0, b"\0\x05\x16\x07"),
    ("what macOS keeps about a folder (.DS_Store); remove it", 4, b"Bud1"),
    ("an RTF document; save it as plain text", 0, b"{\\rtf"),
    ("a JPEG picture written as text; decode it: base64 -d", 0, b"/9j/"),
    ("a PNG picture written as text; decode it: base64 -d", 0, b"iVBORw0KGgo"),
    ("a picture written as text (a data: URL); decode it", 0, b"data:image/"),
)
_MAGIC = (
    (_KNOWN, f" {_FIRST}"),
    (_TO_CONVERT, f"; {_CONVERT}"),
    (_VIDEOS, f"; {_TAKE_OUT}"),
    (_ARCHIVES, f"; {_UNPACK}"),
    (_OTHERS, ""),
)
_HEIF = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
_MOVIE_BOXES = {b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"}
_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f]")
_TURNING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
_BOMS = ((b"\xff\xfe\0\0", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"))


def plainly(head: bytes) -> str | None:
    """What a file that begins with `head` is, and what to do about it: words to follow "it is"; None where unknown.

    `head` is the whole file, if that has less than HEAD_BYTES; what is quoted of it is printable.
    """
    head = head[:HEAD_BYTES]
    if not head:
        return f"an empty file (0 bytes); {_AGAIN}, or remove it"
    if not head.strip(b"\0"):
        return f"nothing but zero bytes, as a download that was broken off or a full disk leaves them; {_AGAIN}"
    return _media_box(head) or _tiff(head) or _container(head) or _by_magic(head) or _text(head)


def no_words(content: bytes) -> str | None:
    """What a text file plainly is that was given as words of people, such as a caption, and holds none; else None."""
    if _NO_WORDS.match(content) is None:
        return None
    found = plainly(content)
    return None if found is None or found.startswith("text that begins") else found


def plainly_at(path: Place) -> str | None:
    """What `plainly` says of a file; None, too, where it cannot be read or is no regular file."""
    try:
        if not path.is_file():
            return None
        with opened(path) as file:
            return plainly(file.read(HEAD_BYTES))
    except (OSError, ValueError):
        return None


def shown(text: object, most: int = 60) -> str:
    """Words of a file, to stand in a message: `printable`, and cut after `most` characters."""
    text = text if isinstance(text, str) else ascii(text)
    return printable(text if len(text) <= most else text[: most - 1] + "…")


def printable(text: str) -> str:
    """Text on one line that a terminal shows as it is, in valid UTF-8; all else is escaped as in Python.

    Escaped are control characters, line ends, marks that turn the order of letters around, and what is no character: a
    byte NN of a file's name that is no UTF-8 is \\udcNN.
    """
    return text if text.isascii() and text.isprintable() else "".join(map(_printable, text))


def _printable(char: str) -> str:
    hidden = unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(char) in _TURNING
    return ascii(char)[1:-1] if hidden else char


def _media_box(head: bytes) -> str | None:
    """The family of MP4: HEIC, AVIF, one camera's RAW, and videos."""
    kind = head[4:8]
    if kind in _MOVIE_BOXES:
        return f"a video (QuickTime); {_TAKE_OUT}"
    if kind != b"ftyp":
        return None
    end = min(max(int.from_bytes(head[:4]), 16), len(head), 256)
    brands = [head[8:12], *(head[at : at + 4] for at in range(16, end, 4))]
    if brands[0] == b"crx ":
        return f"camera RAW (CR3); {_CONVERT}"
    if {b"avif", b"avis"} & set(brands):
        return f"an AVIF picture {_FIRST}"
    if _HEIF & set(brands) or brands[0] in (b"mif1", b"msf1"):
        return f"a HEIC picture, as iPhones make them; {_CONVERT}, e.g. with heif-convert"
    return f"a video (MP4); {_TAKE_OUT}"


def _tiff(head: bytes) -> str | None:
    """TIFF, and the cameras' RAW files that are made like it: the first picture in them is a thumbnail."""
    order = {b"II*\0": "<", b"MM\0*": ">", b"II+\0": "<", b"MM\0+": ">"}.get(head[:4])
    if order is None or head[8:10] == b"CR":
        return None
    tags: dict[int, int] = {}
    (at,) = struct.unpack_from(order + "I", head, 4) if len(head) >= 8 else (0,)
    if 8 <= at <= len(head) - 2:
        (count,) = struct.unpack_from(order + "H", head, at)
        for entry in range(at + 2, min(at + 2 + 12 * count, len(head) - 11), 12):
            tag, kind = struct.unpack_from(order + "HH", head, entry)
            (tags[tag],) = struct.unpack_from(order + ("H" if kind == 3 else "I"), head, entry + 8)
    if 50706 in tags:  # DNGVersion
        return f"camera RAW (DNG); {_CONVERT}"
    if tags.get(254) == 1 and 330 in tags:  # a thumbnail first, and the picture in a SubIFD
        return f"camera RAW (TIFF-like: NEF, ARW, …); {_CONVERT}"
    return f"a TIFF picture {_FIRST}"


def _container(head: bytes) -> str | None:
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        if b"/data.pkl" in head or b"/version" in head[:80]:
            return "a pickled PyTorch file, which kcache never unpickles; save it as safetensors"
        return f"a zip archive; {_UNPACK}"
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05" and len(head) > 2:
        return "a pickle, which kcache never unpickles; save it as safetensors or Parquet"
    if head[8:10] in (b'{"', b"{}") and int.from_bytes(head[:8], "little") < 1 << 32:
        return f"a file of weights (safetensors) {_FIRST}"
    return None


def _by_magic(head: bytes) -> str | None:
    for kinds, advice in _MAGIC:
        for name, at, magic in kinds:
            if head[at : at + len(magic)] == magic:
                return name + advice
    return None


def _text(head: bytes) -> str | None:
    for bom, encoding in _BOMS:
        if head.startswith(bom):
            return f"{encoding} text, as Windows writes it; convert it: iconv -f {encoding} -t UTF-8"
    for first, encoding in ((1, "UTF-16LE"), (0, "UTF-16BE")):
        if len(head) >= 8 and not head[first:64:2].strip(b"\0") and head[1 - first : 64 : 2].isascii():
            return f"{encoding} text without a mark that says so; convert it: iconv -f {encoding} -t UTF-8"
    if not head.strip() or _CONTROL.search(head):
        return None
    # A head may end in the middle of a character.
    text = head.decode("utf-8-sig", "replace").strip()
    if "\ufffd" in text[:-1]:
        return _other_encoding(head)
    for pattern, name, advice in _POINTERS:
        if re.match(pattern, text.encode()):
            return f"the text of {name}, not the file itself; {advice}"
    if re.fullmatch(r"\.{1,2}/[^\s]{1,300}", text):
        return f"the text of a link to '{shown(text)}', as Git leaves it where links are off; copy that file there"
    return _markup(text) or _json(text) or f"text that begins '{shown(text.splitlines()[0], 50)}'"


def _other_encoding(head: bytes) -> str:
    if sum(byte > 127 for byte in head) < 0.4 * len(head):
        return "text that is not UTF-8, likely Windows-1252; convert it: iconv -f WINDOWS-1252 -t UTF-8"
    return "text that is not UTF-8; convert it: iconv -f ENCODING -t UTF-8 (such as GB18030, SHIFT_JIS, WINDOWS-1251)"


def _markup(text: str) -> str | None:
    low = text[:1024].lower()
    if not low.startswith("<"):
        return None
    if "<svg" in low:
        return f"an SVG drawing; draw it as pixels first, e.g. with rsvg-convert: {_CONVERT}"
    if re.search(r"<(!doctype html|html|head|body)\b", low):
        title = re.search(r"(?is)<title[^>]*>(.{1,200}?)</title>", text)
        called = f" ('{shown(' '.join(html.unescape(title[1]).split()))}')" if title else ""
        return f"an HTML page{called}, as a failed download leaves it; {_AGAIN}, signed in if the site asks for it"
    if code := re.search(r"<(?:Code|Message)>([^<]{1,200})<", text):
        return f"an error message of a server ('{shown(code[1])}'); {_AGAIN}"
    return "an XML document"


def _json(text: str) -> str | None:
    if not re.match(r'\{\s*("|\})|\[\s*([\[{"\d\]-])', text):
        return None
    if error := re.search(r'"(?:error|message|detail|errors)"\s*:\s*"?([^"\n]{1,200})', text[:1024]):
        return f"an error message of a server in JSON ('{shown(error[1])}'); {_AGAIN}"
    return "JSON text"
