"""Caches whose samples have weights and repeats."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kcache.build.finish import finish_cache
from kcache.upkeep.copying import read_contents

COUNTS = ((1.0, 1), (0.25, 3), (2.0, 1), (0.0, 1), (1.5, 2))
"""Weights and repeats."""


def counted_cache(cache: str | Path, folder: Path, counts: Sequence[tuple[float, int]] = COUNTS) -> str:
    """A copy of a cache, in which samples have these weights and repeats, over and over."""
    shutil.copytree(cache, folder)
    old = read_contents(folder)
    samples = [
        replace(sample, weight=counts[i % len(counts)][0], repeats=counts[i % len(counts)][1])
        for i, sample in enumerate(old.samples)
    ]
    finish_cache(folder, samples, old.refused, old.tables, old.manifest.models, old.manifest.format, old.cut, old.wants)
    return str(folder)
