"""Store → batches on the device, in an order that is determined.

- `chance`: the order, the noise and all else that is drawn: functions of the seed and the sample's turn
- `masks`: which latent pixels are kept and which are to be filled, drawn likewise
- `turns`: all that is drawn for samples, together
- `schedule`: which bucket of samples each pass is of, and which of its samples it takes
- `course`: which sample of a bucket has which place in its order, and who takes it
- `residency`: where rows wait until a batch takes them
- `streaming/`: and where they come just before that
- `parts`: the samples of one bucket, their order and where their rows are
- `state`: how a state tells where a loader stands
- `batches`: the samples in their order, read ahead of use
- `copies`: whole shards, copied to this machine
- `upload`: the way of batches to the device
"""

from typing import TYPE_CHECKING, Any

from kcache.loader.chance import draw_noise, draw_seed, draw_timesteps
from kcache.loader.masks import draw_masks

if TYPE_CHECKING:
    from kcache.loader.batches import Batch, CacheLoader

__all__ = ["Batch", "CacheLoader", "draw_masks", "draw_noise", "draw_seed", "draw_timesteps"]


def __getattr__(name: str) -> Any:
    """What loads torch is loaded when it is asked for: a command says before what cannot be."""
    if name not in ("Batch", "CacheLoader"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kcache.loader import batches

    return getattr(batches, name)
