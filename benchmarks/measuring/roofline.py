"""Where the time of a step goes, by kind of kernel, and which share of the device's arithmetic it comes to."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from measuring.device import device_kind, synchronize

PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12}
"""FLOP per second in bfloat16, dense, as the makers say; a name that begins another stands behind it."""
KINDS = {
    "attention": r"flash|fmha|attention|softmax",
    "optimizer": r"adam|multi_tensor|foreach|clip_grad",
    "matmul": r"gemm|cutlass|nvjet|cublas|xmma|wgrad|dgrad|implicit|conv|::(add|b|bad+b)?mm\b|::linear",
    "copy": r"memcpy|memset|copy|::cat\b|CatArray|index|gather|scatter|::zero_|::fill_|::_to_copy|::clone",
}
"""What names of kernels, and of torch's operators on a CPU, have in them; the first that fits. All else is "other"."""


def kind_of(name: str) -> str:
    """What the kernel or operator `name` does: a key of KINDS, or "other", as what torch.compile fused is."""
    return next((kind for kind, words in KINDS.items() if re.search(words, name, re.IGNORECASE)), "other")


def peak_flops(tera: float | None) -> float | None:
    """FLOP per second that the device promises: `tera` × 10¹², or by the GPU's name; None where neither is known."""
    if tera is not None:
        return tera * 1e12
    if device_kind() == "cpu":
        return None
    name = torch.cuda.get_device_name(0)
    return next((peak for known, peak in PEAKS.items() if known in name), None)


def count_flops(work: Callable[[], Any]) -> int:
    """FLOP of matrix products, convolutions and torch's attention in `work`, uncompiled, 2 per multiply-add."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def time_by_kind(work: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds that `work` keeps the device busy with each kind of kernel; on a CPU, each kind of operator."""
    synchronize()
    gpu = device_kind() == "gpu"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as tracing:
        work()
        synchronize()
    if gpu:
        kernels: Iterable[tuple[str, float]] = (
            (event.name, event.time_range.elapsed_us())
            for event in tracing.events()
            # Annotations span what they name, pauses included.
            if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)
        )
    else:
        kernels = ((event.key, event.self_cpu_time_total) for event in tracing.key_averages())
    spent = dict.fromkeys([*KINDS, "other"], 0.0)
    for name, microseconds in kernels:
        spent[kind_of(name)] += microseconds
    return {kind: round(microseconds / 1e3, 2) for kind, microseconds in spent.items()}
