"""Store → batches on the device, in an order that is determined.

- `chance`: the order, the noise and all else that is drawn: functions of the seed and the sample's turn
- `streamed`: the order for caches that are read in blocks, any window of it known alone
- `schedule`: which bucket of samples each pass is of, and which of its samples it takes
- `course`: which sample has which turn, who takes it, and how a state tells of it
- `batches`: the samples in their order, read ahead of use
- `residency`: where rows wait until then
- `stage`: rows of a few windows in memory, fetched in order of first use
- `fetches`: which ranges of files hold the rows of a run of samples
- `ration`: how much memory a stage takes
- `slots`: what it is made of
- `ranges`: ranges of files of a disk or of a bucket, many at a time
- `upload`: the way of batches to the device
"""

from kcache.loader.batches import Batch, CacheLoader
from kcache.loader.chance import draw_noise, draw_seed, draw_timesteps

__all__ = ["Batch", "CacheLoader", "draw_noise", "draw_seed", "draw_timesteps"]
