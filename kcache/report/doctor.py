"""What this machine has for kcache, as a list of facts: versions, devices, limits, disk; what is slow or broken.

Nothing here needs anything but Python itself: what is not installed, or fails when it is asked, is a fact, too.
"""

import importlib.metadata
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from kcache.disk.filesystems import free_bytes
from kcache.machine import cpu_flags, cpu_name, cpu_quota, machine_memory, memory_limit, usable_cores

State = Literal["ok", "note", "slow", "broken"]
Value = str | int | float | bool | None

_DISTRIBUTION = "kcache"
_FILE_BYTES = 64 * 2**20
"""Written and read back to measure a disk: enough to see its rate, and done in a second on a slow one."""
_SLOW_DISK = 100e6
_FEW_FILES = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """One thing that was looked at."""

    area: str
    """One of "versions", "devices", "processor", "memory" or "disk"."""
    name: str
    value: Value
    """What was found; None where there is nothing, or where it cannot be known."""
    unit: str = ""
    state: State = "ok"
    """"note" is worth knowing, "slow" costs time, with "broken" something that kcache needs does not work."""
    advice: str = ""
    """What follows from it, and what to do."""


def examine(path: Path | None = None) -> list[Fact]:
    """All facts, in order; `path` is a folder whose disk is measured by a file of 64 MiB, which is removed again.

    Never raises: an area that fails is one fact that says so.
    """
    areas: dict[str, Callable[[], Iterator[Fact]]] = {
        "versions": _versions,
        "devices": _devices,
        "processor": _processor,
        "memory": _memory,
        "disk": partial(_disk, path),
    }
    facts: list[Fact] = []
    for area, look in areas.items():
        try:
            facts += list(look())
        except Exception as error:  # noqa: BLE001  # a doctor that dies of what it finds is of no use
            reason = f"{type(error).__name__}: {error}"
            facts.append(Fact(area=area, name="could not be examined", value=reason, state="note", advice="tell us"))
    return facts


def _judged(area: str, name: str, value: Value, unit: str, bad: bool, state: State, advice: str) -> Fact:
    """A fact that has `state` and `advice` only where it is `bad`."""
    return Fact(
        area=area, name=name, value=value, unit=unit, state=state if bad else "ok", advice=advice if bad else ""
    )


def _versions() -> Iterator[Fact]:
    from packaging.requirements import Requirement

    yield Fact(area="versions", name=_DISTRIBUTION, value=importlib.metadata.version(_DISTRIBUTION))
    yield Fact(area="versions", name="python", value=platform.python_version())
    for requirement in map(Requirement, importlib.metadata.requires(_DISTRIBUTION) or ()):
        if requirement.marker is None:
            yield _version(requirement.name, requirement.specifier)


def _version(name: str, wanted: Any) -> Fact:
    advice = f"pip install '{name}{wanted}'"
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Fact(area="versions", name=name, value=None, state="broken", advice=f"kcache needs it: {advice}")
    outside = not wanted.contains(found, prereleases=True)
    return _judged("versions", name, found, "", outside, "note", f"outside of {wanted}, and may fail: {advice}")


def _devices() -> Iterator[Fact]:
    yield Fact(area="devices", name="cpu", value=cpu_name())
    half = bool(cpu_flags() & {"amx_bf16", "avx512_bf16", "bf16"})
    advice = "bfloat16 is slow on this processor: leave --mixed-precision at no when training on it"
    yield _judged("devices", "cpu bfloat16", half, "", not half, "note", advice)
    try:
        import torch
    except Exception as error:  # noqa: BLE001  # a torch that is half installed raises anything
        advice = f"building and training need torch, and it cannot be imported: {error}"
        yield Fact(area="devices", name="torch", value=None, state="broken", advice=advice)
        return
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            yield from _cuda(torch, number)
    elif torch.backends.mps.is_available():
        yield Fact(area="devices", name="mps", value=True, state="note", advice="never run by us: best effort")
    else:
        yield Fact(area="devices", name="cuda", value=False, state="slow", advice=_why_no_gpu(torch.version.cuda))


def _cuda(torch: Any, number: int) -> Iterator[Fact]:
    name, device = f"cuda:{number}", torch.cuda.get_device_properties(number)
    yield Fact(area="devices", name=name, value=device.name)
    free, total = torch.cuda.mem_get_info(number)
    yield Fact(area="devices", name=f"{name} memory", value=total, unit="bytes")
    advice = "less than half is free: another process uses this GPU, see nvidia-smi"
    yield _judged("devices", f"{name} free", free, "bytes", free < total // 2, "note", advice)
    modern = (device.major, device.minor) >= (8, 0)
    advice = "no bfloat16 and no packed flash attention: use --mixed-precision fp16"
    yield _judged("devices", f"{name} bfloat16", modern, "", not modern, "slow", advice)


def _why_no_gpu(built: str | None) -> str:
    """`built` is the version of CUDA that torch is built for."""
    if not (Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi")):
        return "no GPU: enough for the demo and for tiny networks"
    if built:
        return f"there is an NVIDIA GPU, but torch is built for CUDA {built}, and sees none: compare with nvidia-smi's"
    return (
        "there is an NVIDIA GPU, but this torch is built for the CPU: install one for CUDA, see "
        "https://pytorch.org/get-started/locally/"
    )


def _processor() -> Iterator[Fact]:
    cores, usable, quota = os.cpu_count() or 1, usable_cores(), cpu_quota()
    yield Fact(area="processor", name="cores", value=cores)
    advice = f"this process may use {usable} of {cores}: taskset, a container or Slurm says so"
    yield _judged("processor", "cores usable", usable, "", usable < cores, "note", advice)
    if quota is not None:
        advice = f"the container gives the time of {quota:g} cores, fewer than it shows: give it more"
        yield _judged("processor", "cgroup cores", quota, "", quota < cores, "slow", advice)


def _memory() -> Iterator[Fact]:
    (total, free), limit = machine_memory(), memory_limit()
    yield Fact(area="memory", name="total", value=total, unit="bytes")
    yield Fact(area="memory", name="available", value=free, unit="bytes")
    if limit is not None:
        short = total is not None and limit < total
        advice = (
            "a container, Slurm or `ulimit` gives no more, and ends what takes it: --residency mmap for larger caches"
        )
        yield _judged("memory", "limit", limit, "bytes", short, "note", advice)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    advice = f"a mapped cache keeps a file open per shard and field, and fails beyond this: ulimit -Hn {_FEW_FILES}"
    yield _judged("memory", "open files", most, "", 0 <= most < _FEW_FILES, "note", advice)


def _disk(path: Path | None) -> Iterator[Fact]:
    folder = Path.cwd() if path is None else path
    if not folder.is_dir():
        found = f"{folder} is a file, no folder" if folder.exists() else f"there is no folder {folder}"
        advice = f"{found}; give a folder that exists, on the disk where the cache is to be"
        yield Fact(area="disk", name="path", value=str(folder), state="broken", advice=advice)
        return
    yield Fact(area="disk", name="path", value=str(folder.absolute()))
    yield Fact(area="disk", name="free", value=free_bytes(folder), unit="bytes")
    if path is None:
        return
    try:
        write, read = _disk_rates(folder)
    except OSError as error:
        advice = f"{folder} cannot be written ({error.strerror}); give another folder, or make room"
        yield Fact(area="disk", name="write", value=None, state="broken", advice=advice)
        return
    advice = "a slow or remote disk: build on a local one, or stage the cache to one before training"
    for name, rate in (("write", write), ("read", read)):
        yield _judged("disk", name, round(rate), "bytes/s", rate < _SLOW_DISK, "slow", advice)


def _disk_rates(folder: Path) -> tuple[float, float]:
    """Bytes per second of writing a file to the disk, and of reading it back, out of the disk where Linux allows it."""
    content = os.urandom(2**20)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".kcache-doctor-") as file:
        start = time.perf_counter()
        for _ in range(_FILE_BYTES // len(content)):
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
        write = time.perf_counter() - start
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        file.seek(0)
        while file.read(len(content)):
            pass
        return _FILE_BYTES / write, _FILE_BYTES / (time.perf_counter() - start)
