"""How far the rows of a cache are from what its encoders give now: the proof that cached equals online."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from kcache.config import AS_FOUND, SourceConfig
from kcache.encoders.online import OnlineEncoders
from kcache.machine import check_device, default_device
from kcache.sources import open_source
from kcache.store.cache import Cache
from kcache.store.recipe import Recipe, kind_of

SAMPLES_PER_READ = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """The largest differences found in one field."""

    table: str
    field: str
    rows: int
    """Rows compared, one per sample; of several captions a random one, of mirrored pictures both."""
    absolute: float
    relative: float
    """To the largest magnitude in the same row (the same token in a ragged field)."""


def compare_online(
    source: str,
    cache: str | Path,
    count: int,
    *,
    seed: int = 0,
    reading: SourceConfig = AS_FOUND,
    device: str | None = None,
    report: Callable[[str, int, int], None] | None = None,
) -> list[Difference]:
    """Encode `count` random samples of the cache again, from `source`, and compare every field.

    Of a shape that none of these has, one that has it joins them. `report` is called with the table, the samples done
    and their number. Float32 rows made on the same machine with the same libraries differ by 0. Raises ConfigError for
    a device that is not there, and the errors of `Cache.open` and `OnlineEncoders`.
    """
    check_device(device)
    whole = Cache.open(cache)
    reading.check_told(f"--source {source}", cache, whole.manifest.wants.controls)
    opened = open_source(source, reading, need_captions=False)
    rng = np.random.default_rng(seed)
    samples = np.sort(rng.choice(len(whole), min(count, len(whole)), replace=False))
    captions = rng.integers(np.maximum(np.diff(whole.caption_bounds), 1))[samples]
    place = torch.device(device or default_device())
    found: list[Difference] = []
    sampled = whole.select(samples)
    for table, recipe in whole.recipes.items():
        held = sampled.of_table(table)
        if not len(held) and len(every := whole.of_table(table)):
            held = every.select(rng.integers(len(every), size=1))
        if not len(held):
            continue
        online = OnlineEncoders(held, opened, [field.name for field in recipe.fields], place)
        if kind_of(table).per == "caption":
            found += _compare(held, online, recipe, captions, None, report)
            continue
        turns = (False, True) if whole.flip else (None,)
        of_turns = [_compare(held, online, recipe, np.zeros(len(held), np.int64), turn, report) for turn in turns]
        found += [_together(each) for each in zip(*of_turns, strict=True)]
    return found


def _together(found: Sequence[Difference]) -> Difference:
    """The largest of some differences of one field."""
    return replace(
        found[0],
        rows=sum(each.rows for each in found),
        absolute=max(each.absolute for each in found),
        relative=max(each.relative for each in found),
    )


def _compare(
    cache: Cache,
    online: OnlineEncoders,
    recipe: Recipe,
    captions: np.ndarray,
    mirrored: bool | None,
    report: Callable[[str, int, int], None] | None,
) -> list[Difference]:
    """The largest differences in each field of one table, of all samples of `cache`, or of their mirror images."""
    samples, names = np.arange(len(cache)), [field.name for field in recipe.fields]
    worst = {
        name: Difference(table=recipe.table, field=name, rows=len(samples), absolute=0.0, relative=0.0)
        for name in names
    }
    for start in range(0, len(samples), SAMPLES_PER_READ):
        here = slice(start, start + SAMPLES_PER_READ)
        turn = None if mirrored is None else np.full(len(samples[here]), mirrored)
        cached = cache.read(samples[here], names, captions[here], mirrored=turn)
        now = online.read(samples[here], names, captions[here], mirrored=turn)
        for name in names:
            absolute, relative = _largest(cached[name], now[name].float().cpu().numpy())
            worst[name] = replace(
                worst[name],
                absolute=max(worst[name].absolute, absolute),
                relative=max(worst[name].relative, relative),
            )
        if report:
            report(recipe.table, min(start + SAMPLES_PER_READ, len(samples)), len(samples))
    return list(worst.values())


def _largest(cached: np.ndarray, online: np.ndarray) -> tuple[float, float]:
    """Largest difference of any value, and of any row relative to that row's largest value."""
    a, b = (array.astype(np.float64).reshape(len(array), -1) for array in (cached, online))
    if a.shape != b.shape or not len(a):
        return (0.0, 0.0) if a.shape == b.shape else (float("inf"), float("inf"))
    rows = np.abs(a - b).max(axis=1)
    scale = np.abs(b).max(axis=1)
    return float(rows.max()), float((rows / np.where(scale > 0, scale, 1.0)).max())
