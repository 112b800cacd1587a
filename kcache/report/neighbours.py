"""Which pictures of the cache look most like those that a run drew last, to CLIP's image encoder.

A cosine close to 1 says that a picture was copied rather than learned from.
"""

from pathlib import Path

import numpy as np
import torch

from kcache.config import CountReport
from kcache.disk.memo import DigestMemo
from kcache.encoders.frozen import PictureEncoder
from kcache.encoders.repositories import find_repository
from kcache.encoders.weights import weights_digest
from kcache.errors import KcacheError, ModelError
from kcache.report.drawn.strips import drawn_prompts
from kcache.report.grid import grids_of, open_picture, pictures_of, png_bytes
from kcache.report.page import Block, Section, Table, Text
from kcache.report.run import Run
from kcache.store.cache import Cache
from kcache.store.samples import read_some_samples

NEAREST = 3
"""Neighbours of each picture that are named."""
ROWS_PER_READ = 4096


def neighbours_section(run: Run, device: str, report: CountReport) -> Section:
    """The nearest neighbours of the newest pictures; where they cannot be had, which part is missing, in one line."""
    try:
        blocks = _neighbours(run, torch.device(device), report)
    except (KcacheError, OSError) as error:
        blocks = [Text(text=f"Not compared: {error}")]
    return Section(title="Nearest pictures in the cache", blocks=blocks)


def _neighbours(run: Run, device: torch.device, report: CountReport) -> list[Block]:
    prompts, grids = drawn_prompts(run.told), grids_of(run.folder)
    if not grids:
        return [Text(text="Not compared: the run has drawn no pictures of prompts (--validation-prompts).")]
    newest, pictures = grids[-1], pictures_of(grids[-1])
    if not prompts or len(pictures) != len(prompts):
        wanted = f"one for each of the {len(prompts)} prompts in config.json"
        return [Text(text=f"Not compared: beside {newest.name} lie {len(pictures)} single pictures, not {wanted}.")]
    cache = Cache.open(run.told["cache"]["path"])
    embeds = _embeds(cache, pictures, device)
    samples, cosines = nearest(cache, embeds, report)
    text = (
        f"The pictures of {newest.name} beside all {len(cache):,} samples of the cache, by the cosine of the angle "
        "between their CLIP embeddings: close to 1 means a copy."
    )
    return [Text(text=text), _table(cache, prompts, samples, cosines)]


def _embeds(cache: Cache, pictures: list[Path], device: torch.device) -> np.ndarray:
    """(n, D) float32, of length 1, by the encoder that made the cache's own."""
    recipe, origin = cache.recipes[cache.table_of("image_embeds")], cache.models["prior"]
    prior = find_repository(str(origin["name"]), origin["revision"], ("image_encoder", "image_processor"))
    with DigestMemo() as memo:
        if weights_digest(prior, "image_encoder", memo, known=recipe.weights) != recipe.weights:
            raise ModelError(f"the image encoder at {prior.name} is not the one that the cache was built with")
    encoder = PictureEncoder(recipe, prior, device)
    prepared = [encoder.prepare(png_bytes(open_picture(path))) for path in pictures]
    size = encoder.batch_size
    parts = [encoder.encode(prepared[start : start + size]) for start in range(0, len(prepared), size)]
    return _unit(np.concatenate([part["image_embeds"].float().cpu().numpy() for part in parts]))


def nearest(cache: Cache, embeds: np.ndarray, report: CountReport) -> tuple[np.ndarray, np.ndarray]:
    """The samples whose image_embeds have the largest cosines to `embeds` (n, D) of length 1, largest first.

    Samples are (n, k) int64 and cosines (n, k) float32, k being `NEAREST` or all there are. The cache is read once, in
    parts, whatever its size.
    """
    count = min(NEAREST, len(cache))
    samples, cosines = np.zeros((len(embeds), 0), np.int64), np.zeros((len(embeds), 0), np.float32)
    for start in range(0, len(cache), ROWS_PER_READ):
        numbers = np.arange(start, min(start + ROWS_PER_READ, len(cache)))
        found = embeds @ _unit(cache.read(numbers, ["image_embeds"])["image_embeds"].astype(np.float32)).T
        cosines = np.concatenate([cosines, found], axis=1)
        samples = np.concatenate([samples, np.broadcast_to(numbers, found.shape)], axis=1)
        best = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
        cosines, samples = np.take_along_axis(cosines, best, 1), np.take_along_axis(samples, best, 1)
        report("nearest pictures", int(numbers[-1]) + 1, len(cache))
    return samples, cosines


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows (n, D) at length 1; a row of zeros stays one."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)


def _table(cache: Cache, prompts: list[str], samples: np.ndarray, cosines: np.ndarray) -> Table:
    shown = np.unique(samples)
    told = read_some_samples(cache.path, cache.manifest, shown, ["name", "captions"])
    by_number = dict(zip(shown.tolist(), told, strict=True))
    rows = []
    for number, (prompt, nearest_samples, nearest_cosines) in enumerate(zip(prompts, samples, cosines, strict=True), 1):
        for place, (sample, cosine) in enumerate(zip(nearest_samples.tolist(), nearest_cosines.tolist(), strict=True)):
            name, captions = by_number[sample]["name"], by_number[sample]["captions"]
            first = [str(number), prompt] if place == 0 else ["", ""]
            rows.append([*first, f"{cosine:.3f}", name, captions[0] if captions else ""])
    return Table(head=["Picture", "Prompt", "Cosine", "Sample", "Its caption"], rows=rows)
