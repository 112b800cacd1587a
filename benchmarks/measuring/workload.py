"""What training and building are measured on: pictures with captions, networks with random weights, caches of them.

Pictures are JPEGs of coloured noise with the spectrum of photographs, so that they take as long to decode and compress
as well. Captions have about 16 tokens, normally distributed with a deviation of 4.
"""

import argparse
import io
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from kcache.build.build import build_cache
from kcache.config import BuildConfig, MixedPrecision, Stage
from kcache.demo.digits import vocabulary
from kcache.machine import default_device
from measuring.models import SIZES, write_models

SIDES = {"tiny": 256, "full": 1024}
"""Sides of the pictures, in pixels, unless told."""
RESOLUTIONS = {"tiny": 128, "full": 768}
QUALITY = 90


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Pictures and networks in a folder."""

    folder: Path
    images: int
    pictures: Path
    prior: Path
    decoder: Path

    def build_config(
        self, stage: Stage, resolution: int, batch_size: int, mixed_precision: MixedPrecision, form: str = "zarr"
    ) -> BuildConfig:
        """Settings of a build for `stage`."""
        return BuildConfig(
            stage=stage,
            format="webdataset" if form == "webdataset" else "zarr",
            resolution=(resolution,),
            batch_size=batch_size,
            mixed_precision=mixed_precision,
            pretrained_prior_model_name_or_path=str(self.prior),
            pretrained_decoder_model_name_or_path=str(self.decoder),
        )

    def cache(self, stage: Stage, resolution: int, batch_size: int, mixed_precision: MixedPrecision) -> Path:
        """A cache of the pictures, built unless it is there."""
        of = stage if stage == "prior" else f"{stage}-{resolution}"
        path = self.folder / f"cache-{self.pictures.name}-{of}-{batch_size}-{mixed_precision}"
        build_cache(str(self.pictures), str(path), self.build_config(stage, resolution, batch_size, mixed_precision))
        return path


def add_workload_arguments(parser: argparse.ArgumentParser, images: int) -> None:
    """The options that say what to measure on."""
    parser.add_argument("--model-size", choices=SIZES, default="tiny", help="full: as published, with random weights")
    parser.add_argument("--images", type=int, default=images, help=f"how many pictures (default {images})")
    parser.add_argument("--image-side", type=int, help="pixels; default 256, 1024 with --model-size full")
    parser.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), default="no")
    parser.add_argument("--folder", type=Path, help="where pictures, networks and caches are kept for the next time")


@contextmanager
def open_workload(arguments: argparse.Namespace) -> Iterator[Workload]:
    """The workload that `arguments` ask for, made unless it is there; without --folder it goes away in the end."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = (arguments.folder or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("KCACHE_HOME", str(folder / "home"))
        side = arguments.image_side or SIDES[arguments.model_size]
        pictures = folder / f"{arguments.images}x{side}"
        if not (pictures / "metadata.jsonl").exists():
            write_pictures(pictures, arguments.images, side)
        prior, decoder = write_models(folder / arguments.model_size, arguments.model_size, default_device())
        yield Workload(folder=folder, images=arguments.images, pictures=pictures, prior=prior, decoder=decoder)


def write_pictures(folder: Path, count: int, side: int) -> None:
    """Write `count` pictures of side × side pixels and their captions as an imagefolder, the same every time."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    scene = _scene(rng, side)
    words = sorted({word for caption in vocabulary() for word in caption.replace(",", "").split()})
    lines = []
    for number in range(count):
        name = f"{number:05}.jpg"
        moved = np.roll(scene, rng.integers(side, size=2), (0, 1)) * rng.uniform(0.6, 1.0, 3)
        file = io.BytesIO()
        Image.fromarray(moved.astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
        (folder / name).write_bytes(file.getvalue())
        tokens = int(np.clip(np.round(rng.normal(16, 4)), 3, 77))
        # Each word is one token; begin and end take two more.
        lines.append(json.dumps({"file_name": name, "text": " ".join(rng.choice(words, tokens - 2))}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _scene(rng: np.random.Generator, side: int) -> np.ndarray:
    """Noise whose amplitude falls with one over the frequency, (side, side, 3) float64 from 0 to 255.

    Natural images have this spectrum: Field 1987, "Relations between the statistics of natural images and the response
    properties of cortical cells".
    """
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((3, side, side))) / frequency
    noise = np.moveaxis(np.fft.irfft2(spectrum, s=(side, side)), 0, 2)
    return np.clip(127.5 + 36 * noise / noise.std(), 0, 255)
