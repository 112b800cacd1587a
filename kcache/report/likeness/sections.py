"""What the embeddings say of a cache: which captions fit best and least, and a contact sheet of clusters.

Of a cache of any size at most `SAMPLED` samples are read, in runs that are evenly spread.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from kcache.config import CountReport
from kcache.report.drawn.shown import SIDE, as_image, caption_text, originals_and_decoded
from kcache.report.figures import histogram, picture
from kcache.report.grid import beside
from kcache.report.page import Block, Section, Table, Text
from kcache.store.cache import Cache
from kcache.store.likeness.clusters import far_apart, moved, nearest_middles
from kcache.store.likeness.cosines import IMAGE, ROWS_PER_READ, caption_cosines, unit
from kcache.store.recipe import TEXT
from kcache.store.samples import read_some_samples

if TYPE_CHECKING:
    from kcache.report.cache import ReportConfig

SAMPLED, RUN = 50_000, 128
"""Samples that are read at most, and how many of them beside each other."""
SHOWN = 6
"""Pairs that fit best, and least, that are shown; and pictures of a cluster."""
CLUSTERS, ROUNDS = 10, 30
STRIP, STRIP_BYTES = 96, 150_000
"""Height in pixels of a cluster's pictures, and bytes of all of them."""


@dataclass(frozen=True, kw_only=True)
class _Looked:
    """What there is to show of some samples."""

    told: Mapping[int, Mapping[str, Any]]
    """Name and captions, by number."""
    pictures: Mapping[int, Image.Image] | None
    """None where no pictures were asked for."""


def likeness_sections(cache: Cache, config: "ReportConfig", report: CountReport) -> list[Section]:
    """How captions fit, where there are texts, and kinds of pictures; none of a cache without samples."""
    if not len(cache) or IMAGE not in cache.recipes:
        return []
    numbers = sampled(len(cache))
    few = cache.select(numbers)
    cosines = None
    if TEXT.name in cache.recipes:
        cosines = caption_cosines(few, lambda done, total: report("captions and pictures", done, total))
    clusters = _clusters(few, report)
    order = np.empty(0, np.int64) if cosines is None else np.argsort(cosines, kind="stable")
    asked = np.concatenate([order[:SHOWN], order[-SHOWN:], *(nearest for nearest, _, _ in clusters)])
    looked = _look(cache, np.unique(numbers[asked]), config, report)
    of = "all" if len(few) == len(cache) else f"{len(few):,} of {len(cache):,}, evenly spread,"
    sections = [] if cosines is None else [_captions(numbers, cosines, order, looked, of)]
    return [*sections, _contact_sheet(numbers, clusters, looked, of)]


def sampled(count: int) -> np.ndarray:
    """The numbers of at most `SAMPLED` of so many samples, in runs, evenly spread: (n,) int64, which ascend."""
    if count <= SAMPLED:
        return np.arange(count)
    starts = np.linspace(0, count - RUN, SAMPLED // RUN).astype(np.int64)
    return np.unique(starts[:, None] + np.arange(RUN))


def _look(cache: Cache, numbers: np.ndarray, config: "ReportConfig", report: CountReport) -> _Looked:
    """Originals where there is a source, else what latents decode to."""
    told = read_some_samples(cache.path, cache.manifest, numbers, ["name", "captions"])
    names = dict(zip(numbers.tolist(), told, strict=True))
    decodes = config.pretrained_decoder_model_name_or_path is not None and cache.manifest.shape_sets
    if config.source is None and not decodes:
        return _Looked(told=names, pictures=None)
    if config.source is not None:
        config = replace(config, pretrained_decoder_model_name_or_path=None)
    given, made, shapes = originals_and_decoded(cache, numbers, config, report)
    found = [one if one is not None else other for one, other in zip(given, made, strict=True)]
    images = [as_image("" if part is None else part, shape) for part, shape in zip(found, shapes, strict=True)]
    return _Looked(told=names, pictures=dict(zip(numbers.tolist(), images, strict=True)))


def _captions(numbers: np.ndarray, cosines: np.ndarray, order: np.ndarray, looked: _Looked, of: str) -> Section:
    said = (
        f"The cosine of text_embeds and image_embeds of {of} samples, of each its least fitting caption: "
        '--where "caption_cosine > …" chooses by it.'
    )
    least, best = order[:SHOWN], order[::-1][:SHOWN]
    blocks: list[Block] = [histogram("How captions fit", cosines, "caption_cosine", said)]
    for text, chosen in (("Those that fit least:", least), ("Those that fit best:", best)):
        pairs = list(zip(numbers[chosen].tolist(), cosines[chosen].tolist(), strict=True))
        blocks += [Text(text=text), *_pairs(pairs, looked)]
    return Section(title="How captions fit", blocks=blocks)


def _pairs(pairs: Sequence[tuple[int, float]], looked: _Looked) -> list[Block]:
    told = [(f"{cosine:.3f}", looked.told[number]) for number, cosine in pairs]
    if looked.pictures is None:
        rows = [[cosine, row["name"], caption_text(row)] for cosine, row in told]
        return [Table(head=["Cosine", "Name", "Captions"], rows=rows)]
    return [
        picture(
            beside([looked.pictures[number]], SIDE), f"{cosine}, {row['name']}\n{caption_text(row)}", STRIP_BYTES
        )
        for (number, _), (cosine, row) in zip(pairs, told, strict=True)
    ]  # fmt: skip


def _clusters(few: Cache, report: CountReport) -> list[tuple[np.ndarray, float, float]]:
    """The places of the samples nearest to each cluster's middle, its share and its mean cosine; largest first."""
    parts = []
    for first in range(0, len(few), ROWS_PER_READ):
        last = min(first + ROWS_PER_READ, len(few))
        parts.append(unit(few.table_rows(IMAGE, first, last)[0]))
        report("pictures", last, len(few))
    rows = np.concatenate(parts)
    middles = moved(rows, far_apart(rows, CLUSTERS, np.random.default_rng(0)), ROUNDS)
    nearest, cosines = nearest_middles(rows, middles)
    clusters = []
    for number in np.unique(nearest).tolist():
        members = np.flatnonzero(nearest == number)
        best = members[np.argsort(-cosines[members], kind="stable")[:SHOWN]]
        clusters.append((best, len(members) / len(rows), float(cosines[members].mean())))
    return sorted(clusters, key=lambda cluster: -cluster[1])


def _contact_sheet(
    numbers: np.ndarray, clusters: Sequence[tuple[np.ndarray, float, float]], looked: _Looked, of: str
) -> Section:
    intro = (
        f"The image_embeds of {of} samples in {len(clusters)} clusters, by spherical k-means: of each the "
        "pictures nearest to its middle."
    )
    blocks: list[Block] = [Text(text=intro)]
    rows = []
    for best, share, cosine in clusters:
        shown = numbers[best].tolist()
        told = [looked.told[number] for number in shown]
        if looked.pictures is not None:
            strip = beside([looked.pictures[number] for number in shown], STRIP)
            caption = f"{share:.1%} of the samples, mean cosine to the middle {cosine:.3f}"
            lines = [row["captions"][0] if row["captions"] else row["name"] for row in told]
            blocks.append(picture(strip, "\n".join([caption, *dict.fromkeys(lines)]), STRIP_BYTES))
        names = "\n".join(f"{row['name']}: {row['captions'][0] if row['captions'] else ''}" for row in told)
        rows.append([f"{share:.1%}", f"{cosine:.3f}", names])
    if looked.pictures is None:
        blocks.append(Table(head=["Share", "Mean cosine to the middle", "Nearest to it"], rows=rows))
    return Section(title="Kinds of pictures", blocks=blocks)
