"""The report of a cache: what is in it, samples to look at, how its values spread, what was rejected, its shards.

Of a cache of any size only the index, the manifest and some thousand rows are read.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kcache.config import AS_FOUND, CountReport, SourceConfig
from kcache.places import Place
from kcache.report.drawn.shown import SIDE, as_image, caption_text, originals_and_decoded, shown_set
from kcache.report.figures import bars, histogram, picture
from kcache.report.grid import beside
from kcache.report.likeness.sections import likeness_sections
from kcache.report.page import Block, Section, Table, Text
from kcache.store.cache import Cache
from kcache.store.index import statistics, tally_of, token_counts
from kcache.store.manifest import Manifest
from kcache.store.recipe import kind_of
from kcache.store.samples import read_refused, read_some_samples

SHOWN = 24
"""Samples that are shown, evenly spread over the cache."""
PICTURE_BYTES = 100_000
SAMPLED_ROWS = 2048
"""Rows of each field whose norms are taken."""
ROWS_PER_READ = 128
REJECTED, SHARDS = 50, 50
"""Rejected inputs and shards that are named one by one."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What `kcache report` is told."""

    path: str
    """A run directory or a cache."""
    output: str | None = None
    """The HTML file; None takes report.html in a run directory, and NAME-report.html beside a cache called NAME."""
    neighbours: bool = False
    """Of a run: compare the newest pictures with the whole cache, by CLIP's image encoder."""
    pretrained_decoder_model_name_or_path: str | None = None
    """Of a cache: folder or Hub id with movq, to decode some latents; None decodes none."""
    source: str | None = None
    """Of a cache: where it was built from, to show originals; None shows none."""
    reading: SourceConfig = AS_FOUND
    """How the source is read."""
    device: str = "cpu"
    """Where CLIP and MoVQ run."""


def cache_sections(config: ReportConfig, report: CountReport) -> list[Section]:
    """All sections of the report of the cache at `config.path`.

    Raises the errors of `Cache.open` and `Cache.read`, SourceError and ModelError for what `config` names.
    """
    cache = Cache.open(config.path)
    folder = cache.path
    return [
        Section(title="Overview", blocks=[_overview(folder, cache.manifest), *_losses(cache)]),
        *_shapes(cache),
        Section(title="Samples", blocks=_samples(cache, config, report)),
        Section(title="Captions", blocks=_captions(cache)),
        *likeness_sections(cache, config, report),
        Section(title="Values", blocks=_norms(cache, report)),
        Section(title="Rejected inputs", blocks=_rejected(folder, cache.manifest.rejected)),
        Section(title="Tables and shards", blocks=_tables(cache.manifest)),
    ]


def size_text(count: int) -> str:
    """Bytes for people, in powers of ten: "25.1 MB"."""
    for power, unit in ((12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")):
        if count >= 10**power:
            return f"{count / 10**power:.1f} {unit}"
    return f"{count} B"


def _overview(folder: Place, manifest: Manifest) -> Table:
    models = [
        [f"Encoders of the {role}", str(model["name"]) + (f" at {model['revision']}" if model["revision"] else "")]
        for role, model in sorted(manifest.models.items())
    ]
    rows = [
        ["Folder", str(folder.resolve())],
        ["Form", manifest.format],
        ["Samples", f"{manifest.samples:,}"],
        ["Rejected inputs", f"{manifest.rejected:,}"],
        ["Size of its tables", size_text(sum(entry.bytes for entry in manifest.tables.values()))],
        *models,
        ["Fingerprint", manifest.fingerprint[:16]],
    ]
    return Table(head=["What", "Value"], rows=rows)


def _losses(cache: Cache) -> list[Block]:
    """A sentence for each way in which inputs are not there as they were given."""
    return [Text(text=f"{said}.") for said in tally_of(cache.path, cache.manifest, cache.index).sentences]


def _shapes(cache: Cache) -> list[Section]:
    """Of each set of several shapes how many samples have which; none where all are plain squares."""
    blocks: list[Block] = []
    standing = cache.held.reads.standing
    for shapes in cache.manifest.shape_sets:
        if not shapes.is_square:
            counts = standing.counts(shapes)
            small = len(cache) - sum(counts.values())
            text = f"At {shapes.name}: samples by height × width in pixels; {small:,} are too small."
            names = [f"{tall} × {wide}" for tall, wide in counts]
            blocks.append(bars(f"Samples by shape, {shapes.resolution} pixels", names, list(counts.values()), text))
            table = [[name, f"{count:,}"] for name, count in zip(names, counts.values(), strict=True)]
            blocks.append(Table(head=["Height × width", "Samples"], rows=table))
    return [Section(title="Shapes", blocks=blocks)] if blocks else []


def _samples(cache: Cache, config: ReportConfig, report: CountReport) -> list[Block]:
    if not len(cache):
        return [Text(text="The cache has no samples.")]
    chosen = np.unique(np.linspace(0, len(cache) - 1, min(SHOWN, len(cache))).astype(np.int64))
    told = read_some_samples(cache.path, cache.manifest, chosen, ["name", "captions", "width", "height"])
    intro = Text(text=f"{len(chosen)} of {len(cache):,} samples, evenly spread over the cache.")
    sets = cache.manifest.shape_sets
    if config.source is None and (config.pretrained_decoder_model_name_or_path is None or not sets):
        reason = "give --pretrained-decoder-model-name-or-path or --source" if sets else "it has none: give --source"
        none = Text(text=f"No pictures: a cache holds none, and its latents were not decoded ({reason}).")
        rows = [[row["name"], f"{row['width']} × {row['height']}", caption_text(row)] for row in told]
        return [intro, none, Table(head=["Name", "Pixels", "Captions"], rows=rows)]
    return [intro, *_pictures(cache, chosen, told, config, report)]


def _pictures(
    cache: Cache, chosen: np.ndarray, told: Sequence[Mapping[str, Any]], config: ReportConfig, report: CountReport
) -> list[Block]:
    """Each sample's original and what its first latents decode to, whichever were asked for."""
    # Not at the top: only pictures need torch.
    from kcache.report.drawn.reconstructions import psnr

    given, made, shapes = originals_and_decoded(cache, chosen, config, report)
    figures: list[Block] = []
    ratios = []
    for row, first, second, shape in zip(told, given, made, shapes, strict=True):
        lines = [f"{row['name']}, {row['width']} × {row['height']}"]
        if isinstance(first, np.ndarray) and second is not None:
            ratios.append(psnr(first, second))
            lines.append(f"PSNR {ratios[-1]:.1f} dB")
        lines += [first] if isinstance(first, str) else []
        there = [part for part in (first, second) if part is not None]
        if not there:
            lines.append("too small: it has no latents")
        shown = beside([as_image(part, shape) for part in there or [""]], SIDE)
        figures.append(picture(shown, "\n".join([*lines, caption_text(row)]), PICTURE_BYTES))
    parts = (["the original"] if config.source is not None else []) + (
        [f"what MoVQ makes of the latents at {shown_set(cache).name} pixels, not quantised"]
        if any(pixels is not None for pixels in made)
        else []
    )
    return [Text(text=f"Of each {', and '.join(parts)}."), *figures, *_ratios(np.array(ratios))]


def _ratios(ratios: np.ndarray) -> list[Block]:
    known = ratios[np.isfinite(ratios)]
    if not len(known):
        return []
    text = Text(text=f"Decoded latents to originals: {known.min():.1f} to {known.max():.1f} dB.")
    return [text, histogram("Peak signal-to-noise ratio", known, "dB", f"Of the {len(known)} samples above.")]


def _captions(cache: Cache) -> list[Block]:
    counts = np.diff(cache.caption_bounds)
    tokens = token_counts(cache.recipes, cache.index)
    rows = [
        [what, *(f"{values[name]:g}" for name in ("min", "mean", "p50", "p90", "p99", "max"))]
        for what, values in (
            ("Captions of a sample", statistics(counts)),
            ("Tokens of a caption", statistics(tokens)),
        )
        if values is not None
    ]
    if not rows:
        return [Text(text="The cache has no captions.")]
    blocks: list[Block] = []
    if len(tokens):
        text = f"Valid tokens of all {len(tokens):,} captions, the two that mark beginning and end included."
        blocks.append(histogram("Tokens of a caption", tokens, "tokens", text))
    return [*blocks, Table(head=["", "least", "mean", "median", "90 %", "99 %", "most"], rows=rows)]


def _norms(cache: Cache, report: CountReport) -> list[Block]:
    """Histograms of the Euclidean norms of rows, of every field whose rows all have one shape."""
    if not len(cache):
        return [Text(text="The cache has no samples.")]
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.choice(len(cache), min(SAMPLED_ROWS, len(cache)), replace=False))
    blocks: list[Block] = []
    for table, recipe in sorted(cache.recipes.items()):
        opened = cache.of_table(table)
        for field in recipe.fields:
            if not field.ragged and (kind_of(table).per == "image" or np.diff(cache.caption_bounds).all()):
                norms = _norms_of(opened, chosen[chosen < len(opened)], field.name, table, report)
                title = table if kind_of(table).sided else field.name
                shape = " × ".join(map(str, field.shape))
                text = (
                    f"Euclidean norms of {len(norms):,} of {len(cache):,} rows of {shape} {recipe.stored_dtype} values."
                )
                blocks.append(histogram(title, norms, "norm", text))
    return blocks


def _norms_of(cache: Cache, chosen: np.ndarray, field: str, table: str, report: CountReport) -> np.ndarray:
    norms = []
    for start in range(0, len(chosen), ROWS_PER_READ):
        rows = cache.read(chosen[start : start + ROWS_PER_READ], [field])[field]
        norms.append(np.linalg.norm(rows.reshape(len(rows), -1).astype(np.float64), axis=1))
        report(f"norms of {table}", min(start + ROWS_PER_READ, len(chosen)), len(chosen))
    return np.concatenate(norms)


def _rejected(folder: Place, count: int) -> list[Block]:
    reasons: Counter[tuple[str, str]] = Counter()
    first: list[list[str]] = []
    for refusal in read_refused(folder):
        reasons[refusal.stage, refusal.reason] += 1
        if len(first) < REJECTED:
            first.append([refusal.name, refusal.stage, refusal.reason])
    if not first:
        return [Text(text="No input was rejected.")]
    grouped = [[stage, reason, f"{n:,}"] for (stage, reason), n in reasons.most_common(REJECTED)]
    more = f", the first {len(first)} of them by name" if count > len(first) else ""
    return [
        Text(text=f"Inputs of the source that are not in the cache: {count:,}{more}. rejected.jsonl names all."),
        Table(head=["Stage", "Reason", "Inputs"], rows=grouped),
        Table(head=["Input", "Stage", "Reason"], rows=first),
    ]


def _tables(manifest: Manifest) -> list[Block]:
    tables, shards = [], []
    for name, entry in sorted(manifest.tables.items()):
        recipe = entry.recipe
        size = [f"{entry.rows:,}", f"{len(entry.shards):,}", size_text(entry.bytes)]
        tables.append([name, *size, recipe.encoder, recipe.compute_dtype, recipe.stored_dtype, recipe.fingerprint[:12]])
        shards += [[name, shard.name, f"{shard.rows:,}", size_text(shard.bytes)] for shard in entry.shards]
    heads = ["Table", "Rows", "Shards", "Size", "Encoder", "Encoded in", "Stored as", "Recipe"]
    blocks: list[Block] = [Table(head=heads, rows=tables)]
    if len(shards) > SHARDS:
        blocks.append(Text(text=f"The first {SHARDS} of {len(shards):,} shards:"))
    return [*blocks, Table(head=["Table", "Shard", "Rows", "Size"], rows=shards[:SHARDS])]
