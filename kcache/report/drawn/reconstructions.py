"""Samples of a cache to look at: pictures decoded from their latents by MoVQ, beside the originals of the source."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import VQModel

from kcache.config import CountReport, SourceConfig
from kcache.config.shapes import Shape
from kcache.encoders.decoding import Decoding, decode_image
from kcache.encoders.pixels import movq_pixels
from kcache.encoders.pretrained import load_pretrained
from kcache.encoders.repositories import find_repository
from kcache.errors import InputRejected, SourceError
from kcache.sources import Source, open_source
from kcache.store.cache import Cache
from kcache.store.digests import content_key
from kcache.store.samples import read_some_samples

logger = logging.getLogger(__name__)

ABSENT, CHANGED = "not in the source", "another picture in the source now"


def decoded(
    latents: Sequence[np.ndarray | None], decoder: str, device: str, report: CountReport
) -> list[np.ndarray | None]:
    """What MoVQ makes of some samples' latents: pixels (3, h, w) float32 in -1..1 each, not quantised; None of none.

    `decoder` is a folder or Hub id with movq, as for a build; as in the stock pipelines, latents are decoded as they
    are. Raises ModelError for a repository that cannot be used.
    """
    if all(row is None for row in latents):
        return list(latents)
    repository = find_repository(decoder, None, ("movq",))
    network = load_pretrained(VQModel, repository.path / "movq", torch.float32)
    network.eval().requires_grad_(False).to(device)
    pictures: list[np.ndarray | None] = []
    for number, row in enumerate(latents, 1):
        if row is None:
            pictures.append(None)
            continue
        given = torch.from_numpy(row[None].astype(np.float32)).to(device)
        with torch.inference_mode():
            pixels = network.decode(given, force_not_quantize=True).sample[0]
        pictures.append(pixels.clamp(-1, 1).float().cpu().numpy())
        report("decoding", number, len(latents))
    return pictures


def originals(
    cache: Cache, samples: np.ndarray, source: str, reading: SourceConfig, shapes: Sequence[Shape], report: CountReport
) -> list[np.ndarray | str]:
    """What MoVQ saw of the pictures of `samples` (k,), which ascend: of each pixels (3, *its shape) float32 in -1..1.

    For one that `source` has no more, or no longer with that content, there is a sentence that says so, and a warning
    of how many these are. Raises SourceError, also for a source that has none of them.
    """
    opened = open_source(source, reading, need_captions=False)
    told = read_some_samples(cache.path, cache.manifest, samples, ["name", "image_key"])
    wanted = {row["name"] for row in told}
    places = {name: i for i in range(len(opened)) if (name := opened.name(i)) in wanted}
    how = Decoding.of(cache.recipes[cache.table_of("image_embeds")])
    pictures = []
    for number, (row, shape) in enumerate(zip(told, shapes, strict=True), 1):
        pictures.append(_original(opened, places.get(row["name"]), row, how, shape))
        report("reading originals", number, len(told))
    _check_found(pictures, source, cache, told[0]["name"])
    return pictures


def _check_found(pictures: list[np.ndarray | str], source: str, cache: Cache, name: str) -> None:
    absent, changed = (sum(part == why for part in pictures if isinstance(part, str)) for why in (ABSENT, CHANGED))
    if absent + changed == len(pictures):
        raise SourceError(
            f"{source} has none of the {len(pictures)} samples that are shown of {cache.path}, such as {name} "
            f"({absent} are not there, {changed} have another picture now); expected what the cache was built from; "
            "give that as --source, or leave it out"
        )
    if absent + changed:
        logger.warning(
            "%d of the %d samples shown have no original in %s: %d are not there, %d have another picture now",
            absent + changed, len(pictures), source, absent, changed,
        )  # fmt: skip


def _original(
    source: Source, place: int | None, row: Mapping[str, Any], how: Decoding, shape: Shape
) -> np.ndarray | str:
    if place is None:
        return ABSENT
    try:
        content = source.image(place)
        if content_key(content) != row["image_key"]:
            return CHANGED
        return movq_pixels(decode_image(content, how), shape)
    except InputRejected as error:
        return f"not to be read from the source: {error}"


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two pictures in -1..1: 10 log10(2² / mean squared difference)."""
    error = float(np.mean((first.astype(np.float64) - second) ** 2))
    return math.inf if error == 0 else 10 * math.log10(4 / error)
