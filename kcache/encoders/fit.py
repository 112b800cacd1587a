"""Whether what a build is asked for can fit into memory, and what to turn where it does not."""

import math
from contextlib import AbstractContextManager

from kcache.encoders.repositories import Repository
from kcache.foreign import within_memory
from kcache.machine import check_fits, free_memory, threads_for
from kcache.store.recipe import Recipe, kind_of

_PIXEL_BYTES = 4
"""Inputs wait as float32, or as int64 tokens, which are fewer."""
_DTYPE_BYTES = {"uint8": 1, "float16": 2, "bfloat16": 2, "float32": 4}


def check_request(recipe: Recipe, repository: Repository, rows: int, device: str) -> None:
    """Refuse batches and shards that are larger than all memory there is, before anything is loaded.

    `rows` is how many a shard will have. What is counted is what must be in memory at once: the inputs of a batch, what
    the first layer makes of them, the rows of a shard. Raises ConfigError.
    """
    inputs = math.prod(recipe.batch_shape)
    size = "×".join(map(str, recipe.batch_shape))
    what = f"{recipe.table} in batches of {size}"
    do = "give a smaller --batch-size" + (", or a smaller --resolution" if kind_of(recipe.table).sided else "")
    check_fits(what, inputs * _PIXEL_BYTES, do)
    if kind_of(recipe.table).per == "image":
        values = inputs * (1 + _first_layer(recipe, repository) / recipe.batch_shape[1])
        check_fits(what, int(values * _DTYPE_BYTES[recipe.compute_dtype]), do, device)
    row = sum(math.prod(field.shape) for field in recipe.fields if not field.ragged)
    shard = f"{recipe.table} in shards of {rows:,} rows"
    check_fits(shard, rows * row * _DTYPE_BYTES[recipe.stored_dtype], "give a smaller --rows-per-shard")


def _first_layer(recipe: Recipe, repository: Repository) -> float:
    """Values that the first layer makes of each pixel of a picture, at least."""
    network = repository.read(kind_of(recipe.table).component).values
    channels, width, patch = (network.get(name) for name in ("block_out_channels", "hidden_size", "patch_size"))
    if isinstance(channels, list) and channels and isinstance(channels[0], int):
        return channels[0]
    return width / patch**2 if isinstance(width, int) and isinstance(patch, int) and patch else 0.0


def workers_for(recipe: Recipe, asked: int | None, rows: int) -> int:
    """Threads that decode: as many as asked for, or one per core; no more than inputs that fit into free memory."""
    one = math.prod(recipe.batch_shape[1:]) * _PIXEL_BYTES
    fitting = free_memory() // 2 // one or None
    return max(1, min(threads_for(asked), rows, fitting or rows))


def enough_memory(recipe: Recipe) -> AbstractContextManager[None]:
    """Turn lack of memory in the block, which encodes the table of `recipe`, into MemoryShortError."""
    half = "" if recipe.compute_dtype != "float32" else ", or --mixed-precision fp16"
    return within_memory(
        f"encoding {recipe.table} in batches of {recipe.batch_shape[0]}",
        f"build with a smaller --batch-size{half} (both are of the recipe: the table is encoded anew), or with fewer "
        "--num-workers; what was committed is kept",
    )
