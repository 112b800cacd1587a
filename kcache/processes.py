"""Which process something belongs to, and whether that process is gone: the owners of claims and temporary files.

A process is gone when that is certain: on this machine, in this boot, its number is free or another process has it now;
or the machine was started again since. Of a process elsewhere nothing is known, and what it holds is respected as long
as its lease runs: see `kcache.disk.leases`.
"""

import os
import re
import socket
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """A process, told from every other one on any machine."""

    pid: int
    started: str
    """When it was started, in clock ticks since the boot; "" where the system does not say."""
    namespace: str
    """What its pid is a number in: containers count their own."""
    boot: str
    """First digits of the boot's id."""
    machine: str
    """First digits of the machine's id: hosts may share a name."""
    host: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def label(self) -> str:
        """All of it as part of a file name."""
        return f"{self.pid}-{self.started}-{self.namespace}-{self.boot}-{self.machine}-{self.host}"


def from_label(label: str) -> Process | None:
    """The process whose label that is; None when it is no label."""
    parts = label.split("-", 5)
    if len(parts) < 6 or not parts[0].isdigit():
        return None
    pid, started, namespace, boot, machine, host = parts
    return Process(pid=int(pid), started=started, namespace=namespace, boot=boot, machine=machine, host=host)


def this_process() -> Process:
    """The process that asks."""
    return _describe(os.getpid())


def is_here(process: Process) -> bool:
    """Whether it runs, or ran, on this machine."""
    own = this_process()
    return (process.host, process.machine) == (own.host, own.machine)


def is_knowable(process: Process) -> bool:
    """Whether it can be told from here if a process has ended: not of another machine, nor of another container."""
    own = this_process()
    return is_here(process) and (process.boot != own.boot or process.namespace == own.namespace)


def is_gone(process: Process) -> bool:
    """Whether it has certainly ended; False also where that cannot be known from here."""
    own = this_process()
    if not is_here(process):
        return False
    if process.boot != own.boot:
        return True
    if process.namespace != own.namespace:
        return False
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # it runs, as another user
    return _start(process.pid) not in (process.started, "")


@lru_cache(maxsize=1)
def _describe(pid: int) -> Process:
    try:
        namespace = re.sub(r"\D", "", str(Path("/proc/self/ns/pid").readlink()))
    except OSError:
        namespace = ""
    return Process(
        pid=pid,
        started=_start(pid),
        namespace=namespace,
        boot=_first_digits("/proc/sys/kernel/random/boot_id"),
        machine=_first_digits("/etc/machine-id"),
        host=re.sub(r"[^\w.-]", "_", socket.gethostname()),
    )


def _first_digits(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")[:8].strip()
    except OSError:
        return ""


def _start(pid: int) -> str:
    """Start of a process in ticks since the boot, "ended" for one that only waits to be collected, "" if not told."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # proc(5): "pid (name) state …", where the name may hold anything; the start is field 22.
    state, *fields = stat.rpartition(")")[2].split()
    return "ended" if state in "ZX" else fields[18]
