"""What this process may use is what it is given, not what the machine has; a device that is not there is refused."""

import os
import resource
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from kcache import machine
from kcache.errors import ConfigError
from kcache.machine import (
    check_device,
    cpu_quota,
    free_memory,
    keep_to_cores,
    kept_to_groups,
    memory_limit,
    threads_for,
    usable_cores,
)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes this a machine with so many CUDA GPUs."""

    def have(count: int) -> None:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)

    return have


@pytest.mark.parametrize("asked", ["cuda", "cuda:0", "cuda:9", "mps", "meta", "nonsense", "cuda:x", ""])
def test_without_a_gpu_there_is_the_cpu(gpus: Callable[[int], None], asked: str) -> None:
    gpus(0)
    with pytest.raises(ConfigError, match=f"--device is '{asked}'.*found cpu here; type --device cpu, or leave it out"):
        check_device(asked)
    for there in (None, "cpu", "cpu:0"):
        check_device(there)


def test_of_several_gpus_each_is_there(gpus: Callable[[int], None]) -> None:
    gpus(2)
    for there in ("cuda", "cuda:0", "cuda:1", "cpu"):
        check_device(there)
    for asked in ("cuda:2", "mps"):
        with pytest.raises(ConfigError, match=r"found cuda:0, cuda:1, cpu here; type --device cuda:0"):
            check_device(asked)


@pytest.mark.parametrize(
    "command",
    [
        ["cache-build", "data", "new"],
        ["cache-build", "data", "new", "--dry-run"],
        ["cache-verify", "cache", "--source=data", "--repair"],
        ["cache-verify", "cache", "--source=data", "--against-online=2"],
        ["report", "cache", "--pretrained-decoder-model-name-or-path=nowhere"],
        ["sample", "a fox", "--prior=nowhere", "--decoder=nowhere"],
    ],
)
def test_every_command_refuses_it_first(
    gpus: Callable[[int], None],
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kcache_command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    gpus(0)
    monkeypatch.chdir(tmp_path)
    Path("cache").mkdir()
    Path("cache/manifest.json").touch()
    assert kcache_command(*command, "--device", "cuda:9") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("kcache: --device is 'cuda:9'")
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


V2 = "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
)
INNER_V1 = V1.replace("0:32 /", "0:32 /docker/abc").replace("0:29 /", "0:29 /docker/abc")
TREES: dict[str, tuple[str, str, dict[str, str], int | None, float | None]] = {
    "v2, its own group": (
        "0::/a/b\n",
        V2,
        {"a/b/memory.max": "300", "a/memory.max": "max", "a/b/cpu.max": "150000 100000"},
        300,
        1.5,
    ),
    "v2, one above": (
        "0::/a/b\n",
        V2,
        {"a/b/memory.max": "max", "a/memory.max": "200", "a/cpu.max": "50000 100000"},
        200,
        0.5,
    ),
    "v2, the smallest": (
        "0::/a/b\n",
        V2,
        {"a/b/memory.max": "300", "a/memory.max": "200", "a/b/cpu.max": "max 100000"},
        200,
        None,
    ),
    "v2, slowed down": ("0::/a\n", V2, {"a/memory.max": "max", "a/memory.high": "150"}, 150, None),
    "v2, another one's": ("0::/a\n", V2, {"b/memory.max": "100"}, None, None),
    "v2, in a namespace": ("0::/\n", V2, {"memory.max": "400"}, 400, None),
    "v2, outside the namespace": ("0::/../../x\n", V2, {"memory.max": "400"}, 400, None),
    "v2, elsewhere": (
        "0::/a\n",
        V2.replace("/sys/fs/cgroup", "/run/my\\040groups"),
        {"../../../run/my groups/a/memory.max": "7"},
        7,
        None,
    ),
    "v1, nested": (
        "4:memory:/job/7\n1:cpu,cpuacct:/job\n0::/\n",
        V1,
        {
            "memory/job/7/memory.limit_in_bytes": "9223372036854771712",
            "memory/job/memory.limit_in_bytes": "500",
            "cpu,cpuacct/job/cpu.cfs_quota_us": "200000",
            "cpu,cpuacct/job/cpu.cfs_period_us": "100000",
        },
        500,
        2.0,
    ),
    "v1, no limit": (
        "4:memory:/job\n1:cpu,cpuacct:/job\n",
        V1,
        {
            "memory/job/memory.limit_in_bytes": "9223372036854771712",
            "cpu,cpuacct/job/cpu.cfs_quota_us": "-1",
            "cpu,cpuacct/job/cpu.cfs_period_us": "100000",
        },
        None,
        None,
    ),
    "v1, a container's part": (
        "4:memory:/docker/abc/in\n",
        INNER_V1,
        {"memory/in/memory.limit_in_bytes": "600"},
        600,
        None,
    ),
    "hybrid": (
        "4:memory:/a\n0::/b\n",
        V1,
        {"memory/a/memory.limit_in_bytes": "800", "unified/b/cpu.max": "100000 100000"},
        800,
        1.0,
    ),
    "no /proc": ("", "", {"memory.max": "900", "cpu.max": "100000 100000"}, 900, 1.0),
    "another mount over it": (
        "0::/a/b\n",
        V2.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified"),
        {"a/memory.max": "700", "a/b/memory.max": "900", "a/cpu.max": "50000 100000"},
        700,
        0.5,
    ),
    "nothing": ("", "", {}, None, None),
}
"""/proc/self/cgroup, /proc/self/mountinfo, files below /sys/fs/cgroup; the limits of memory and of cores."""


def lay_out(root: Path, files: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(machine, "ROOT", root)


@pytest.mark.parametrize("tree", TREES)
def test_limits_are_those_of_this_process(tree: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cgroup, mounts, files, memory, cores = TREES[tree]
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    told = {f"sys/fs/cgroup/{name}": f"{text}\n" for name, text in files.items()}
    lay_out(tmp_path, told | {"proc/self/cgroup": cgroup, "proc/self/mountinfo": mounts}, monkeypatch)
    assert (memory_limit(), cpu_quota()) == (memory, cores)


def test_free_memory_is_what_the_narrowest_group_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "proc/meminfo": "MemTotal: 4000 kB\nMemAvailable: 3000 kB\n",
        "proc/self/cgroup": "0::/a/b\n",
        "proc/self/mountinfo": V2,
        "sys/fs/cgroup/a/b/memory.max": "1024000\n",
        "sys/fs/cgroup/a/b/memory.current": "900000\n",
        "sys/fs/cgroup/a/b/memory.stat": "anon 500000\ninactive_file 200000\nactive_file 100000\n",
    }
    lay_out(tmp_path, files, monkeypatch)
    assert free_memory() == 1_024_000 - 900_000 + 300_000
    # A wider limit that others have used up leaves less.
    above = {"sys/fs/cgroup/a/memory.max": "2048000\n", "sys/fs/cgroup/a/memory.current": "2040000\n"}
    lay_out(tmp_path, above, monkeypatch)
    assert (free_memory(), memory_limit()) == (8000, 1_024_000)
    lay_out(tmp_path, {"sys/fs/cgroup/a/memory.max": "max\n", "sys/fs/cgroup/a/b/memory.max": "max\n"}, monkeypatch)
    assert free_memory() == 3000 * 1024


def test_what_groups_lack_is_refused_while_the_cpu_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "proc/self/cgroup": "0::/a\n",
        "proc/self/mountinfo": V2,
        "proc/self/status": Path("/proc/self/status").read_text(),
        "sys/fs/cgroup/a/memory.max": f"{1 << 30}\n",
        "sys/fs/cgroup/a/memory.current": f"{1 << 29}\n",
    }
    lay_out(tmp_path, files, monkeypatch)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with kept_to_groups("cpu"):
        np.empty(1 << 28, np.uint8)
        with pytest.raises(MemoryError):
            np.empty(1 << 30, np.uint8)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    with kept_to_groups("cuda"):
        assert resource.getrlimit(resource.RLIMIT_DATA) == before
    lay_out(tmp_path, {"sys/fs/cgroup/a/memory.max": "max\n"}, monkeypatch)
    with kept_to_groups("cpu"):
        assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_what_ulimit_gives_counts_as_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "proc/meminfo": "MemTotal: 4000 kB\nMemAvailable: 3000 kB\n",
        "proc/self/status": "Name:\tpython\nVmSize:\t  500 kB\nVmData:\t  100 kB\n",
    }
    lay_out(tmp_path, files, monkeypatch)
    limits = {resource.RLIMIT_AS: 600 * 1024, resource.RLIMIT_DATA: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind], limits[kind]))
    assert (memory_limit(), free_memory()) == (600 * 1024, 100 * 1024)
    limits[resource.RLIMIT_DATA] = 150 * 1024
    assert (memory_limit(), free_memory()) == (150 * 1024, 50 * 1024)


def test_cores_are_those_that_the_process_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr(machine, "cpu_quota", lambda: 2.5)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert (usable_cores(), threads_for(None), threads_for(5)) == (3, 3, 5)
    for odd in ("0", "all", ""):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", odd)
        assert threads_for(None) == 3
    keep_to_cores()
    assert os.environ.pop("OMP_NUM_THREADS") == "3"
    monkeypatch.setattr(machine, "cpu_quota", lambda: None)
    keep_to_cores()
    assert "OMP_NUM_THREADS" not in os.environ
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert (usable_cores(), threads_for(None), threads_for(5)) == (8, 2, 5)


def test_only_the_ground_asks_the_machine_how_many_cores_it_has() -> None:
    """Anywhere else what this process may use is meant; the doctor shows both."""
    asked = ("cpu_count(", "sched_getaffinity(", "process_cpu_count(")
    folder = Path(machine.__file__).parent
    asking = {file.name for file in folder.rglob("*.py") if any(name in file.read_text() for name in asked)}
    assert asking == {"machine.py", "doctor.py"}
