"""Ray: joining a cluster or starting one on this machine, and how many actors it has room for.

Ray's own reports of how it is used are off, and so is the log of every actor on everybody's screen.
"""

import os
import re
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kcache.config import Say
from kcache.errors import EngineError
from kcache.foreign import told
from kcache.machine import usable_cores

_OBJECT_BYTES = 80 << 20
"""What Ray sets aside to hand objects about, as little as it takes: nothing large is."""
_ANSWER_SECONDS = 10.0
"""In which a cluster that runs takes a connection."""
_LETTERS = 300
"""Of what Ray says of a loss."""
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # What Ray itself tells of its machines goes to stdout, where the results of a command are.
    "RAY_DEDUP_LOGS_SKIP_REGEX": r"\S",
    # Actors that ask for no GPU see what there is, and leave it alone: they are told what to compute on.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""What Ray asks for when it is imported, or starts something."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """What one actor takes of a machine."""

    gpus: int
    cpus: int

    def __str__(self) -> str:
        return "1 GPU" if self.gpus else f"{self.cpus} CPU" + ("s" if self.cpus > 1 else "")


def slot_of(machines: Sequence[Mapping[str, float]], device: str | None, threads: int, workers: int | None) -> Slot:
    """What an actor takes where `machines` have these resources, by Ray's names: a GPU where there are any.

    Of CPUs it takes as many as networks compute with, `threads`, as far as a machine has them; beside a GPU those that
    decode, `workers`, or its share of them when that is None.
    """
    with_gpus = [m for m in machines if m.get("GPU", 0) >= 1]
    if (device or ("cuda" if with_gpus else "cpu")).startswith("cuda"):
        share = min((int(m.get("CPU", 0) / m["GPU"]) for m in with_gpus), default=1)
        return Slot(gpus=1, cpus=max(1, min(workers or share, share)))
    most = max((int(m.get("CPU", 0)) for m in machines), default=0)
    return Slot(gpus=0, cpus=max(1, min(threads, most)))


def room_for(machines: Sequence[Mapping[str, float]], slot: Slot) -> int:
    """How many actors that take a `slot` each fit into `machines`."""
    counts = []
    for machine in machines:
        fitting = int(machine.get("CPU", 0) // slot.cpus)
        counts.append(min(fitting, int(machine.get("GPU", 0) // slot.gpus)) if slot.gpus else fitting)
    return sum(counts)


def machines_of(ray: Any) -> list[dict[str, float]]:
    """The resources of each machine that is there, by Ray's names."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


@contextmanager
def joined(address: str | None, say: Say) -> Iterator[Any]:
    """Ray, connected to the cluster at `address` for the block: see `BuildConfig.address`; raises EngineError.

    A cluster that this process has joined already is taken as it is, and not left.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield ray
        return
    handler = signal.getsignal(signal.SIGTERM)
    folder: str | None = None
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    if address == "local" or (address is None and not _one_runs()):
        # Sockets lie in it, whose paths may have no more than 107 letters.
        folder = tempfile.mkdtemp(prefix="kcache-ray-", dir="/tmp")
        options |= {
            "address": "local", "num_cpus": usable_cores(), "object_store_memory": _OBJECT_BYTES,
            "include_dashboard": False, "_temp_dir": folder,
        }  # fmt: skip
    else:
        options |= {"address": address or "auto"}
    where = "on this machine" if folder else f"at {address or 'the address that this machine knows'}"
    do = (
        "expected one that runs, begun by `ray start --head` with the same versions of Ray and Python; correct "
        "--address, or give --address local to use this machine alone"
    )
    try:
        try:
            with told(EngineError, f"there is no Ray cluster {where}", do):
                _check_answers(address, do)
                ray.init(**options)
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)  # Ray's own would end this process in the middle of things
        say(f"Ray {ray.__version__}: {_size(ray)}" + (", started for this command" if folder else ""))
        yield ray
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _check_answers(address: str | None, do: str) -> None:
    """Raise EngineError where nothing answers at HOST:PORT, which Ray itself would wait for many minutes for."""
    host, _, port = (address or "").rpartition(":")
    if not port.isdigit() or "/" in host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise EngineError(f"there is no Ray cluster at {address}: nothing answers there ({error}); {do}") from error


def why_lost(error: Exception) -> str:
    """Why an actor is lost, in a few words: what Ray says of it, which may be pages."""
    text = " ".join(str(error).split())
    found = re.search(r"its node has died|its worker process has died|temporarily unavailable", text)
    return found[0] if found else text[:_LETTERS]


def _one_runs() -> bool:
    """Whether this machine is known to be in a cluster: as the environment says, or as `ray start` has noted."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # noqa: S108  # Ray's place
    return bool(os.environ.get("RAY_ADDRESS")) or (Path(folder) / "ray" / "ray_current_cluster").is_file()


def _size(ray: Any) -> str:
    found = machines_of(ray)
    gpus, cpus = (int(sum(machine.get(name, 0) for machine in found)) for name in ("GPU", "CPU"))
    return f"{len(found)} machine{'s' if len(found) != 1 else ''} with {gpus} GPUs and {cpus} CPUs"
