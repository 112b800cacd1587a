"""What convolutions on a CPU take for themselves while they run: copies in the order that they want numbers in.

torch gives most float32 convolutions to oneDNN, which wants channels in blocks: inputs and weights are copied into that
order, results out of it. Where the input has its channels last, as attention leaves it, the weights are first brought
into that order, too. Small convolutions, and bfloat16 on a processor without instructions for it, unfold their input:
each pixel once for every place of the kernel. The rule of who gets which is torch's own (`use_mkldnn` in
aten/src/ATen/native/Convolution.cpp); the sizes were found by watching torch's allocator during one convolution after
another, with torch 2.13 on x86. Attention and matrix products take a few MB at most, which are left out.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

_FORWARD = torch.ops.aten.convolution.default
_BACKWARD = torch.ops.aten.convolution_backward.default
_FEW = 20_480
"""Numbers of a single input up to which torch unfolds it."""
_TINY = 2
"""Pixels along a side up to which oneDNN has each thread make parts of the weights' gradient of its own."""


def cpu_scratch(operation: Any, arguments: tuple[Any, ...]) -> int:
    """Bytes that an operation on the CPU takes at a time beyond its arguments and results; 0 for most."""
    if operation is _FORWARD:
        inputs, weight, _, stride, padding = arguments[:5]
        return _forward(inputs, weight, stride, padding)
    if operation is _BACKWARD:
        return _backward(*arguments[:3], stride=arguments[4], wants=arguments[10])
    return 0


def _forward(inputs: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> int:
    reordered = weight.nbytes if _channels_last(inputs) else 0
    if _unfolds(inputs, weight, stride):
        sides = zip(inputs.shape[2:], padding, weight.shape[2:], stride, strict=True)
        return reordered + _unfolded(inputs, weight, [(side + 2 * p - k) // s + 1 for side, p, k, s in sides])
    return weight.nbytes + (reordered or inputs.nbytes)


def _backward(gradient: Tensor, inputs: Tensor, weight: Tensor, *, stride: Sequence[int], wants: Sequence[bool]) -> int:
    last = _channels_last(inputs)
    reordered = weight.nbytes + (0 if _channels_last(gradient) else gradient.nbytes) if last else 0
    if _unfolds(inputs, weight, stride):
        return reordered + (_unfolded(inputs, weight, gradient.shape[2:]) if wants[1] else 0)
    if max(gradient.shape[2:]) <= _TINY and min(weight.shape[2:]) > 1:
        for_input = weight.nbytes + (reordered or gradient.nbytes)
        for_weight = reordered + 4 * (torch.get_num_threads() * weight.nbytes + gradient.nbytes + inputs.nbytes)
    elif last:
        for_input, for_weight = reordered + weight.nbytes, reordered + 2 * weight.nbytes
    else:
        for_input = max(gradient.nbytes + weight.nbytes, inputs.nbytes)
        for_weight = max(gradient.nbytes + inputs.nbytes, weight.nbytes)
    # The weights' gradient is made after the input's, and counted among the results all the while.
    of_input = for_input - (weight.nbytes if wants[1] else 0) if wants[0] else 0
    return max(of_input, for_weight if wants[1] else 0)


def _channels_last(images: Tensor) -> bool:
    return images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()


def _unfolded(inputs: Tensor, weight: Tensor, sides: Sequence[int]) -> int:
    kernel = prod(weight.shape[2:])
    return inputs.element_size() * inputs.shape[0] * weight.shape[1] * kernel * prod(sides) if kernel > 1 else 0


def _unfolds(inputs: Tensor, weight: Tensor, stride: Sequence[int]) -> bool:
    if inputs.dtype == torch.bfloat16:
        return not _has_bfloat16()
    kernel, several = weight.shape[2:], len(inputs) > 1
    large = several or min(kernel) > 3 or inputs.numel() > _FEW
    threaded = torch.get_num_threads() > 1 or max(kernel) > 1 or max(stride) > 1 or len(inputs) >= 16
    return not (large and threaded)


@lru_cache(maxsize=1)
def _has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
