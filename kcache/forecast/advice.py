"""The least change of flags by which a run would fit: tried by rehearsing the run with them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from kcache.config import TrainConfig
from kcache.errors import KcacheError
from kcache.settings import marks_of

TAKE_LESS: tuple[tuple[str, object], ...] = (
    ("ema_device", "cpu"),
    ("offload_optimizer", True),
    ("gradient_checkpointing", True),
    ("fused_backward", True),
    ("mixed_precision", "bf16"),
    ("optimizer", "adamw-8bit"),
    ("weights", "bf16"),
    ("lora_rank", 16),
)
"""Settings that take less memory, beside smaller batches: first what changes nothing of the result, last what most."""
_OF_WHOLE_NETWORKS = ("offload_optimizer", "fused_backward", "weights")
"""Those that do not go with adapters."""
_TO_THE_HOST = ("ema_device", "offload_optimizer")
"""Those that change nothing where the run computes on the host."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Flags by which a run would fit."""

    flags: tuple[str, ...]
    peak: int
    """Bytes that it would take with them."""


def least_change(
    config: TrainConfig, available: int, peak: Callable[[TrainConfig], int], *, on_host: bool = False
) -> Advice | None:
    """The flags by which a run of `config` would take no more than `available` bytes; None where none do.

    `peak` gives the bytes that a run of some settings takes. What changes the result least is tried first: smaller
    batches, with as many more of them in a step, and checkpointing; then lower precision; then adapters. Of what is not
    needed in the end nothing is said. A run that goes on keeps the settings that decide its course.
    """
    known: dict[TrainConfig, int] = {}

    def fits(changed: TrainConfig) -> bool:
        if changed not in known:
            known[changed] = peak(changed)
        return known[changed] <= available

    ways = [way for way in TAKE_LESS if not (on_host and way[0] in _TO_THE_HOST)]
    found = _first_that_fits(config, ways, fits)
    if found is None:
        return None
    found = _with_larger_batches(config, found, fits)
    for name, _ in reversed(ways):
        undone = _changed(found, name, getattr(config, name))
        if undone is not None and undone != found and fits(undone):
            found = undone
    return Advice(flags=_flags(config, found), peak=known[found])


def _first_that_fits(
    config: TrainConfig, ways: Sequence[tuple[str, object]], fits: Callable[[TrainConfig], bool]
) -> TrainConfig | None:
    """By as few kinds of changes as it takes, of each as much as there is."""
    smallest = _in_batches_of(config, _halves(config)[-1])
    for name, value in ways:
        if name == "lora_rank":
            smallest = replace(smallest, **{each: getattr(config, each) for each in _OF_WHOLE_NETWORKS})
        changed = _changed(smallest, name, value)
        if changed is None:
            continue
        smallest = changed
        # What comes before checkpointing is tried with it.
        if name not in _TO_THE_HOST and fits(smallest):
            return smallest
    return None


def _with_larger_batches(config: TrainConfig, found: TrainConfig, fits: Callable[[TrainConfig], bool]) -> TrainConfig:
    larger = [_in_batches_of(found, size, config) for size in reversed(_halves(config))]
    return [found, *takewhile(fits, larger)][-1]


def _halves(config: TrainConfig) -> list[int]:
    """Batch sizes that give as many samples in a step, the largest first: the one there is, and halves of it."""
    sizes = [config.train_batch_size]
    while sizes[-1] % 2 == 0:
        sizes.append(sizes[-1] // 2)
    return sizes


def _in_batches_of(config: TrainConfig, size: int, given: TrainConfig | None = None) -> TrainConfig:
    given = given or config
    accumulated = given.gradient_accumulation_steps * given.train_batch_size // size
    return replace(config, train_batch_size=size, gradient_accumulation_steps=accumulated)


def _changed(config: TrainConfig, name: str, value: object) -> TrainConfig | None:
    """The settings with another value of one; None where they cannot have it."""
    old = getattr(config, name)
    may = config.resume_from_checkpoint is None or not marks_of(config)[name].kept
    if old == value or not may or (name == "lora_rank" and value is not None and old is not None):
        return None
    if name == "mixed_precision" and value == "bf16" and old == "fp16":
        return None
    if name == "optimizer" and value == "adamw-8bit" and (config.use_8bit_adam or not _has_bitsandbytes()):
        return None
    try:
        return replace(config, **{name: value})  # type: ignore[arg-type]
    except KcacheError:
        return None


def _has_bitsandbytes() -> bool:
    from importlib.util import find_spec

    return find_spec("bitsandbytes") is not None


def _flags(config: TrainConfig, found: TrainConfig) -> tuple[str, ...]:
    """What of `found` is to be given beside the flags that gave `config`."""
    flags = []
    for name in ("train_batch_size", "gradient_accumulation_steps", *(name for name, _ in TAKE_LESS)):
        value = getattr(found, name)
        if value != getattr(config, name):
            flag = "--" + name.replace("_", "-")
            flags.append(flag if value is True else f"{flag} {value}")
    return tuple(flags)
