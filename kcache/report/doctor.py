"""What this machine has for kcache, as a list of facts: versions, devices, limits, disk; what is slow or broken.

Nothing here needs anything but Python itself: what is not installed, or fails when it is asked, is a fact, too.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kcache.machine import cpu_flags, cpu_name, cpu_quota, machine_memory, memory_limit, usable_cores

State = Literal["ok", "note", "slow", "broken"]
Value = str | int | float | bool | None

_DISTRIBUTION = "kcache"
_FILE_BYTES = 64 * 2**20
"""Written and read back to measure a disk: enough to see its rate, and done in a second on a slow one."""
_SLOW_DISK = 100e6
_SLOW_CHECKSUM = 1e9
_FEW_FILES = 4096
_FEW_CORES = 4
_SMALL_SHM = 2**30
_SHARED = Path("/dev/shm")  # noqa: S108  # only looked at


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """One thing that was looked at."""

    area: str
    """One of "versions", "devices", "extras", "processor", "memory", "disk", "checksums" or "hub"."""
    name: str
    value: Value
    """What was found; None where there is nothing, or where it cannot be known."""
    unit: str = ""
    state: State = "ok"
    """"note" is worth knowing, "slow" costs time, with "broken" something that kcache needs does not work."""
    advice: str = ""
    """What follows from it, and what to do."""


def examine(path: Path | None = None, environment: Mapping[str, str] = os.environ) -> list[Fact]:
    """All facts, in order; `path` is a folder whose disk is measured by a file of 64 MiB, which is removed again.

    Never raises: an area that fails is one fact that says so.
    """
    areas: dict[str, Callable[[], Iterator[Fact]]] = {
        "versions": lambda: _versions(),
        "devices": lambda: _devices(),
        "extras": lambda: _extras(),
        "processor": lambda: _processor(environment),
        "memory": lambda: _memory(),
        "disk": lambda: _disk(path),
        "checksums": lambda: _checksums(),
        "hub": lambda: _hub(environment),
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
    if bad:
        return Fact(area=area, name=name, value=value, unit=unit, state=state, advice=advice)
    return Fact(area=area, name=name, value=value, unit=unit)


def _versions() -> Iterator[Fact]:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    about = importlib.metadata.metadata(_DISTRIBUTION)
    yield Fact(area="versions", name=_DISTRIBUTION, value=about["Version"])
    python, wanted = platform.python_version(), SpecifierSet(about["Requires-Python"] or "")
    fits = wanted.contains(python, prereleases=True)
    advice = f"kcache needs Python {wanted}: make an environment with such a one"
    yield _judged("versions", "python", python, "", not fits, "broken", advice)
    for requirement in map(Requirement, importlib.metadata.requires(_DISTRIBUTION) or ()):
        if requirement.marker is None:
            yield _version(requirement.name, requirement.specifier)


def _version(name: str, wanted: Any) -> Fact:
    found, asked = _installed(name), f"pip install '{name}{wanted}'"
    if found is None:
        return Fact(area="versions", name=name, value=None, state="broken", advice=f"kcache needs it: {asked}")
    outside = not wanted.contains(found, prereleases=True)
    return _judged("versions", name, found, "", outside, "note", f"outside of {wanted}, and may fail: {asked}")


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[Fact]:
    cpu = cpu_name()
    yield Fact(area="devices", name="cpu", value=cpu)
    try:
        import torch
    except Exception as error:  # noqa: BLE001  # a torch that is half installed raises anything
        advice = f"building and training need torch, and it cannot be imported: {error}"
        yield Fact(area="devices", name="torch", value=None, state="broken", advice=advice)
        return
    half = bool(cpu_flags() & {"amx_bf16", "avx512_bf16", "bf16"})
    advice = "bfloat16 is slow on this processor: leave --mixed-precision at no when training on it"
    yield _judged("devices", "cpu bfloat16", half, "", not half, "note", advice)
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            yield from _cuda(torch, number)
    elif torch.backends.mps.is_available():
        yield Fact(area="devices", name="mps", value=True, state="note", advice="never run by us: best effort")
    else:
        yield _no_gpu(torch)
    sdpa = hasattr(torch.nn.functional, "scaled_dot_product_attention")
    yield _judged("devices", "sdpa attention", sdpa, "", not sdpa, "broken", "this torch is too old, or broken")
    varlen, cuda = _has("torch.nn.attention.varlen"), torch.cuda.is_available()
    advice = "" if cuda or not varlen else "this torch has it, but it needs a CUDA GPU: unused here, and not missed"
    yield Fact(area="devices", name="varlen attention", value=varlen and cuda, advice=advice)


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


def _no_gpu(torch: Any) -> Fact:
    if Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
        built = torch.version.cuda
        reason = (
            f"torch is built for CUDA {built}, and sees none: compare with nvidia-smi's"
            if built
            else ("this torch is built for the CPU: install one for CUDA, see https://pytorch.org/get-started/locally/")
        )
        return Fact(
            area="devices", name="cuda", value=False, state="slow", advice=f"there is an NVIDIA GPU, but {reason}"
        )
    advice = "no GPU: enough for the demo and for tiny networks"
    return Fact(area="devices", name="cuda", value=False, state="slow", advice=advice)


_EXTRAS = {
    "bitsandbytes": "--use-8bit-adam",
    "xformers": "--attention xformers, for the decoder",
    "tensorboard": "--report-to tensorboard",
    "wandb": "--report-to wandb",
    "webdataset": "reading published caches without kcache",
}
"""What each package is for."""


def _extras() -> Iterator[Fact]:
    for name, purpose in _EXTRAS.items():
        found = _installed(name)
        advice = "" if found else f"for {purpose}: pip install {name}"
        yield Fact(area="extras", name=name, value=found, advice=advice)


def _processor(environment: Mapping[str, str]) -> Iterator[Fact]:
    cores, usable, quota = os.cpu_count() or 1, usable_cores(), cpu_quota()
    yield Fact(area="processor", name="cores", value=cores)
    advice = f"this process may use {usable} of {cores}: taskset, a container or Slurm says so"
    yield _judged("processor", "cores usable", usable, "", usable < cores, "note", advice)
    if quota is not None:
        advice = f"the container gives {quota:g} cores' time: set OMP_NUM_THREADS={max(1, int(quota))}"
        yield _judged("processor", "cgroup cores", quota, "", quota < usable, "slow", advice)
    usable = max(1, int(min(usable, quota or usable)))
    threads = environment.get("OMP_NUM_THREADS")
    too_many = threads is not None and threads.isdecimal() and int(threads) > usable
    advice = f"more threads than cores wait for each other: set OMP_NUM_THREADS={usable}"
    yield _judged("processor", "OMP_NUM_THREADS", threads, "", too_many, "slow", advice)
    advice = "decoding images may hold up the encoders of a GPU: four cores or more per GPU"
    yield _judged("processor", "decode threads", usable, "", usable < _FEW_CORES, "note", advice)


def _memory() -> Iterator[Fact]:
    total, free = machine_memory()
    yield Fact(area="memory", name="total", value=total, unit="bytes")
    yield Fact(area="memory", name="available", value=free, unit="bytes")
    limit = memory_limit()
    if limit is not None:
        short = total is not None and limit < total
        advice = "the container's limit; more and the kernel ends the run: --residency mmap for larger caches"
        yield _judged("memory", "cgroup limit", limit, "bytes", short, "note", advice)
    if _SHARED.is_dir():
        size = shutil.disk_usage(_SHARED).total
        advice = "kcache itself needs none; several GPUs (NCCL) do: docker run --shm-size 8g"
        yield _judged("memory", str(_SHARED), size, "bytes", size < _SMALL_SHM, "note", advice)
    yield from _open_files()


def _open_files() -> Iterator[Fact]:
    try:
        import resource
    except ImportError:
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 0 <= most < _FEW_FILES
    advice = f"a mapped cache keeps a file open per shard and field, and fails beyond this: ulimit -Hn {_FEW_FILES}"
    yield _judged("memory", "open files", most, "", few, "note", advice)


def _disk(path: Path | None) -> Iterator[Fact]:
    folder = Path.cwd() if path is None else path
    if not folder.is_dir():
        found = f"{folder} is a file, no folder" if folder.exists() else f"there is no folder {folder}"
        advice = f"{found}; give a folder that exists, on the disk where the cache is to be"
        yield Fact(area="disk", name="path", value=str(folder), state="broken", advice=advice)
        return
    yield Fact(area="disk", name="path", value=str(folder.absolute()))
    yield Fact(area="disk", name="free", value=shutil.disk_usage(folder).free, unit="bytes")
    if path is None:
        return
    try:
        write, read = _disk_rates(folder)
    except OSError as error:
        advice = f"{folder} cannot be written ({error.strerror}); give another folder, or make room"
        yield Fact(area="disk", name="write", value=None, state="broken", advice=advice)
        return
    for name, rate in (("write", write), ("read", read)):
        slow = rate < _SLOW_DISK
        advice = (
            "a slow or remote disk: build on a local one, or stage the cache to one before training" if slow else ""
        )
        yield Fact(
            area="disk", name=name, value=round(rate), unit="bytes/s", state="slow" if slow else "ok", advice=advice
        )


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


def _checksums() -> Iterator[Fact]:
    try:
        from kcache.store.checksums import crc32c
    except ImportError as error:
        advice = f"nothing can be read or written without it: {error}"
        yield Fact(area="checksums", name="crc32c", value=None, state="broken", advice=advice)
        return
    content = os.urandom(2**23)
    start = time.perf_counter()
    crc32c(content)
    rate = len(content) / (time.perf_counter() - start)
    advice = "computed without the processor's own instruction: verifying rows slows down reading"
    yield _judged("checksums", "crc32c", round(rate), "bytes/s", rate < _SLOW_CHECKSUM, "slow", advice)


def _hub(environment: Mapping[str, str]) -> Iterator[Fact]:
    token = bool(environment.get("HF_TOKEN")) or _stored_token(environment).is_file()
    advice = "" if token else "for --push-to-hub and private repositories: hf auth login, or set HF_TOKEN"
    yield Fact(area="hub", name="token", value=token, advice=advice)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        value = environment.get(name)
        on = value is not None and value.upper() in ("1", "ON", "YES", "TRUE")
        advice = f"nothing is downloaded: give local folders, or unset {name}"
        yield _judged("hub", name, value, "", on, "note", advice)
    yield Fact(area="hub", name="HF_HOME", value=str(_hub_home(environment)))


def _hub_home(environment: Mapping[str, str]) -> Path:
    caches = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(environment.get("HF_HOME") or f"{caches}/huggingface").expanduser()


def _stored_token(environment: Mapping[str, str]) -> Path:
    return Path(environment.get("HF_TOKEN_PATH") or _hub_home(environment) / "token").expanduser()


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False
