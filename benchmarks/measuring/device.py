"""What a benchmark asks the device that it runs on: its name, to wait for it, its memory, how busy it is."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def device_kind() -> str:
    """ "gpu" where CUDA has a device, which is then used, else "cpu"."""
    return "gpu" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    """Wait until the GPU has done all that it was given; a CPU is never behind."""
    if device_kind() == "gpu":
        torch.cuda.synchronize()


def forget_peak() -> None:
    """Begin to watch for the peak of the memory in use."""
    if device_kind() == "gpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif (switch := Path("/proc/self/clear_refs")).exists():
        switch.write_text("5")


def peak_memory() -> int | None:
    """Most bytes in use since `forget_peak`: tensors on the GPU, else the resident process; None where not known."""
    if device_kind() == "gpu":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def busy_share(work: Callable[[], None]) -> float | None:
    """Share of the time that `work` takes in which the GPU does anything, 0 to 1, as CUDA's own tracing sees it.

    None on a CPU. Tracing slows the launching of kernels a little, so the share is a lower bound.
    """
    if device_kind() == "cpu":
        return None
    synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as tracing:
        start = time.perf_counter()
        work()
        synchronize()
        seconds = time.perf_counter() - start
    spans = (
        (event.time_range.start, event.time_range.end)
        for event in tracing.events()
        # Annotations span what they name, pauses included.
        if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)
    )
    return covered(spans) / 1e6 / seconds


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of what `spans`, (start, end) each, cover together."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
