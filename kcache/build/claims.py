"""Claims: which of several builders writes what.

A claim is a file that only one process can create and that names it. A claim of a process that is certainly gone is
taken over, one of a process that runs here never. Of a process on another machine or in another container nothing is
known: its claim is respected until its lease runs out, which its holder renews while it works. A holder that was only
suspended finds its claim gone when it comes back, and drops what it made: claims save work, and nothing's correctness
hangs on them.
"""

import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields

from kcache.config import Say
from kcache.disk.durable import json_bytes
from kcache.disk.leases import LEASE_SECONDS, RENEW_SECONDS
from kcache.errors import CacheBusyError, CacheCorruptError, KcacheError
from kcache.places import Place, leases
from kcache.places.effects import create_bytes, read_checked
from kcache.places.holds import exclusive, writing
from kcache.processes import Process, is_gone, is_knowable, this_process
from kcache.stopping import stop_here

TURN = ".turn"
"""The claim, in a cache's folder, of the builder that plans or assembles while the others wait."""

_held: dict[Place, str] = {}
"""What this process holds, and the token in each claim, as some systems give equal numbers to processes that follow
each other: any other claim that names this one is of such a process, or one that could not be given up."""

POLL_SECONDS = 0.1
LAZY_SECONDS = 2.0
"""How long it is waited, at most, until it is looked again: the longer the wait, the more seldom, as looking costs."""
QUIET_SECONDS = 1.0
"""Shorter waits are not worth a message."""
REMIND_SECONDS = 60.0
LOOK_SECONDS = 1.0
"""How often it is looked how long a lease still runs."""

_TOKEN = "token"  # noqa: S105  # no secret
_SAID = tuple(field.name for field in fields(Process))

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


def holder(claim: Place) -> Process | None:
    """The process that holds a claim, None when nobody does; raises CacheCorruptError for a damaged claim."""
    found = _read(claim)
    return None if found is None else found[1]


def _read(claim: Place) -> tuple[bytes, Process, str] | None:
    """What a claim holds, whose it is, and its token."""
    try:
        found = read_checked(claim, _parsed)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CacheCorruptError(
            f"claim {claim} cannot be read ({error}); remove it when no other builder of this cache is running"
        ) from error
    leases.saw(claim, found[0])
    return found


def _parsed(content: bytes) -> tuple[bytes, Process, str]:
    try:
        said = json.loads(content)
        return content, Process(**{name: said[name] for name in _SAID}), said.get(_TOKEN, "")
    except (TypeError, LookupError, AttributeError) as error:
        raise ValueError(str(error)) from error


def _ran_out(claim: Place, _: Process) -> bool:
    try:
        return leases.seconds_left(claim) <= 0
    except OSError:
        return False


def take(claim: Place, gives_up: Callable[[Place, Process], bool] = _ran_out) -> Process | None:
    """Claim something for this process; returns None, or the process that holds it already and may be alive.

    `gives_up` is asked whether a claim of a process of which nothing is known here is to be taken over. Raises
    CacheWriteError, also when the claim's folder is not there, or StoreError.
    """
    token = secrets.token_hex(8)
    mine = json_bytes(_claim(token))
    while True:
        found = _read(claim)
        if found is None:
            taken = create_bytes(claim, mine)
        else:
            content, other, _ = found
            if not (
                is_gone(other)
                or (other == this_process() and claim.absolute() not in _held)
                or (not is_knowable(other) and gives_up(claim, other))
            ):
                return other
            taken = leases.take_over(claim, content, mine)
        if taken:
            _held[claim.absolute()] = token
            return None


def _claim(token: str) -> dict[str, object]:
    return {**asdict(this_process()), _TOKEN: token}


def is_mine(claim: Place) -> bool:
    """Whether this process still holds a claim that it took: when it was suspended, another may have taken it over."""
    try:
        return claim.absolute() in _held and (found := _read(claim)) is not None and found[2] == _held[claim.absolute()]
    except (OSError, KcacheError):
        return False


@contextmanager
def unless_lost(lost: Callable[[], bool]) -> Iterator[None]:
    """In the block, what fails is passed over if `lost` says then that a claim is not this process's any more.

    Another builder has then done that work, and cleared up after this one, who was suspended for long.
    """
    try:
        yield
    except (OSError, CacheCorruptError):
        if not lost():
            raise


def let_go(claim: Place) -> None:
    """Give up a claim. If its file cannot be removed, this process ignores it; others do once this one ended."""
    mine = is_mine(claim)
    _held.pop(claim.absolute(), None)
    if mine:
        leases.drop(claim)


@contextmanager
def renewed() -> Iterator[None]:
    """In the block, the leases of all that this process holds are renewed, whatever it is waiting for."""
    end = threading.Event()

    def renew_held() -> None:
        while not end.wait(RENEW_SECONDS):
            for claim, token in list(_held.items()):
                leases.renew(claim, _claim(token))

    thread = threading.Thread(target=renew_held, name="kcache-leases", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join(1.0)  # a file server that hangs is not waited for


@dataclass
class Patience:
    """Waits for other builders, and says for whom and how long."""

    say: Callable[[str], None]
    take_over: bool = False
    """Whether nobody is waited for of whom nothing is known."""
    _left: dict[Place, tuple[float, float]] = field(default_factory=dict)
    """Of claims, when their leases are to be looked at again, and how many seconds they had left."""
    _for: frozenset[Process] = frozenset()
    _next_message: float = field(default=0.0)
    _pause: float = field(default=0.0)
    _given_up: set[Process] = field(default_factory=set)

    def lease(self, claim: Place) -> float:
        """Seconds that the lease of a claim has left, looked at now and then; raises CacheWriteError."""
        now = time.monotonic()
        if claim not in self._left or now >= self._left[claim][0]:
            with writing(claim):
                try:
                    self._left[claim] = (now + LOOK_SECONDS, leases.seconds_left(claim))
                except FileNotFoundError:
                    return LEASE_SECONDS  # given up meanwhile
        return self._left[claim][1]

    def gives_up(self, claim: Place, other: Process) -> bool:
        """Whether `claim` of a process of which nothing is known is to be taken over; says so once of each."""
        if not self.take_over and self.lease(claim) > 0:
            return False
        self._left.pop(claim, None)
        if other not in self._given_up:
            self._given_up.add(other)
            why = "as --take-over says" if self.take_over else "whose lease has run out"
            self.say(f"taking over what {other} left unfinished, {why}")
        return True

    def wait(self, held: Mapping[Place, Process]) -> None:
        """Wait a moment for others to let go of the claims `held`."""
        now, processes = time.monotonic(), frozenset(held.values())
        if processes != self._for:
            self._for, self._next_message, self._pause = processes, now + QUIET_SECONDS, POLL_SECONDS
        elif now >= self._next_message:
            self._next_message = now + REMIND_SECONDS
            self.say("waiting for " + "; and for ".join(self.told(held)))
        time.sleep(self._pause)
        self._pause = min(1.2 * self._pause, LAZY_SECONDS)
        stop_here()

    def told(self, held: Mapping[Place, Process]) -> list[str]:
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
def turn(cache: Place, patience: Patience) -> Iterator[None]:
    """Have `cache` for planning or assembling, one builder after the other."""
    claim = cache / TURN
    while (other := take(claim, patience.gives_up)) is not None:
        patience.wait({claim: other})
    try:
        yield
    finally:
        let_go(claim)


@contextmanager
def alone(cache: Place, say: Say) -> Iterator[None]:
    """Have `cache` to remove what is committed: nobody on this machine holds or reads it, nobody anywhere has the turn.

    Whoever has it is waited for, and builders wait meanwhile, as what they find committed must stay until their
    manifest names it. Raises CacheBusyError, as `exclusive` does.
    """
    with exclusive(cache), renewed(), turn(cache, Patience(say=say)):
        yield


def refuse_beside_others(claims: Place, patience: Patience, how: str) -> None:
    """Raise CacheBusyError where others work on the plan of `claims`, which this builder cannot join."""
    held = {}
    found: list[Place] = list(claims.glob("*"))
    for claim in sorted(found, key=str):
        other = None if claim.name.startswith(".") else holder(claim)
        if other is not None and not is_gone(other) and (is_knowable(other) or not patience.gives_up(claim, other)):
            held[claim] = other
    if held:
        others = "; and by ".join(patience.told(held))
        raise CacheBusyError(
            f"{claims.parent.parent.parent} is being built {how} by {others}; expected builders of one cache to be "
            "given the same source and settings; wait for that one to end, or stop it: what it has committed is kept"
        )
