"""Names and types that settings share: stages, precisions, published repositories, and who is told of progress."""

from collections.abc import Callable
from typing import Literal

from kcache.errors import ConfigError

Stage = Literal["prior", "decoder", "all"]
MixedPrecision = Literal["no", "fp16", "bf16"]
OptimizerName = Literal["adamw", "adamw-8bit", "adafactor", "prodigy"]
LrScheduler = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]

PRIOR_REPO = "kandinsky-community/kandinsky-2-2-prior"
DECODER_REPO = "kandinsky-community/kandinsky-2-2-decoder"
INPAINT_REPO = "kandinsky-community/kandinsky-2-2-decoder-inpaint"
DEPTH_REPO = "kandinsky-community/kandinsky-2-2-controlnet-depth"
COMPUTE_DTYPES: dict[MixedPrecision, str] = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""The dtype that networks compute in, by torch's name."""

CountReport = Callable[[str, int, int], None]
"""Called with what is being worked on, how much of it is done, and how much there is."""
Say = Callable[[str], None]
"""Called with what is worth a line to whoever waits."""


def unheard(_: str) -> None:
    """Discards what it is told."""


def check_worker(worker: str | None) -> None:
    """Raise ConfigError for a --worker that names no builder of several."""
    index, _, count = ("0/1" if worker is None else worker).partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ConfigError(f"--worker is {worker!r}; expected I/N, builder I of N counted from 0, such as 0/4 to 3/4")
