"""Store → batches on the device, in an order that is determined.

- `chance`: the order, the noise and all else that is drawn: functions of the seed and the sample's turn
- `batches`: the samples in their order, read ahead of use
- `residency`: where rows wait until then
- `upload`: their way to the device
"""

from kcache.loader.batches import Batch, CacheLoader
from kcache.loader.chance import draw_noise, draw_seed, draw_timesteps

__all__ = ["Batch", "CacheLoader", "draw_noise", "draw_seed", "draw_timesteps"]
