"""The demo's pictures: scikit-learn's scans of handwritten digits, coloured and captioned.

The scans are the test set of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, UCI, 1998), as
scikit-learn carries it: 1,797 greyscale pictures of 8 x 8 pixels.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from kcache.errors import ConfigError

__all__ = ["DIGITS", "INKS", "PAPERS", "SIDE", "caption_of", "vocabulary", "write_digits"]

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


def caption_of(digit: int, ink: str, paper: str) -> str:
    """The caption of a picture: "a red seven on white paper"."""
    article = "an" if ink[0] in "aeiou" else "a"
    return f"{article} {ink} {DIGITS[digit]} on {paper} paper"


def vocabulary() -> list[str]:
    """Every caption there is, 240 in all."""
    return [caption_of(digit, ink, paper) for digit in range(10) for ink in INKS for paper in PAPERS]


def write_digits(folder: Path, count: int) -> None:
    """Write `count` pictures and their captions as an imagefolder: PNG files and metadata.jsonl, the same every time.

    Raises ConfigError for more pictures than there are scans, or where scikit-learn is not installed.
    """
    scans, digits = _scans()
    if not 1 <= count <= len(scans):
        raise ConfigError(f"{count} demo pictures asked for; expected 1 to {len(scans)}, the number of scans")
    rng = np.random.default_rng(0)
    order = rng.permutation(len(scans))[:count]
    inks, papers = rng.choice(list(INKS), count), rng.choice(list(PAPERS), count)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (scan, ink, paper) in enumerate(zip(order, inks, papers, strict=True)):
        name = f"{number:04}.png"
        _coloured(scans[scan], INKS[ink], PAPERS[paper]).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": caption_of(digits[scan], ink, paper)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _scans() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 8, 8) float64 scans from 0 to 1, and (1797,) int64 digits."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            "scikit-learn, which carries the demo's scans, is not installed; run: pip install 'kcache[demo]'"
        ) from error
    scans = load_digits()
    return scans.images / 16.0, scans.target


def _coloured(scan: np.ndarray, ink: tuple[int, int, int], paper: tuple[int, int, int]) -> Image.Image:
    grey = Image.fromarray(scan.astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    cover = np.clip(np.asarray(grey), 0.0, 1.0)[:, :, None]
    blend = cover * np.array(ink) + (1.0 - cover) * np.array(paper)
    return Image.fromarray(np.round(blend).astype(np.uint8))
