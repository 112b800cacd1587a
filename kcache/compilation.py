"""Compilation: torch makes kernels for each kind of repeated block, where otherwise every operation has its own.

Blocks are compiled in place and one by one, so that parameters keep their names, and checkpoints, adapters, moving
averages and data-parallel training do not notice; blocks that are alike share a graph. A graph is for one shape: the
packed prior rounds its number of tokens up (see `kcache.packing`), after which few shapes are met. What is drawn and
measured beside training runs the blocks uncompiled, at shapes of its own. Results are those of the plain network up to
the order of sums, but dropout in adapters draws other numbers from the same seed.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from diffusers import ModelMixin
from torch.nn import functional

from kcache.errors import ConfigError
from kcache.recompute import outermost_blocks

__all__ = ["check_compiler", "compile_blocks", "uncompiled"]

BACKEND = "inductor"
"""Who makes the kernels, by torch's name."""
MOST_GRAPHS = 256
"""Of one block's code. torch's own limit, 8, is less than the decoder has kinds of blocks; beyond it, nothing more is
compiled, without a word."""


def check_compiler(device: torch.device) -> None:
    """Compile a small function for `device`, forward and backward, before anything is begun; raises ConfigError."""
    numbers = torch.ones(8, device=device, requires_grad=True)
    try:
        torch.compile(_trial, backend=BACKEND, dynamic=False)(numbers).backward()
    # What torch raises when there is no compiler, no Triton, no folder to write to, or no such backend.
    except (RuntimeError, OSError, ImportError) as error:
        reason = " ".join(str(error).partition("\n\nSet TORCHDYNAMO_VERBOSE")[0].split())[:300]
        raise ConfigError(
            f"--compile fails on {device} ({reason}); expected what torch.compile needs, a C++ compiler for a CPU or "
            "Triton for CUDA; install it, or train with --no-compile"
        ) from error


def compile_blocks(network: ModelMixin, *, packed: bool) -> None:
    """Compile the blocks that gradient checkpointing knows of `network`; a `packed` prior's last one stays as it is.

    That one meets what was not rounded up: the tokens that a prediction is read from.
    """
    # A block is a checkpoint or nothing: its graph need not be cut where gradients of earlier ones could be sent off.
    torch._dynamo.config.optimize_ddp = False
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    blocks = list(outermost_blocks(network))
    for block in blocks[:-1] if packed else blocks:
        block.compile(backend=BACKEND, dynamic=False)


def _trial(numbers: torch.Tensor) -> torch.Tensor:
    return functional.gelu(numbers).sum()


def uncompiled(compiled: bool) -> AbstractContextManager[object]:
    """Run blocks as they were before `compile_blocks`, if they are `compiled`."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
