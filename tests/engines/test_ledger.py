"""Who has which shard, what becomes of it when its actor is lost, and when that has happened too often."""

import pytest

from kcache.build.plan import PlannedShard
from kcache.engines.ledger import LOST_AT_MOST, TRIES, Ledger
from kcache.errors import EngineError, StoreError


def shard(number: int, inputs: int = 3) -> PlannedShard:
    return PlannedShard(name=f"{number:05d}", keys=tuple(bytes([number, i]) for i in range(inputs)))


def ledger_of(count: int, committed: set[str] | None = None) -> Ledger:
    known = set[str]() if committed is None else committed
    return Ledger(iter([shard(i) for i in range(count)]), lambda s: s.name in known)


def drained(ledger: Ledger) -> list[str]:
    """The names of what is handed out until there is nothing, each settled at once."""
    names = []
    while (taken := ledger.take()) is not None:
        names.append(taken.name)
        ledger.settle(taken)
    return names


def test_each_shard_is_handed_out_once_and_the_table_is_over_when_all_are_settled() -> None:
    ledger = ledger_of(2)
    first, second = ledger.take(), ledger.take()
    assert first is not None
    assert second is not None
    assert (first.name, second.name, ledger.take()) == ("00000", "00001", None)
    ledger.settle(second)
    assert ledger.open
    ledger.settle(first)
    assert not ledger.open
    assert (ledger.inputs, ledger.retries) == (6, 0)


def test_shards_are_claimed_only_when_they_are_handed_out() -> None:
    claimed = []

    def claims() -> "list[PlannedShard]":
        for i in range(3):
            claimed.append(i)
            yield shard(i)

    ledger = Ledger(claims(), lambda _: False)
    ledger.take()
    assert claimed == [0]


def test_what_the_lost_had_is_handed_out_again_unless_its_record_is_there() -> None:
    ledger = ledger_of(3, committed={"00001"})
    lost = [ledger.take(), ledger.take()]
    assert ledger.lose([s for s in lost if s], "its machine is gone") == 1
    assert drained(ledger) == ["00000", "00002"]
    assert not ledger.open
    assert (ledger.inputs, ledger.retries) == (9, 1)


def test_a_shard_that_loses_whoever_has_it_ends_the_build_but_not_while_others_are_committed() -> None:
    ledger = ledger_of(2 * LOST_AT_MOST)
    bad = ledger.take()
    assert bad is not None
    for _ in range(2 * LOST_AT_MOST - 1):  # the cluster does its work, so it may not be the shard's fault
        ledger.lose([bad], "killed")
        assert ledger.take() == bad
        other = ledger.take()
        assert other is not None
        ledger.settle(other)
    for _ in range(LOST_AT_MOST - 1):
        ledger.lose([bad], "killed")
        assert ledger.take() == bad
    with pytest.raises(EngineError, match=r"shard 00000 was given to 5 actors, and each was lost \(killed\)"):
        ledger.lose([bad], "killed")


def test_a_whole_cluster_that_is_lost_at_once_is_no_shards_fault() -> None:
    ledger = ledger_of(100)
    had = [ledger.take() for _ in range(100)]
    for one in had:
        assert one is not None
        ledger.lose([one], "power cut")
    assert len(drained(ledger)) == 100


def test_a_store_that_fails_is_tried_again_some_times() -> None:
    ledger, error = ledger_of(1), StoreError("no connection")
    for _ in range(TRIES - 1):
        taken = ledger.take()
        assert taken is not None
        ledger.fail(taken, error)
    taken = ledger.take()
    assert taken is not None
    with pytest.raises(StoreError, match="no connection"):
        ledger.fail(taken, error)
