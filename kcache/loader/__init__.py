"""Store → batches on the device, in an order that is determined.

- `chance`: the order, the noise and all else that is drawn: functions of the seed and the sample's turn
- `streamed`: the order for caches that are read in blocks, any window of it known alone
- `course`: which sample has which turn, who takes it, and how a state tells of it
- `batches`: the samples in their order, read ahead of use
- `residency`: where rows wait until then
- `copies`: whole shards, copied to this machine
- `stage`: rows of a few windows in memory, fetched in order of first use
- `fetches`: which ranges of files hold the rows of a run of samples
- `ration`: how much memory a stage takes
- `slots`: what it is made of
- `ranges`: ranges of files of a disk or of a bucket, many at a time
- `upload`: the way of batches to the device
"""

from typing import TYPE_CHECKING, Any

from kcache.loader.chance import draw_noise, draw_seed, draw_timesteps

if TYPE_CHECKING:
    from kcache.loader.batches import Batch, CacheLoader

__all__ = ["Batch", "CacheLoader", "draw_noise", "draw_seed", "draw_timesteps"]


def __getattr__(name: str) -> Any:
    """What loads torch is loaded when it is asked for: a command says before what cannot be."""
    if name not in ("Batch", "CacheLoader"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kcache.loader import batches

    return getattr(batches, name)
