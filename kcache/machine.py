"""What the system gives this process: processor, cores and memory, as Linux says, and the device that networks run on.

None or "" stands for what the system does not say.
"""

import os
import platform
from pathlib import Path

from kcache.errors import ConfigError

_UNLIMITED = 1 << 60
"""Control groups write "max", or a number near 2^63, for no limit."""


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_memory() -> tuple[int | None, int | None]:
    """Bytes of memory that the machine has, and those that can be taken without pushing others out."""
    lines = {line.split(":")[0]: line.split()[1] for line in _text("/proc/meminfo").splitlines()}
    total, free = (int(lines[name]) * 1024 if name in lines else None for name in ("MemTotal", "MemAvailable"))
    return total, free


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _cpu_info(name: str) -> str:
    lines = (line.partition(":") for line in _text("/proc/cpuinfo").splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), "")


def cpu_name() -> str:
    """Name of the processor."""
    return _cpu_info("model name") or platform.processor() or platform.machine()


def cpu_flags() -> set[str]:
    """What the processor can, by Linux's names."""
    return set((_cpu_info("flags") or _cpu_info("Features")).split())


def cpu_quota() -> float | None:
    """Cores' worth of time that the control group gives, None for no limit."""
    quota, _, period = _text("/sys/fs/cgroup/cpu.max").strip().partition(" ")
    if not period:
        folder = "/sys/fs/cgroup/cpu"
        quota, period = (_text(f"{folder}/cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(period) else None


def memory_limit() -> int | None:
    """Bytes that the control group gives, None for no limit."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = _text(path).strip()
        if text.isdecimal() and int(text) < _UNLIMITED:
            return int(text)
    return None


def free_memory() -> int:
    """Bytes that this process can take, by the machine's memory and the control group's limit; 0 if none is told."""
    free, limit = machine_memory()[1] or 0, memory_limit()
    if limit is None:
        return free
    used = _text("/sys/fs/cgroup/memory.current") or _text("/sys/fs/cgroup/memory/memory.usage_in_bytes")
    # Files that nobody uses count as used, and are let go of when memory is wanted.
    lines = (_text("/sys/fs/cgroup/memory.stat") or _text("/sys/fs/cgroup/memory/memory.stat")).splitlines()
    idle = ("inactive_file", "total_inactive_file")
    files = next((line.split()[1] for line in lines if line.split()[0] in idle), "0")
    return min(free, max(0, limit - int(used or 0) + int(files)))


def check_device(asked: str | None) -> None:
    """Check, before anything is loaded, that torch can use the device `asked`; None and "cpu" always do.

    Raises ConfigError.
    """
    if asked is None or asked == "cpu":
        return
    # Not at the top: whoever asks for nothing, or for the CPU, may have no need of torch.
    import torch

    here = _devices_here()
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise ConfigError(
            f"--device is {asked!r}, which names no device; found {', '.join(here)} here; "
            f"type --device {here[0]}, or leave it out"
        ) from error
    if device.type != "cpu" and f"{device.type}:{device.index or 0}" not in here:
        raise ConfigError(
            f"--device is {asked!r}, which torch {torch.__version__} does not find; found {', '.join(here)} here; "
            f"type --device {here[0]}, or leave it out; `kcache doctor` says what is known of a GPU"
        )


def default_device() -> str:
    """CUDA, then MPS, then the CPU; of several GPUs the one that the launcher meant for this process."""
    import torch

    if torch.cuda.is_available():
        local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
        return f"cuda:{int(local) % torch.cuda.device_count()}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _devices_here() -> list[str]:
    """What torch can use, such as cuda:0 and cuda:1; the CPU, which is always there, last."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if accelerator is not None else 0
    return [*(f"{accelerator.type}:{number}" for number in range(count) if accelerator is not None), "cpu"]
