"""Small caches of random rows with shapes, several resolutions and mirrored pictures, and their rows found by key."""

from pathlib import Path
from typing import Any

import numpy as np
from measuring.synthetic import write_synthetic_cache

from kcache.config.shapes import ShapeSet, auto_set, square_set
from kcache.store.index import table_state
from kcache.store.manifest import Manifest, read_manifest
from kcache.store.recipe import Field
from kcache.store.rows import field_files, gather

BUCKETS = ShapeSet(64, ((32, 96), (48, 80), (64, 64), (80, 48), (96, 32)), 2.0)
"""Five shapes of one resolution."""
OTHERS = auto_set(32, 16, None)
SIZES = ((64, 64), (200, 70), (70, 200), (20, 20), (96, 32), (100, 60), (60, 100), (300, 299), (33, 31), (40, 32))
"""Widths and heights; the fourth and the ninth are too small for `BUCKETS`."""


def write_shaped_cache(
    folder: Path, samples: int = 30, sets: tuple[ShapeSet, ...] = (BUCKETS,), **changes: Any
) -> Manifest:
    """A cache whose samples have the sizes of `SIZES` in turn; `changes` are as for `write_synthetic_cache`."""
    settings: dict[str, Any] = {"dim": 4, "latent_side": 8, "rows_per_shard": 7, "captions": 2, "sizes": SIZES}
    return write_synthetic_cache(folder, samples, sets=sets, **(settings | changes))


def row_of(folder: Path, table: str, field: Field, key: bytes) -> np.ndarray:
    """The row of `field` that a table's shards have under `key`: found by their side files, with no index."""
    recipe = read_manifest(folder).tables[table].recipe
    stored = table_state(folder, recipe).stored
    files = field_files(folder, field, np.dtype(recipe.stored_dtype), stored.shards)
    return gather(files, stored.entries[stored.find([key])], np.empty)[0][0]


ALL = (square_set(32), BUCKETS)
"""Squares at one resolution, shapes at another."""
