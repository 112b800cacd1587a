"""Claims: which of several builders writes what.

A claim is a file that only one process can create and that names it. A claim of a process that is certainly gone is
taken over; any other is respected, however old it is: above all one of another machine.
"""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kcache.durable import create_bytes, json_bytes
from kcache.errors import CacheBusyError, CacheCorruptError
from kcache.filesystems import lock
from kcache.processes import Process, is_gone, is_here, this_process
from kcache.stopping import stop_here

TURN = ".turn"
"""The claim, in a cache's folder, of the builder that plans or assembles while the others wait."""

_held: set[Path] = set()
"""What this process holds: any other claim that names it is one that the disk did not let it give up."""

POLL_SECONDS = 0.1
QUIET_SECONDS = 1.0
"""Shorter waits are not worth a message."""
REMIND_SECONDS = 60.0

_PLACES = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
)
"""Where launchers say which of how many processes this one is."""


def worker_place(worker: str | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """Which builder of how many this is: (I, N) of `worker` "I/N", else what a launcher says, else (0, 1)."""
    if worker is not None:
        index, _, count = worker.partition("/")
        return int(index), int(count)
    for index_name, count_name in _PLACES:
        index, count = environment.get(index_name, ""), environment.get(count_name, "")
        if index.isdecimal() and count.isdecimal() and int(count):
            return int(index) % int(count), int(count)  # the tasks of a Slurm array may be counted from anywhere
    return 0, 1


def holder(claim: Path) -> Process | None:
    """The process that holds a claim, None when nobody does; raises CacheCorruptError for a damaged claim."""
    try:
        if not (content := claim.read_bytes()):
            time.sleep(POLL_SECONDS)  # it may just be being written, where the file system has no hard links
            content = claim.read_bytes()
        return Process(**json.loads(content))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise CacheCorruptError(
            f"claim {claim} cannot be read ({error}); remove it when no other builder of this cache is running"
        ) from error


def take(claim: Path) -> Process | None:
    """Claim something for this process; returns None, or the process that holds it already and may be alive.

    Raises CacheWriteError, also when the claim's folder is not there.
    """
    while True:
        found = holder(claim)
        if found is None:
            if create_bytes(claim, json_bytes(asdict(this_process()))):
                _held.add(claim.absolute())
                return None
        elif is_gone(found) or (found == this_process() and claim.absolute() not in _held):
            _remove_dead(claim, found)
        else:
            return found


def let_go(claim: Path) -> None:
    """Give up a claim. If its file cannot be removed, this process ignores it; others do once this one ended."""
    _held.discard(claim.absolute())
    with suppress(OSError):
        claim.unlink()


def _remove_dead(claim: Path, found: Process) -> None:
    """Remove the claim of a process that is gone, unless another builder has done so and claimed it anew."""
    try:
        with claim.open("r+b") as file:
            lock(file.fileno(), fcntl.LOCK_EX, claim.parent)
            if os.path.samestat(os.fstat(file.fileno()), claim.stat()) and holder(claim) == found:
                claim.unlink()
    except FileNotFoundError:
        pass


@dataclass
class Patience:
    """Waits for other builders, and says for whom."""

    alone: bool
    """Whether no other builder is expected: then nobody is waited for of whom nothing is known."""
    say: Callable[[str], None]
    _claim: Path | None = None
    _next_message: float = field(default=0.0)

    def wait(self, claim: Path, other: Process) -> None:
        """Wait a moment for `other` to let go of `claim`.

        Raises CacheBusyError where that builder is on another machine and no other builder is expected.
        """
        now = time.monotonic()
        if self.alone and not is_here(other):
            raise CacheBusyError(
                f"{claim} is held by {other}, another machine, of which nothing is known here; expected no other "
                "builder: wait until that one has ended and build again, or remove that file if it has ended already; "
                "everything else is done"
            )
        if claim != self._claim:
            self._claim, self._next_message = claim, now + QUIET_SECONDS
        elif now >= self._next_message:
            self._next_message = now + REMIND_SECONDS
            self.say(f"waiting for {other}, which holds {claim}")
        time.sleep(POLL_SECONDS)
        stop_here()


@contextmanager
def turn(cache: Path, patience: Patience) -> Iterator[None]:
    """Have `cache` for planning or assembling, one builder after the other."""
    claim = cache / TURN
    while (other := take(claim)) is not None:
        patience.wait(claim, other)
    try:
        yield
    finally:
        let_go(claim)
