"""Claims: which of several builders writes what.

A claim is a file that only one process can create and that names it. A claim of a process that is certainly gone is
taken over, one of a process that runs here never. Of a process on another machine or in another container nothing is
known: its claim is respected until its lease runs out, which its holder renews while it works. A holder that was only
suspended finds its claim gone when it comes back, and drops what it made: claims save work, and nothing's correctness
hangs on them.
"""

import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kcache.disk.durable import create_bytes, json_bytes, writing
from kcache.disk.filesystems import lock
from kcache.disk.leases import LEASE_SECONDS, RENEW_SECONDS, ran_out, renew, seconds_left
from kcache.errors import CacheBusyError, CacheCorruptError
from kcache.processes import Process, is_gone, is_knowable, this_process
from kcache.stopping import stop_here

TURN = ".turn"
"""The claim, in a cache's folder, of the builder that plans or assembles while the others wait."""

_held: set[Path] = set()
"""What this process holds: any other claim that names it is one that the disk did not let it give up."""

POLL_SECONDS = 0.1
QUIET_SECONDS = 1.0
"""Shorter waits are not worth a message."""
REMIND_SECONDS = 60.0
LOOK_SECONDS = 1.0
"""How often it is looked how long a lease still runs."""

_PLACES = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
)
"""Where launchers say which of how many processes this one is."""
_ARRAY = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX")


def worker_place(worker: str | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """Which builder of how many this is: (I, N) of `worker` "I/N", else what launchers say, else (0, 1).

    No two processes of a job or of an array of jobs have one place, whatever the array's numbers are: places may be
    left without a process. https://slurm.schedmd.com/job_array.html has what its variables mean.
    """
    if worker is not None:
        index, _, count = worker.partition("/")
        return int(index), int(count)
    job, jobs = _place_in_array(environment)
    for index_name, count_name in _PLACES:
        index, count = environment.get(index_name, ""), environment.get(count_name, "")
        if index.isdecimal() and count.isdecimal() and int(count):
            return job * int(count) + int(index) % int(count), jobs * int(count)
    return job, jobs


def _place_in_array(environment: Mapping[str, str]) -> tuple[int, int]:
    """Which job of how many this is: by rank where the numbers of a Slurm array are evenly spaced, else by number."""
    if not all(environment.get(name, "").isdecimal() for name in _ARRAY):
        return 0, 1
    job, first, last = (int(environment[name]) for name in _ARRAY)
    count, step = (environment.get(f"SLURM_ARRAY_TASK_{name}", "") for name in ("COUNT", "STEP"))
    # Of "0,3-3:4,8" Slurm says a step of 4, too.
    if count.isdecimal() and step.isdecimal() and (int(count) - 1) * int(step) == last - first:
        rank, off = divmod(job - first, int(step) or 1)
        if not off:
            return rank, int(count)
    return job - first, last - first + 1


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


def take(claim: Path, gives_up: Callable[[Path, Process], bool] = lambda claim, _: ran_out(claim)) -> Process | None:
    """Claim something for this process; returns None, or the process that holds it already and may be alive.

    `gives_up` is asked whether a claim of a process of which nothing is known here is to be taken over. Raises
    CacheWriteError, also when the claim's folder is not there.
    """
    while True:
        found = holder(claim)
        if found is None:
            if create_bytes(claim, json_bytes(asdict(this_process()))):
                _held.add(claim.absolute())
                return None
        elif (
            is_gone(found)
            or (found == this_process() and claim.absolute() not in _held)
            or (not is_knowable(found) and gives_up(claim, found))
        ):
            _remove(claim, found)
        else:
            return found


def is_mine(claim: Path) -> bool:
    """Whether this process still holds a claim that it took: when it was suspended, another may have taken it over."""
    try:
        return claim.absolute() in _held and holder(claim) == this_process()
    except (OSError, CacheCorruptError):
        return False


def let_go(claim: Path) -> None:
    """Give up a claim. If its file cannot be removed, this process ignores it; others do once this one ended."""
    mine = is_mine(claim)
    _held.discard(claim.absolute())
    if mine:
        with suppress(OSError):
            claim.unlink()


@contextmanager
def renewed() -> Iterator[None]:
    """In the block, the leases of all that this process holds are renewed, whatever it is waiting for."""
    end = threading.Event()

    def renew_held() -> None:
        while not end.wait(RENEW_SECONDS):
            for claim in list(_held):
                if is_mine(claim):
                    renew(claim)

    thread = threading.Thread(target=renew_held, name="kcache-leases", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join(1.0)  # a file server that hangs is not waited for


def _remove(claim: Path, found: Process) -> None:
    """Remove the claim of `found`, unless another builder has done so and claimed it anew."""
    try:
        with claim.open("r+b") as file:
            # Where there are no locks, two may take over at once, and both do the work.
            lock(file.fileno(), fcntl.LOCK_EX, claim.parent)
            if os.path.samestat(os.fstat(file.fileno()), claim.stat()) and holder(claim) == found:
                claim.unlink()
    except FileNotFoundError:
        pass


@dataclass
class Patience:
    """Waits for other builders, and says for whom and how long."""

    say: Callable[[str], None]
    take_over: bool = False
    """Whether nobody is waited for of whom nothing is known."""
    _left: dict[Path, tuple[float, float]] = field(default_factory=dict)
    """Of claims, when their leases are to be looked at again, and how many seconds they had left."""
    _for: frozenset[Process] = frozenset()
    _next_message: float = field(default=0.0)
    _given_up: set[Process] = field(default_factory=set)

    def lease(self, claim: Path) -> float:
        """Seconds that the lease of a claim has left, looked at now and then; raises CacheWriteError."""
        now = time.monotonic()
        if claim not in self._left or now >= self._left[claim][0]:
            with writing(claim):
                try:
                    self._left[claim] = (now + LOOK_SECONDS, seconds_left(claim))
                except FileNotFoundError:
                    return LEASE_SECONDS  # given up meanwhile
        return self._left[claim][1]

    def gives_up(self, claim: Path, other: Process) -> bool:
        """Whether `claim` of a process of which nothing is known is to be taken over; says so once of each."""
        if not self.take_over and self.lease(claim) > 0:
            return False
        self._left.pop(claim, None)
        if other not in self._given_up:
            self._given_up.add(other)
            why = "as --take-over says" if self.take_over else "whose lease has run out"
            self.say(f"taking over what {other} left unfinished, {why}")
        return True

    def wait(self, held: Mapping[Path, Process]) -> None:
        """Wait a moment for others to let go of the claims `held`."""
        now, processes = time.monotonic(), frozenset(held.values())
        if processes != self._for:
            self._for, self._next_message = processes, now + QUIET_SECONDS
        elif now >= self._next_message:
            self._next_message = now + REMIND_SECONDS
            self.say("waiting for " + "; and for ".join(self.told(held)))
        time.sleep(POLL_SECONDS)
        stop_here()

    def told(self, held: Mapping[Path, Process]) -> list[str]:
        """For each process that holds something, what it holds and how long that can last."""
        lines = []
        for other in sorted(set(held.values()), key=str):
            claims = [claim for claim in held if held[claim] == other]
            names = ", ".join([claim.name for claim in claims[:3]] + ["…"] * (len(claims) > 3))
            line = f"{other}, which holds {names} in {claims[0].parent}"
            if not is_knowable(other):
                left = max(0.0, *map(self.lease, claims))
                line += (
                    f"; nothing is known of it here, so its lease has to run out, in {left / 60:.0f} min "
                    "unless it renews it; if it has ended, --take-over takes over at once"
                )
            lines.append(line)
        return lines


@contextmanager
def turn(cache: Path, patience: Patience) -> Iterator[None]:
    """Have `cache` for planning or assembling, one builder after the other."""
    claim = cache / TURN
    while (other := take(claim, patience.gives_up)) is not None:
        patience.wait({claim: other})
    try:
        yield
    finally:
        let_go(claim)


def refuse_beside_others(claims: Path, patience: Patience, how: str) -> None:
    """Raise CacheBusyError where others work on the plan of `claims`, which this builder cannot join."""
    held = {}
    for claim in sorted(claims.iterdir()) if claims.is_dir() else ():
        other = None if claim.name.startswith(".") else holder(claim)
        if other is not None and not is_gone(other) and (is_knowable(other) or not patience.gives_up(claim, other)):
            held[claim] = other
    if held:
        others = "; and by ".join(patience.told(held))
        raise CacheBusyError(
            f"{claims.parents[2]} is being built {how} by {others}; expected builders of one cache to be given the "
            "same source and settings; wait for that one to end, or stop it: what it has committed is kept"
        )
