"""A source looked through by the machines of a Ray cluster, piece by piece, before a survey asks what they found.

A task hands back in columns what it digested, for the memo of the process that surveys, which then finds nothing left
to read. What a task could not do that process does itself, and so tells of it what it would tell without a cluster.
"""

import socket
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import pyarrow as pa

from kcache.config import BuildConfig, Say
from kcache.disk.memo import DigestMemo
from kcache.disk.pieces import Piece
from kcache.engines.cluster import joined, machines_of, why_lost
from kcache.engines.crew import LOOK_SECONDS, WAIT_SECONDS
from kcache.engines.ledger import LOST_AT_MOST
from kcache.engines.tasks import check_version
from kcache.errors import EngineError, InputRejected, KcacheError
from kcache.stopping import stop_here, stopped_when_safe
from kcache.tally import counted

_AT_ONCE = 2
"""Pieces for each CPU of the cluster that are handed out: the next one is there when one is done."""
_REPORT_SECONDS = 10.0
_ENTRIES = pa.schema({"folder": pa.binary(), "entry": pa.binary(), "stamp": pa.binary(), "digest": pa.binary()})


@dataclass(frozen=True, kw_only=True, slots=True)
class Looked:
    """What came of a piece."""

    host: str
    found: pa.Table
    """What a memo is to learn, in the columns `_ENTRIES`."""
    trouble: str
    """Why it was not looked through to its end, where that says nothing of the piece itself; else ""."""


def look_through(piece: Piece, planned: str) -> Looked:
    """Look through a piece, wherever this runs; raises EngineError where kcache is not of the version `planned`."""
    check_version(planned)
    memo, trouble = DigestMemo(kept=False), ""
    try:
        piece.look(memo)
    except InputRejected:
        pass
    except (KcacheError, OSError) as error:
        trouble = " ".join(str(error).split())
    columns = list(zip(*memo.taken(), strict=True)) or [()] * len(_ENTRIES)
    found = pa.table([pa.array(values, pa.binary()) for values in columns], schema=_ENTRIES)
    return Looked(host=socket.gethostname(), found=found, trouble=trouble)


def look_ahead(config: BuildConfig, say: Say, pieces: Sequence[Piece], memo: DigestMemo) -> None:
    """Have the cluster look through what `memo` does not know yet of some pieces; a single one is left to the caller.

    On a signal the tasks are ended and an exception raised, what they have handed back being kept. Raises EngineError,
    also for a piece that costs each task that has it its process, and StoreError.
    """
    todo = [piece for piece in pieces if config.rehash or not piece.is_known(memo)]
    if len(todo) < 2:
        return
    with stopped_when_safe(), joined(config.address, say) as ray:
        _Turn(ray, memo, say, deque(todo), len(todo)).run()


@dataclass
class _Turn:
    """Some pieces, handed out until all of them are looked through."""

    ray: Any
    memo: DigestMemo
    say: Say
    waiting: deque[Piece]
    total: int
    out: dict[Any, Piece] = field(default_factory=dict)
    """By what will fetch the answer."""
    done: int = 0
    hosts: set[str] = field(default_factory=set)
    troubles: list[str] = field(default_factory=list)
    room: int = 0
    """CPUs of the cluster."""
    start: float = field(default_factory=time.monotonic)
    asked: float = float("-inf")
    reported: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        task = self.ray.remote(look_through).options(num_cpus=1, max_retries=LOST_AT_MOST - 1)
        try:
            while self.waiting or self.out:
                stop_here()
                self._count_room()
                while self.waiting and len(self.out) < _AT_ONCE * max(1, self.room):
                    piece = self.waiting.popleft()
                    self.out[task.remote(piece, version("kcache"))] = piece
                self._take_answers()
                self._report()
        finally:
            for ref in self.out:
                with suppress(Exception):  # it may be gone already
                    self.ray.cancel(ref, force=True)
        taken = time.monotonic() - self.start
        self.say(f"looked through {counted(self.total, 'piece')} of the source in {taken:,.0f} s, {self._who()}")
        if self.troubles:
            self.say(
                f"{counted(len(self.troubles), 'piece')} could not be looked through there, and "
                f"{'is' if len(self.troubles) == 1 else 'are'} here; the first: {self.troubles[0]}"
            )

    def _count_room(self) -> None:
        if (now := time.monotonic()) - self.asked >= LOOK_SECONDS:  # machines come and go
            self.asked, self.room = now, int(sum(each.get("CPU", 0) for each in machines_of(self.ray)))

    def _take_answers(self) -> None:
        ready, _ = self.ray.wait(list(self.out), timeout=WAIT_SECONDS)
        ready, _ = self.ray.wait(list(self.out), num_returns=len(self.out), timeout=0) if ready else ([], ())
        for ref in ready:
            looked = self._answer(ref, self.out.pop(ref))
            self.memo.learn(zip(*(column.to_pylist() for column in looked.found.columns), strict=True))
            self.memo.flush()  # who is started again goes on from here
            self.done += 1
            self.hosts.add(looked.host)
            if looked.trouble:
                self.troubles.append(f"{looked.host}: {looked.trouble}")

    def _answer(self, ref: Any, piece: Piece) -> Looked:
        from ray.exceptions import RayError, RayTaskError

        try:
            looked: Looked = self.ray.get(ref)
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, KcacheError) else error from None
        except RayError as error:
            raise EngineError(
                f"{piece.name} was looked through by {LOST_AT_MOST} tasks, and each was lost ({why_lost(error)}); "
                "expected one to live for as long as that takes; look into Ray's logs of their machines (memory is "
                "what mostly lacks), and build again: what was looked through is kept"
            ) from error
        return looked

    def _report(self) -> None:
        now = time.monotonic()
        if now - self.reported < _REPORT_SECONDS:
            return
        self.reported = now
        if not self.room:
            self.say("waiting for a machine of the cluster with 1 CPU to look through the source")
            return
        rate = self.done / (now - self.start)
        left = f", {(self.total - self.done) / rate:,.0f} s left" if rate else ""
        self.say(
            f"looked through {self.done:,} of {self.total:,} pieces of the source, {rate:,.1f}/s{left}, {self._who()}"
        )

    def _who(self) -> str:
        return f"on {counted(len(self.hosts), 'machine')} with {counted(self.room, 'CPU')}"
