"""What the system gives this process: processor, cores and memory, as Linux says, and the device that networks run on.

None or "" stands for what the system does not say.
"""

import gc
import math
import os
import platform
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kcache.errors import ConfigError

_UNLIMITED = 1 << 60
"""Control groups write "max", or a number near 2^63, for no limit."""


ROOT = Path("/")
"""What the paths that the system is asked by begin at."""


def usable_cores() -> int:
    """Cores that this process can keep busy: those it may run on, or fewer where its time is limited to less."""
    here, quota = _cores_to_run_on(), cpu_quota()
    return here if quota is None else max(1, min(here, math.ceil(quota)))


@contextmanager
def without_collections() -> Iterator[None]:
    """In the block, objects are not searched for cycles: lists of millions are, again and again, and hold none."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def threads_for(asked: int | None) -> int:
    """How many threads to decode with: as many as `asked`, else one per core that is there for this process.

    Processes that a launcher started together share the cores.
    """
    return asked or max(1, usable_cores() // max(1, _number_of_launcher("LOCAL_WORLD_SIZE")))


def _number_of_launcher(*names: str) -> int:
    """The first number that the environment has by one of the `names`; 0 for none."""
    return next((int(text) for name in names if (text := os.environ.get(name, "")).isdecimal()), 0)


def keep_to_cores() -> None:
    """Have libraries start no more threads than there is time for; they ask before they are imported, and only once.

    They know which cores a process may run on, but not that a control group gives it less time than that.
    """
    if usable_cores() < _cores_to_run_on():
        os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))


def _cores_to_run_on() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_memory() -> tuple[int | None, int | None]:
    """Bytes of memory that the machine has, and those that can be taken without pushing others out."""
    lines = {line.split(":")[0]: line.split()[1] for line in _text("/proc/meminfo").splitlines()}
    total, free = (int(lines[name]) * 1024 if name in lines else None for name in ("MemTotal", "MemAvailable"))
    return total, free


def _text(path: str | Path) -> str:
    try:
        return (ROOT / str(path).lstrip("/")).read_text(encoding="utf-8", errors="replace")
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
    """Cores' worth of time that the control groups of this process give, None for no limit."""
    quotas = []
    for group in _groups("cpu"):
        quota, _, period = _text(group / "cpu.max").strip().partition(" ")
        if not period:
            quota, period = (_text(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
        if quota.isdecimal() and period.isdecimal() and int(period):
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def memory_limit() -> int | None:
    """Bytes that the control groups of this process and its own limits (`ulimit`) give, None for no limit."""
    limits = [limit for limit, _ in (*_group_limits(), *_own_limits())]
    return min(limits, default=None)


def free_memory() -> int:
    """Bytes that this process can take, by the machine's memory and what it is limited to; 0 if none is told."""
    free = machine_memory()[1] or 0
    left = [max(0, limit - used) for limit, used in (*_group_limits(), *_own_limits())]
    return min(free, *left) if left else free


def most_memory(device: str = "cpu") -> int | None:
    """Bytes that this process could have at most on a device, were all others gone, swap included; None if not told."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.get_device_properties(torch.device(device)).total_memory)
    lines = {line.split(":")[0]: line.split()[1] for line in _text("/proc/meminfo").splitlines()}
    total = [int(lines[name]) * 1024 for name in ("MemTotal", "SwapTotal") if name in lines]
    told = [each for each in (sum(total) or None, memory_limit()) if each is not None]
    return min(told, default=None)


def check_fits(what: str, least: int, do: str, device: str = "cpu") -> None:
    """Refuse `what`, which takes at the `least` so many bytes, before it is begun, where a device has never so many.

    Raises ConfigError, with what to `do`.
    """
    most = most_memory(device)
    if most is not None and least > most:
        where = device if device.startswith("cuda") else "this process"
        raise ConfigError(
            f"{what}: that takes at least {least / 1e9:,.1f} GB of memory, {where} can have {most / 1e9:,.1f} GB; {do}"
        )


def _group_limits() -> list[tuple[int, int]]:
    """Limit of each control group that this process is in and that has one, and what all in it use, in bytes.

    What it holds of files counts as used there, and is let go of when memory is wanted: that is left out.
    """
    found = []
    for group in _groups("memory"):
        given = [_text(group / name).strip() for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
        limits = [int(text) for text in given if text.isdecimal() and int(text) < _UNLIMITED]
        if not limits:
            continue
        used = _text(group / "memory.current") or _text(group / "memory.usage_in_bytes")
        lines = map(str.split, _text(group / "memory.stat").splitlines())
        stat = {words[0]: int(words[1]) for words in lines if len(words) == 2 and words[1].isdecimal()}
        kinds = ("inactive_file", "active_file")
        of_files = sum(stat.get(f"total_{kind}", stat.get(kind, 0)) for kind in kinds)
        found.append((min(limits), max(0, int(used.strip() or 0) - of_files)))
    return found


def _own_limits() -> list[tuple[int, int]]:
    """The limits of this process alone, of its addresses and of its data, and what it uses of each, in bytes."""
    kinds = {"VmSize": resource.RLIMIT_AS, "VmData": resource.RLIMIT_DATA}
    limits = {name: resource.getrlimit(kind)[0] for name, kind in kinds.items()}
    return [
        (limit, _taken(name)) for name, limit in limits.items() if 0 <= limit < _UNLIMITED
    ]  # RLIM_INFINITY is negative, or near 2^64


def _taken(name: str) -> int:
    """Bytes that this process has taken, of a kind by Linux's name; 0 where that is not told."""
    lines = {line.split(":")[0]: line.split() for line in _text("/proc/self/status").splitlines()}
    return int(lines[name][1]) * 1024 if name in lines else 0


@contextmanager
def kept_to_groups(device: str) -> Iterator[None]:
    """In the block, which computes on a `device`, have memory refused that control groups of this process lack.

    They themselves refuse none: they end a process that uses what it was given. Computing on the CPU uses what it asks
    for; loading weights, which maps files, and drivers of GPUs ask for much more, and are left alone.
    """
    left = min((max(0, limit - used) for limit, used in _group_limits()), default=None) if device == "cpu" else None
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = None if left is None else _taken("VmData") + left
    if most is None or 0 <= soft <= most or 0 <= hard <= most:
        yield
        return
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _groups(controller: str) -> list[Path]:
    """Folders of the control groups of this process that have a `controller`, from its own one upwards.

    /proc/self/cgroup says where in a hierarchy it is, /proc/self/mountinfo where that is mounted, and from which group
    on: containers see a part of it. See cgroups(7) and proc(5).
    """
    places = {}
    for line in _text("/proc/self/cgroup").splitlines():
        _, controllers, place = line.split(":", 2)
        places.update(dict.fromkeys(controllers.split(","), place))
    folders: list[Path] = []
    for line in _text("/proc/self/mountinfo").splitlines():
        mount, _, kind = (part.split() for part in line.partition(" - "))
        name = "" if kind[:1] == ["cgroup2"] else controller
        ours = name == "" or (kind[:1] == ["cgroup"] and name in kind[-1].split(","))
        if ours and name in places:
            folders += _upwards(_unescaped(mount[4]), _unescaped(mount[3]), places[name])
    folders = [folder for folder in folders if (ROOT / str(folder).lstrip("/")).is_dir()]
    if not folders:  # without /proc, as some sandboxes have it, or with another mount over the hierarchy's own
        folders = _upwards("/sys/fs/cgroup", "/", places.get("", "/"))
        folders += _upwards(f"/sys/fs/cgroup/{controller}", "/", places.get(controller, "/"))
    return folders


def _upwards(mounted_at: str, from_group: str, place: str) -> list[Path]:
    """The folders of the group at `place` and of those above it, of a hierarchy mounted from a group on."""
    top = Path(mounted_at)
    inner = os.path.relpath(place, from_group) if place.startswith("/") and from_group.startswith("/") else "."
    parts = [] if inner.startswith("..") else [part for part in inner.split("/") if part not in (".", "..")]
    return [top.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]


def _unescaped(text: str) -> str:
    """A path of mountinfo, which writes blanks as \\040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


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
        local = _number_of_launcher("LOCAL_RANK", "SLURM_LOCALID")
        return f"cuda:{local % torch.cuda.device_count()}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _devices_here() -> list[str]:
    """What torch can use, such as cuda:0 and cuda:1; the CPU, which is always there, last."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if accelerator is not None else 0
    return [*(f"{accelerator.type}:{number}" for number in range(count) if accelerator is not None), "cpu"]
