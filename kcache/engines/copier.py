"""One that copies shards of a finished cache, wherever it is: it opens nothing, and knows what each task tells it.

What it is told to do is made elsewhere: a conversion cuts each shard out of what it copies, and here that is committed.
"""

import logging
import socket
from dataclasses import dataclass
from typing import Protocol

from kcache.build.plan import PlannedShard
from kcache.engines.actor import Told
from kcache.engines.tasks import Look, check_seen, check_version
from kcache.errors import EngineError


class Portion(Protocol):
    """A shard, and what it is copied from."""

    def commit(self) -> None:
        """Copy and commit it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CopySetup:
    """What a copying actor has to know, whatever it will copy."""

    plan: str
    """Where the plan that is worked off lies: who sees it sees the new cache."""
    directory: str
    version: str
    """Of kcache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyTask:
    """A shard to be copied."""

    table: str
    shard: PlannedShard
    portion: Portion


class CopyingActor:
    """Copies shards of one plan; several at a time where several are given to it, as one reads while another writes."""

    def __init__(self, setup: CopySetup) -> None:
        """Raises nothing, so that there is always one to ask."""
        self._setup = setup
        self._table = ""
        self._said: list[str] = []
        self._stopped = False
        logging.getLogger("kcache").addHandler(Told(self._said))

    def build(self, task: CopyTask) -> Look:
        """Copy and commit a shard, and say how it is doing then; raises what a conversion raises."""
        if self._stopped:
            raise EngineError(f"the actor on {socket.gethostname()} was told to stop")
        check_seen(self._setup.plan, self._setup.directory)
        self._table = task.table
        task.portion.commit()
        return self.look()

    def look(self) -> Look:
        """How it is doing; may be called while it copies."""
        check_version(self._setup.version)
        said = tuple(self._said)
        del self._said[: len(said)]
        return Look(host=socket.gethostname(), table=self._table, done={}, seconds={}, said=said)

    def stop(self) -> None:
        """Begin no other shard; those under way are finished."""
        self._stopped = True
