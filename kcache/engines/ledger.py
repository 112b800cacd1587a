"""What of a table is to be handed out, who has what, and what becomes of it when whoever had it is lost.

A loss settles nothing: an actor may have committed a shard before it died, or may be about to. The commit record alone
says whether there is something left to do, and whoever does it twice is refused by the record of the first.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from kcache.build.plan import PlannedShard
from kcache.errors import EngineError, KcacheError

LOST_AT_MOST = 5
"""How often whoever had a shard may be lost, while no shard is committed anywhere: then the shard is to blame."""
TRIES = 4
"""How often a shard is tried whose store does not do what it is asked."""
AT_ONCE = 2
"""Shards that an actor has: the inputs of the next are decoded while this one is encoded."""


@dataclass
class Ledger:
    """The shards of one table, handed out one by one; pure bookkeeping but for `shards`, which claims them."""

    shards: Iterator[PlannedShard]
    """Those that were not handed out yet."""
    committed: Callable[[PlannedShard], bool]
    """Whether a shard has a commit record."""
    let_go: Callable[[PlannedShard], None] = lambda _: None
    """Told of each shard that is settled: its claim is needed no more."""
    inputs: int = 0
    """Inputs of shards that are settled."""
    retries: int = 0
    """Shards that were handed out again."""
    _again: deque[PlannedShard] = field(default_factory=deque)
    _lost: Counter[str] = field(default_factory=Counter)
    """By shard: how often whoever had it was lost since a shard was committed."""
    _failed: Counter[str] = field(default_factory=Counter)
    _out: int = 0
    _over: bool = False

    @property
    def open(self) -> bool:
        """Whether anything is left to hand out, or with someone."""
        return bool(self._out or self._again or not self._over)

    def take(self) -> PlannedShard | None:
        """A shard that nobody has; None where there is none, for now."""
        shard = self._again.popleft() if self._again else None
        if shard is None and not self._over:
            shard = next(self.shards, None)
            self._over = shard is None
        self._out += shard is not None
        return shard

    def settle(self, shard: PlannedShard) -> None:
        """A shard that was handed out is committed."""
        self._out -= 1
        self.inputs += len(shard.keys)
        self._lost.clear()
        self.let_go(shard)

    def lose(self, shards: Iterable[PlannedShard], why: str) -> int:
        """Whoever had `shards` is lost: those without a record are handed out again, their number is returned.

        Raises EngineError for a shard that loses whoever has it.
        """
        again = 0
        for shard in shards:
            if self.committed(shard):
                self.settle(shard)
                continue
            self._lost[shard.name] += 1
            if self._lost[shard.name] >= LOST_AT_MOST:
                raise EngineError(
                    f"shard {shard.name} was given to {LOST_AT_MOST} actors, and each was lost ({why}), while no other "
                    "shard was committed; expected one to live for as long as a shard takes; look into Ray's logs of "
                    "their machines (memory is what mostly lacks), and start again: what was committed is kept"
                )
            self._hand_back(shard)
            again += 1
        return again

    def fail(self, shard: PlannedShard, error: KcacheError) -> None:
        """A shard failed for what may pass; raises `error` when that has not helped several times."""
        self._failed[shard.name] += 1
        if self._failed[shard.name] >= TRIES:
            raise error
        self._hand_back(shard)

    def _hand_back(self, shard: PlannedShard) -> None:
        self._out -= 1
        self.retries += 1
        self._again.append(shard)
