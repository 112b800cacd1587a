"""What is done to the blocks that a network consists of: recomputed, compiled, or given another attention.

A block is a transformer block of the prior, or a resnet or an attention of the decoder's UNet (`outermost_blocks`).

**Gradient checkpointing**: activations are computed again in the backward pass instead of being kept. diffusers' own
switch leaves out the attentions of Kandinsky's decoder and knows nothing for the prior.

**Compilation**: torch makes kernels for each kind of block, where otherwise every operation has its own. Blocks are
compiled in place and one by one, so that parameters keep their names, and checkpoints, adapters, moving averages and
data-parallel training do not notice; blocks that are alike share a graph. A graph is for one shape: the packed prior
rounds its number of tokens up (see `kcache.objectives.packing`), after which few shapes are met. Pictures of several
shapes have graphs for any: one for each shape would be more than torch makes (the published decoder has some 30 kinds
of blocks), and nobody would want to wait for them. What is drawn and
measured beside training runs the blocks uncompiled, at shapes of its own. Results are those of the plain network up to
the order of sums, but dropout in adapters draws other numbers from the same seed.

**Attention** is torch's scaled_dot_product_attention, or that of xformers, which (looked at: 0.0.35) runs on CUDA only,
and takes a mask only if its rows begin at multiples of 16 bytes. Those of the prior hold 81 tokens (77 of text and 4
others) and do not, so it works for the decoder alone, which masks nothing.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from diffusers import ModelMixin, PriorTransformer
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.utils.import_utils import is_xformers_available
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from kcache.errors import ConfigError

_BLOCKS = (Attention, BasicTransformerBlock, ResnetBlock2D)
BACKEND = "inductor"
"""Who makes the kernels, by torch's name."""
MOST_GRAPHS = 256
"""Of one block's code. torch's own limit, 8, is less than the decoder has kinds of blocks; beyond it, nothing more is
compiled, without a word."""


def outermost_blocks(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The blocks of a network, in its order; what lies in a block belongs to it, and is not given again."""
    for child in module.children():
        if isinstance(child, _BLOCKS):
            yield child
        else:
            yield from outermost_blocks(child)


def recompute_blocks(network: ModelMixin) -> None:
    """Keep between forward and backward only the input of each block of `network`, at the price of a second forward.

    Losses and gradients stay the same, dropout included, as do the names of parameters. Chen et al. 2016, Training Deep
    Nets with Sublinear Memory Cost, arXiv 1604.06174.
    """
    for block in outermost_blocks(network):
        # A partial of a bound method: a deep copy of the network then calls its own blocks, as a closure would not.
        block.forward = partial(_recomputed, block.forward)


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def check_compiler(device: torch.device) -> None:
    """Compile a small function for `device`, forward and backward, before anything is begun; raises ConfigError."""
    numbers = torch.ones(8, device=device, requires_grad=True)
    try:
        trial = torch.compile(lambda x: functional.gelu(x).sum(), backend=BACKEND, dynamic=False)
        trial(numbers).backward()
    # What torch raises when there is no compiler, no Triton, no folder to write to, or no such backend.
    except (RuntimeError, OSError, ImportError) as error:
        reason = " ".join(str(error).partition("\n\nSet TORCHDYNAMO_VERBOSE")[0].split())[:300]
        raise ConfigError(
            f"--compile fails on {device} ({reason}); expected what torch.compile needs, a C++ compiler for a CPU or "
            "Triton for CUDA; install it, or train with --no-compile"
        ) from error


def compile_blocks(network: ModelMixin, *, packed: bool, shaped: bool = False) -> None:
    """Compile the blocks of `network`, for pictures of several shapes where it is `shaped`.

    A `packed` prior's last one stays as it is: it meets what was not rounded up, the tokens that a prediction is read
    from.
    """
    # A block is a checkpoint or nothing: its graph need not be cut where gradients of earlier ones could be sent off.
    torch._dynamo.config.optimize_ddp = False
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    blocks = list(outermost_blocks(network))
    for block in blocks[:-1] if packed else blocks:
        block.compile(backend=BACKEND, dynamic=shaped)


def uncompiled(compiled: bool) -> AbstractContextManager[object]:
    """Run blocks as they were before `compile_blocks`, if they are `compiled`."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def check_attention(attention: str, network_class: type[ModelMixin]) -> None:
    """Check, before anything is loaded, that `attention` ("sdpa" or "xformers") works for such a network here.

    Raises ConfigError.
    """
    if attention == "sdpa":
        return
    if issubclass(network_class, PriorTransformer):
        raise ConfigError(
            "--attention xformers is for the decoder; the prior masks its 81 tokens, and xformers takes masks only in "
            "multiples of 8; use --attention sdpa, which needs no installation"
        )
    if not is_xformers_available():
        raise ConfigError(
            "--attention xformers needs the package xformers, which is not installed; expected one built for torch "
            f"{torch.__version__}; run pip install xformers, or use --attention sdpa, which needs no installation"
        )
    if not torch.cuda.is_available():
        raise ConfigError(
            "--attention xformers needs a CUDA device, and torch finds none here; expected one that "
            "torch.cuda.is_available() confirms; use --attention sdpa, which runs on any device"
        )


def choose_attention(network: ModelMixin, attention: str) -> None:
    """Let `attention` compute the attention of `network`; "sdpa" is what diffusers does unasked.

    Raises ConfigError as `check_attention` does, and when the xformers that is installed fails here.
    """
    if attention == "sdpa":
        return
    check_attention(attention, type(network))
    try:
        network.enable_xformers_memory_efficient_attention()
    # What xformers raises when none of its kernels fits: it was built for another torch, or not for this device.
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"--attention xformers fails on this machine ({reason}); expected an xformers built for torch "
            f"{torch.__version__} and this device; install that one, or use --attention sdpa"
        ) from error


@contextmanager
def evaluating(network: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode for `network`; afterwards each of its modules is in the mode that it was in."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
