"""Plans are pure: what is missing, once, in order, cut without overlap; and a frozen one comes back as it was."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from measuring.synthetic import synthetic_recipe

from kcache.build.plan import Plan, close_plan, freeze_plan, open_plan, plan_table, shard_name
from kcache.errors import CacheBusyError, CacheCorruptError
from kcache.store.recipe import Field

RECIPE = synthetic_recipe("image_embeds", (Field(name="image_embeds", shape=(4,)),), "float16")
KEYS = st.lists(st.integers(0, 40).map(lambda i: i.to_bytes(16, "big")), max_size=60)


def a_plan(keys: list[bytes]) -> Plan:
    return Plan(tables=(plan_table(RECIPE, keys, (), (), rows_per_shard=3, first_shard=2),))


@given(wanted=KEYS, stored=KEYS, rejected=KEYS, rows_per_shard=st.integers(1, 9), first=st.integers(0, 5))
def test_every_missing_key_is_planned_once_in_order(
    wanted: list[bytes], stored: list[bytes], rejected: list[bytes], rows_per_shard: int, first: int
) -> None:
    plan = plan_table(RECIPE, wanted, set(stored), set(rejected), rows_per_shard=rows_per_shard, first_shard=first)
    shards = list(plan.shards)
    planned = [key for shard in shards for key in shard.keys]
    assert len(planned) == len(set(planned))
    assert set(planned) == set(wanted) - set(stored) - set(rejected)
    assert planned == sorted(planned, key=wanted.index)
    assert [shard.name for shard in shards] == [shard_name(first + i) for i in range(len(shards))]
    assert all(len(shard.keys) == rows_per_shard for shard in shards[:-1])


def test_a_frozen_plan_is_read_as_it_was(tmp_path: Path) -> None:
    plan = a_plan([bytes([i]) * 16 for i in range(8)])
    freeze_plan(tmp_path, plan)
    assert open_plan(tmp_path) == plan
    close_plan(tmp_path)
    assert open_plan(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_a_second_plan_is_refused(tmp_path: Path) -> None:
    freeze_plan(tmp_path, a_plan([b"a" * 16]))
    with pytest.raises(CacheBusyError, match="holds a plan already"):
        freeze_plan(tmp_path, a_plan([b"b" * 16]))
    assert [entry.name for entry in tmp_path.iterdir()] == ["plans"]


def test_a_damaged_plan_is_named(tmp_path: Path) -> None:
    freeze_plan(tmp_path, a_plan([b"a" * 16, b"b" * 16]))
    keys = next(tmp_path.glob("plans/*/image_embeds.keys.npy"))
    content = bytearray(keys.read_bytes())
    content[-1] ^= 1
    keys.write_bytes(content)
    with pytest.raises(CacheCorruptError, match="digest does not match"):
        open_plan(tmp_path)
