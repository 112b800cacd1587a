"""The demo's pictures: scans of handwritten digits, coloured and captioned.

The scans in scans.npz are the test set of "Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak, UCI
Machine Learning Repository, 1998 (https://doi.org/10.24432/C50P49), licensed CC BY 4.0: 1,797 greyscale pictures of
8 x 8 pixels, unchanged. Every fifth is kept for tests: no network sees it.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from kcache.config.shapes import Shape
from kcache.errors import ConfigError

SCANS = Path(__file__).parent / "scans.npz"
"""`scans` (1797, 8, 8) uint8 from 0 to 16, and `digits` (1797,) uint8."""
SIDE = 32
"""Width and height of the pictures, in pixels."""

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INKS = {
    "black": (24, 24, 28),
    "red": (200, 30, 45),
    "orange": (235, 120, 20),
    "green": (20, 135, 70),
    "blue": (30, 75, 200),
    "purple": (125, 45, 165),
}
PAPERS = {"white": (255, 255, 255), "cream": (250, 236, 196), "mint": (205, 240, 220), "pink": (252, 214, 226)}

FULL = (
    "{an_ink} {digit} on {paper} paper",
    "{a_digit} in {ink} ink on {paper} paper",
    "{paper} paper with {an_ink} {digit}",
    "the digit {digit}, {ink} on {paper}",
    "{digit} written in {ink} on {paper} paper",
    "a handwritten {digit}, {ink} ink, {paper} paper",
)
"""Captions that say all of a picture."""
PARTIAL = (
    "{an_ink} {digit}",
    "{a_digit} on {paper} paper",
    "{an_ink} digit on {paper} paper",
    "the digit {digit}",
    "a digit in {ink} ink",
    "something written on {paper} paper",
)
"""Captions that leave one or two attributes out."""
TEMPLATES = FULL + PARTIAL


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """What a picture shows."""

    digit: int
    ink: str
    paper: str

    def caption(self, template: str = FULL[0]) -> str:
        """`template` filled in, which may leave attributes out: "a red seven on white paper"."""
        return template.format(
            digit=DIGITS[self.digit],
            ink=self.ink,
            paper=self.paper,
            a_digit=_with_article(DIGITS[self.digit]),
            an_ink=_with_article(self.ink),
        )


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' and noun != 'one' else 'a'} {noun}"


def all_drawings() -> list[Drawing]:
    """Every digit in every ink on every paper: 240."""
    return [Drawing(digit=digit, ink=ink, paper=paper) for digit, ink, paper in product(range(10), INKS, PAPERS)]


def is_held_out(drawing: Drawing) -> bool:
    """Whether the drawing's digit and ink never go together in the lesson: one ink of each digit, so no green five."""
    return drawing.ink == list(INKS)[(drawing.digit + 4) % len(INKS)]


def vocabulary() -> list[str]:
    """Every caption there is, 1,584 in all, each once."""
    return list(dict.fromkeys(drawing.caption(template) for template in TEMPLATES for drawing in all_drawings()))


def write_digits(folder: Path, count: int) -> None:
    """Write `count` pictures and their captions as an imagefolder: PNG files and metadata.jsonl, the same every time.

    Raises ConfigError for more pictures than there are scans.
    """
    scans, digits = _all_scans()
    if not 1 <= count <= len(scans):
        raise ConfigError(f"{count} demo pictures asked for; expected 1 to {len(scans)}, the number of scans")
    rng = np.random.default_rng(0)
    order = rng.permutation(len(scans))[:count]
    inks, papers = rng.choice(list(INKS), count), rng.choice(list(PAPERS), count)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (scan, ink, paper) in enumerate(zip(order, inks, papers, strict=True)):
        name = f"{number:04}.png"
        coloured(scans[scan], ink, paper).save(folder / name)
        caption = Drawing(digit=digits[scan], ink=ink, paper=paper).caption()
        lines.append(json.dumps({"file_name": name, "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_lesson(
    folder: Path,
    count: int,
    shapes: Sequence[Shape] = ((SIDE, SIDE),),
    *,
    write: Callable[[np.ndarray, Drawing, int], tuple[Image.Image, list[str]]] | None = None,
) -> None:
    """Write `count` pictures that the demo trains on as an imagefolder, the same every time.

    Each scan that is not kept for tests is drawn once, then each in another way, and so on, none of them held out. Each
    picture has a list of four captions, of which one leaves something out. `shapes` are those of the paper, taken in
    turn; or `write` makes a picture and its captions from a scan (8, 8), a drawing and a number that counts through
    such turns. Raises ConfigError for more than 20 pictures of each scan.
    """
    scans, digits = read_scans(test=False)
    if not 1 <= count <= 20 * len(scans):
        raise ConfigError(f"{count} pictures to train on asked for; expected 1 to {20 * len(scans)}, 20 of each scan")
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    ways = [
        [drawing for drawing in all_drawings() if drawing.digit == n and not is_held_out(drawing)] for n in range(10)
    ]
    orders = [rng.permutation(len(ways[digit])) for digit in digits]
    lines = []
    for number in range(count):
        times, scan = divmod(number, len(scans))
        drawing, name = ways[digits[scan]][orders[scan][times]], f"{number:05}.png"
        if write is None:
            templates = [*rng.choice(FULL, 3, replace=False), rng.choice(PARTIAL)]
            captions = [drawing.caption(template) for template in templates]
            digit = coloured(scans[scan], drawing.ink, drawing.paper)
            picture = on_paper(digit, drawing.paper, shapes[(times + scan) % len(shapes)])
        else:
            picture, captions = write(scans[scan], drawing, times + scan)
        picture.save(folder / name, compress_level=1)
        lines.append(json.dumps({"file_name": name, "text": captions}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_scans(*, test: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scans (n, 8, 8) float64 from 0 to 1, and their digits (n,) int64: the 360 kept for tests, or the other 1,437."""
    scans, digits = _all_scans()
    kept = (np.arange(len(scans)) % 5 == 0) == test
    return scans[kept], digits[kept]


def _all_scans() -> tuple[np.ndarray, np.ndarray]:
    with np.load(SCANS, allow_pickle=False) as file:
        return file["scans"] / 16.0, file["digits"].astype(np.int64)


def cover_of(scan: np.ndarray) -> np.ndarray:
    """How much ink covers each pixel of a picture: (SIDE, SIDE) float32 from 0 to 1."""
    grey = Image.fromarray(scan.astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(grey), 0.0, 1.0)


def coloured(scan: np.ndarray, ink: str, paper: str) -> Image.Image:
    """The picture of a scan (8, 8) in an ink on a paper."""
    cover = cover_of(scan)[:, :, None]
    blend = cover * np.array(INKS[ink]) + (1.0 - cover) * np.array(PAPERS[paper])
    return Image.fromarray(np.round(blend).astype(np.uint8))


def on_paper(digit: Image.Image, paper: str, shape: Shape) -> Image.Image:
    """The picture of a digit in the middle of a paper of a shape, which is as large or larger."""
    height, width = shape
    picture = Image.new("RGB", (width, height), PAPERS[paper])
    picture.paste(digit, ((width - digit.width) // 2, (height - digit.height) // 2))
    return picture


def middle_of(picture: Image.Image) -> Image.Image:
    """The SIDE x SIDE pixels in the middle of a picture."""
    left, top = (picture.width - SIDE) // 2, (picture.height - SIDE) // 2
    return picture.crop((left, top, left + SIDE, top + SIDE))
