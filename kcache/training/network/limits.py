"""What does not fit in memory, before and while a run trains, and which settings take less."""

import math
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from kcache.config import TrainConfig
from kcache.encoders.repositories import PIPELINES, Repository
from kcache.foreign import within_memory
from kcache.machine import check_fits, default_device
from kcache.store.checkpoint import checkpoint_steps

_FEWEST_TOKENS = 6
"""Of a caption without words: its begin and its end; and the four that the prior puts behind them."""


def within_run_memory(config: TrainConfig) -> AbstractContextManager[None]:
    """Turn lack of memory in the block, which does a run's work, into MemoryShortError: which settings take less."""
    return within_memory(f"training in batches of {config.train_batch_size}", partial(_what_takes_less, config))


def _what_takes_less(config: TrainConfig) -> str:
    smaller = max(1, config.train_batch_size // 2)
    turned = {
        f"--train-batch-size {smaller} with --gradient-accumulation-steps {2 * config.gradient_accumulation_steps}": (
            config.train_batch_size > 1
        ),
        "--gradient-checkpointing": not config.gradient_checkpointing,
        "--mixed-precision bf16": config.mixed_precision == "no",
        "--lora-rank 16": config.lora_rank is None,
        "--optimizer adamw-8bit": config.chosen_optimizer in ("adamw", "prodigy") and config.lora_rank is None,
        "--weights bf16 with --mixed-precision bf16": config.weights == "fp32" and config.lora_rank is None,
        "--ema-device cpu": config.use_ema and config.ema_device is None,
        "--residency mmap": config.residency not in ("mmap", "stream"),
        "no --validation-prompts": bool(config.validation_prompts),
    }
    flags = ", ".join(flag for flag, is_left in turned.items() if is_left) or "a GPU with more memory"
    folder, steps = Path(config.output_dir), []
    with suppress(OSError):
        steps = checkpoint_steps(folder)
    kept = (
        f"{folder / f'checkpoint-{steps[-1]}'} is kept: --resume-from-checkpoint latest goes on from it"
        if steps
        else "no checkpoint was saved"
    )
    return f"take less by {flags}; {kept}"


def check_batch(config: TrainConfig, base: Repository, noised: tuple[int, ...], samples: int) -> None:
    """Refuse a batch of `samples` that takes more than all memory, before anything is loaded.

    `noised` is the shape of what is noised, (4, h, w) or (D,). What is counted is what must be in memory at once, in
    two bytes a number: of the decoder what its first layers make of the latents, of the prior what goes into each layer
    for the fewest tokens that a caption has. Raises ConfigError.
    """
    network = base.read(PIPELINES[config.stage].network).values
    if config.stage == "decoder":
        channels = network.get("block_out_channels")
        width = _count(channels[0] if isinstance(channels, list) and channels else 1)
        values = width * (1 + _count(network.get("layers_per_block"))) * math.prod(noised[1:])
    else:
        sizes = ("num_attention_heads", "attention_head_dim", "num_layers")
        values = math.prod(_count(network.get(name)) for name in sizes) * _FEWEST_TOKENS
    check_fits(
        f"--train-batch-size {config.train_batch_size}",
        samples * values * 2,
        "give a smaller one, and more --gradient-accumulation-steps",
        default_device(),
    )


def _count(value: Any) -> int:
    """A size that a configuration says; 1 where it says none, to count too little rather than too much."""
    return value if isinstance(value, int) else 1
