"""The training loop, what it works with, and what it leaves.

- `trainer`: the loop, and when it validates, draws and saves
- `setup`, `resume`: a run found possible, its parts loaded, fresh or from a checkpoint; its loader and what that draws
- `run`: all that the loop works with, and what a checkpoint keeps of it
- `network/`: what learns
- `optimizer`, `accelerator`: what moves it, where
- `preservation/`: class rows, by which a prior keeps what it knew
- `validation`, `log`: how it goes
- `result`, `publish`: what is left of it, and for whom
- `sweep`: several runs over one cache
"""

from kcache.training.log import Progress
from kcache.training.trainer import train
from kcache.training.validation import Validation, split_by_key

__all__ = ["Progress", "Validation", "split_by_key", "train"]
