"""The actors that work off a plan on a Ray cluster: who is there, who is asked, who is lost."""

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from kcache.build.plan import PlannedShard
from kcache.config import Say
from kcache.engines.cluster import Slot, machines_of, room_for
from kcache.engines.ledger import AT_ONCE
from kcache.engines.tasks import Handed, Look
from kcache.errors import EngineError

WAIT_SECONDS = 0.5
"""How long an answer is waited for before it is looked whether a signal came."""
LOOK_SECONDS = 2.0
"""How often an actor is asked how it is doing, and the cluster what it consists of."""
_PATIENCE_SECONDS = 20.0
"""How long nobody may be there before that is worth a line."""
_STOP_SECONDS = 20.0
"""How long actors have to give up what they are at."""
_STILLBORN = 3
"""How many actors beyond those that there is room for may be lost in turn without one that has answered."""
_LINES = 20
"""How many different lines of actors are told."""


@dataclass(eq=False)
class Hand:
    """An actor, as the process that hands out sees it."""

    actor: Any
    look: Look | None = None
    """What it last said; None until it is there."""
    asked: float = float("inf")
    """When it is to be asked again."""
    shards: dict[str, PlannedShard] = field(default_factory=dict)
    """What it has to do, by name."""


class Crew:
    """The actors that work off one plan, whatever table is in turn."""

    def __init__(self, ray: Any, kind: type, setup: Any, slot: Slot, say: Say) -> None:
        """Nobody yet: each will be a `kind` of actor, made with `setup`, that takes a `slot`."""
        self.hands: list[Hand] = []
        self.slot = slot
        self._ray = ray
        self._setup = setup
        self._say = say
        self._remote = ray.remote(kind)
        self._answers: dict[Any, tuple[Hand, PlannedShard | None]] = {}
        """What is waited for: of whom, and of which shard, or None where it is how an actor is doing."""
        self._stillborn = 0
        self._told: set[str] = set()
        self._grown = -LOOK_SECONDS
        self._somebody = time.monotonic()

    def grow(self, wanted: int) -> None:
        """Have as many actors as there is room for, no more than `wanted`, and at least one that waits for room."""
        now = time.monotonic()
        if now - self._grown < LOOK_SECONDS and self.hands:
            return
        self._grown, room = now, room_for(machines_of(self._ray), self.slot)
        for _ in range(max(1, min(room, wanted)) - len(self.hands)):
            takes = {"num_gpus": self.slot.gpus, "num_cpus": self.slot.cpus, "max_concurrency": AT_ONCE + 2}
            hand = Hand(self._remote.options(**takes, max_restarts=0, max_task_retries=0).remote(self._setup))
            self.hands.append(hand)
            self._ask(hand)
        if any(hand.look for hand in self.hands):
            self._somebody = now
        elif now - self._somebody > _PATIENCE_SECONDS:
            self._somebody = now
            self._say(
                f"waiting for a machine of the cluster with {self.slot} to spare (there is room for {room} actors)"
            )

    def free(self) -> Hand | None:
        """Who has least to do of those that may be given something."""
        there = [hand for hand in self.hands if hand.look and len(hand.shards) < AT_ONCE]
        return min(there, key=lambda hand: len(hand.shards), default=None)

    def give(self, hand: Hand, task: Handed) -> None:
        """Give an actor a shard to do."""
        hand.shards[task.shard.name] = task.shard
        self._answers[hand.actor.build.remote(task)] = (hand, task.shard)

    def answers(self) -> Iterator[tuple[Hand, PlannedShard | None, Any]]:
        """Whose answer has come, on which shard, and what fetches it; waits a moment for the first."""
        now = time.monotonic()
        for hand in self.hands:
            if hand.asked <= now:
                self._ask(hand)
        ready, _ = self._ray.wait(list(self._answers), timeout=WAIT_SECONDS)
        ready, _ = self._ray.wait(list(self._answers), num_returns=len(self._answers), timeout=0) if ready else ([], 0)
        for ref in ready:
            if ref in self._answers:  # not of one that was lost meanwhile
                hand, shard = self._answers.pop(ref)
                if shard is not None:
                    hand.shards.pop(shard.name)
                yield hand, shard, ref

    def heard(self, hand: Hand, look: Look) -> None:
        """An actor has said how it is doing; what it has to tell is told once, whoever says it."""
        hand.look, self._stillborn = look, 0
        if hand.asked == float("inf"):
            hand.asked = time.monotonic() + LOOK_SECONDS
        for line in dict.fromkeys(look.said):
            if line not in self._told and len(self._told) < _LINES:
                self._told.add(line)
                self._say(f"{look.host}: {line}")

    def lost(self, hand: Hand, why: str) -> list[PlannedShard]:
        """What an actor had to do that is lost, of which nothing is expected any more.

        Raises EngineError where actors are lost as soon as they are made.
        """
        self.hands.remove(hand)
        self._answers = {ref: about for ref, about in self._answers.items() if about[0] is not hand}
        with suppress(Exception):  # it may be gone already
            self._ray.kill(hand.actor)
        self._stillborn += hand.look is None
        if self._stillborn >= _STILLBORN + room_for(machines_of(self._ray), self.slot):
            raise EngineError(
                f"{self._stillborn} actors in turn did not start ({why}); expected this version of kcache[ray] on all "
                "machines of the cluster; install it there, or look into Ray's logs"
            )
        return list(hand.shards.values())

    def release(self) -> None:
        """Leave no actor behind; those at work are told to give up, and have some time to clear up."""
        building = [ref for ref, (hand, shard) in self._answers.items() if shard is not None and hand.look]
        if building:
            # Of a cluster that is gone Ray says so by a plain Exception or a ValueError: nobody is left to be told.
            with suppress(Exception):
                for hand in self.hands:
                    hand.actor.stop.remote()
                self._ray.wait(building, num_returns=len(building), timeout=_STOP_SECONDS)
        for hand in self.hands:
            with suppress(Exception):  # as above
                self._ray.kill(hand.actor)
        self.hands, self._answers = [], {}

    def _ask(self, hand: Hand) -> None:
        self._answers[hand.actor.look.remote()] = (hand, None)
        hand.asked = float("inf")
