"""Which images a run never trains on: decided by each image's key alone, so that every run holds out the same ones."""

import hashlib

import numpy as np

from kcache.cache import Cache
from kcache.errors import ConfigError

__all__ = ["key_numbers", "split_by_key"]


def split_by_key(cache: Cache, fraction: float) -> tuple[Cache, Cache]:
    """The samples to train on, and those held out: of all images about `fraction`, 0 to 1, each with all its samples.

    An image is held out when its `key_numbers` is below `fraction` × 2⁶⁴. It is on the same side in every run, whatever
    joins the cache or leaves it, and what a smaller fraction holds out a larger one does too. Raises ConfigError when
    either side is empty.
    """
    limit = int(fraction * 2**64)
    held_out = np.array([number < limit for number in key_numbers(cache)], np.bool_)
    if held_out.all() or not held_out.any():
        images = len(set(cache.samples["image_key"].to_pylist()))
        raise ConfigError(
            f"--val-fraction {fraction} holds out {'all' if held_out.any() else 'none'} of the {images:,} images of "
            f"{cache.path}; expected some to train on and some to validate with; give another fraction or more images"
        )
    return cache.select(np.flatnonzero(~held_out)), cache.select(np.flatnonzero(held_out))


def key_numbers(cache: Cache) -> list[int]:
    """A number below 2⁶⁴ for each sample: the first eight bytes, big-endian, of the sha256 of its image's key."""
    keys = cache.samples["image_key"].to_pylist()
    return [int.from_bytes(hashlib.sha256(key).digest()[:8], "big") for key in keys]
