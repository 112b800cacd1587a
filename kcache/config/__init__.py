"""What a build and a training run are told to do: frozen settings, named like the flags that set them.

Each says once what it means, which values it takes and who minds it, see `kcache.settings.Marks`; flags and their help
are made of this, in this order.

- `words`: names and types that settings share
- `shapes`: what pictures are cropped to, and which shape a picture has
- `source`: how a source is read
- `build`, `train`: what a build and a run are told; of the latter in `run` what both kinds are
- `train_checks`: which settings of a run do not go together
- `sweep`: the runs of a sweep, by their file
"""

from kcache.config.build import BuildConfig
from kcache.config.source import AS_FOUND, SourceConfig
from kcache.config.train import TrainConfig
from kcache.config.words import (
    COMPUTE_DTYPES,
    DECODER_REPO,
    DEPTH_REPO,
    INPAINT_REPO,
    PRIOR_REPO,
    CountReport,
    LrScheduler,
    MixedPrecision,
    Say,
    Stage,
    check_worker,
    unheard,
)

__all__ = [
    "AS_FOUND",
    "COMPUTE_DTYPES",
    "DECODER_REPO",
    "DEPTH_REPO",
    "INPAINT_REPO",
    "PRIOR_REPO",
    "BuildConfig",
    "CountReport",
    "LrScheduler",
    "MixedPrecision",
    "Say",
    "SourceConfig",
    "Stage",
    "TrainConfig",
    "check_worker",
    "unheard",
]
