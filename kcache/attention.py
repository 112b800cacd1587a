"""Who computes attention: torch's scaled_dot_product_attention, or xformers where it can.

xformers (looked at: 0.0.35) runs on CUDA only, and takes a mask only if its rows begin at multiples of 16 bytes. Those
of the prior hold 81 tokens (77 of text and 4 others) and do not, so it works for the decoder alone, which masks
nothing. The decoder's attention has extra projections for the image embedding; diffusers once refused xformers for
those, and has had its own attention processor for them since.
"""

import torch
from diffusers import ModelMixin, PriorTransformer
from diffusers.utils.import_utils import is_xformers_available

from kcache.errors import ConfigError

__all__ = ["check_attention", "choose_attention"]


def check_attention(attention: str, stage: str) -> None:
    """Check, before anything is loaded, that `attention` ("sdpa" or "xformers") works for `stage` on this machine.

    `stage` is "prior" or "decoder". Raises ConfigError.
    """
    if attention == "sdpa":
        return
    if stage == "prior":
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
    check_attention(attention, "prior" if isinstance(network, PriorTransformer) else "decoder")
    try:
        network.enable_xformers_memory_efficient_attention()
    # What xformers raises when none of its kernels fits: it was built for another torch, or not for this device.
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"--attention xformers fails on this machine ({reason}); expected an xformers built for torch "
            f"{torch.__version__} and this device; install that one, or use --attention sdpa"
        ) from error
