"""Plans are pure: what is missing, once, in order, cut without overlap; and a frozen one comes back as it was."""

import json
import secrets
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from measuring.synthetic import synthetic_recipe

from kcache.build.plan import (
    OPEN,
    Plan,
    clear_plans,
    close_plan,
    freeze_plan,
    is_open,
    open_plan,
    plan_table,
    shard_name,
)
from kcache.disk import scratch
from kcache.errors import CacheBusyError, CacheCorruptError, CacheMismatchError
from kcache.places import Place, place_of
from kcache.places.effects import remove, write_bytes, write_json
from kcache.store import digests
from kcache.store.recipe import Field

RECIPE = synthetic_recipe("image_embeds", (Field(name="image_embeds", shape=(4,)),), "float16")
KEYS = st.lists(st.integers(0, 40).map(lambda i: i.to_bytes(16, "big")), max_size=60)


@pytest.fixture(params=["disk", "bucket"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A place for a cache, where nothing is yet."""
    return tmp_path if request.param == "disk" else place_of(f"memory://plans/{secrets.token_hex(6)}")


def a_plan(keys: list[bytes]) -> Plan:
    return Plan(tables=(plan_table(RECIPE, keys, (), (), rows_per_shard=3, first_shard=2),))


@given(
    wanted=KEYS, stored=KEYS, rejected=KEYS, rows_per_shard=st.integers(1, 9), first=st.integers(0, 5),
    together=st.sampled_from([2, 7, 1 << 20]),
)  # fmt: skip
def test_every_missing_key_is_planned_once_in_order(
    wanted: list[bytes], stored: list[bytes], rejected: list[bytes], rows_per_shard: int, first: int, together: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:  # many keys are planned part by part, and kept in files
        for name, value in (("_TOGETHER", together), ("_MANY", together), ("_STEP", 1), ("_WIDE", together)):
            patch.setattr(digests, name, value)
        patch.setattr(scratch, "_IN_MEMORY", 8 * together)
        plan = plan_table(RECIPE, wanted, set(stored), set(rejected), rows_per_shard=rows_per_shard, first_shard=first)
    shards = list(plan.shards)
    planned = [key for shard in shards for key in shard.keys]
    assert len(planned) == len(set(planned))
    assert set(planned) == set(wanted) - set(stored) - set(rejected)
    assert planned == sorted(planned, key=wanted.index)
    assert [shard.name for shard in shards] == [shard_name(first + i) for i in range(len(shards))]
    assert all(len(shard.keys) == rows_per_shard for shard in shards[:-1])


def test_a_frozen_plan_is_read_as_it_was(cache: Place) -> None:
    plan = a_plan([bytes([i]) * 16 for i in range(8)])
    freeze_plan(cache, plan)
    assert open_plan(cache) == plan
    close_plan(cache, plan)
    assert open_plan(cache) is None
    assert not is_open(cache, plan)
    freeze_plan(cache, plan)  # it may be wanted again
    assert open_plan(cache) == plan
    close_plan(cache, plan)
    clear_plans(cache)
    assert list(cache.iterdir()) == []


def test_a_second_plan_is_refused(cache: Place) -> None:
    first = a_plan([b"a" * 16])
    freeze_plan(cache, first)
    with pytest.raises(CacheBusyError, match="holds a plan already"):
        freeze_plan(cache, a_plan([b"b" * 16]))
    assert open_plan(cache) == first
    freeze_plan(cache, first)  # by another builder that found the same
    assert open_plan(cache) == first


def test_what_was_not_opened_is_no_plan(cache: Place) -> None:
    plan, other = a_plan([b"a" * 16]), a_plan([b"b" * 16])
    freeze_plan(cache, plan)
    remove(cache / "plans" / OPEN)  # as a builder that is killed leaves it, before it opens or while it closes a plan
    assert open_plan(cache) is None
    freeze_plan(cache, other)
    assert open_plan(cache) == other
    close_plan(cache, plan)
    assert open_plan(cache) == other


def test_what_closes_late_leaves_the_next_plan_alone(cache: Place) -> None:
    first, second = a_plan([b"a" * 16]), a_plan([b"b" * 16])
    freeze_plan(cache, first)
    close_plan(cache, first)
    freeze_plan(cache, second)
    close_plan(cache, first)  # by a builder that was suspended
    assert open_plan(cache) == second
    assert is_open(cache, second)


def test_a_lost_plan_gives_way_to_another(cache: Place) -> None:
    first, second = a_plan([b"a" * 16]), a_plan([b"b" * 16])
    freeze_plan(cache, first)
    remove(cache / "plans" / first.digest[:16])
    assert open_plan(cache) is None
    freeze_plan(cache, second)
    assert open_plan(cache) == second


def test_half_of_a_plan_is_written_anew(cache: Place) -> None:
    plan = a_plan([b"a" * 16, b"b" * 16])
    folder = cache / "plans" / plan.digest[:16]
    freeze_plan(cache, plan)
    remove(cache / "plans" / OPEN)
    remove(folder / "image_embeds.keys.npy")
    freeze_plan(cache, plan)
    assert open_plan(cache) == plan


def test_a_plan_of_schema_1_is_open_by_being_there(cache: Place) -> None:
    plan = a_plan([b"a" * 16, b"b" * 16])
    freeze_plan(cache, plan)
    remove(cache / "plans" / OPEN)
    said = cache / "plans" / plan.digest[:16] / "plan.json"
    write_json(said, {**json.loads(said.read_bytes()), "schema_version": 1})
    assert open_plan(cache) == plan
    close_plan(cache, plan)
    assert open_plan(cache) is None
    assert list(cache.iterdir()) == []


def test_a_plan_of_a_newer_kcache_is_neither_taken_nor_called_damaged(cache: Place) -> None:
    plan = a_plan([b"a" * 16])
    freeze_plan(cache, plan)
    said = cache / "plans" / plan.digest[:16] / "plan.json"
    write_json(said, {**json.loads(said.read_bytes()), "schema_version": 5})
    with pytest.raises(CacheMismatchError, match="schema version 5; this kcache reads 1, 2, 3 and 4"):
        open_plan(cache)
    remove(cache / "plans" / OPEN)
    assert open_plan(cache) is None


@pytest.mark.parametrize("damage", [b"{}", b'{"digest": "../../x"}', b"{"])
def test_a_damaged_name_of_a_plan_is_told(cache: Place, damage: bytes) -> None:
    freeze_plan(cache, a_plan([b"a" * 16]))
    write_bytes(cache / "plans" / OPEN, damage)
    with pytest.raises(CacheCorruptError, match="remove this open plan"):
        open_plan(cache)


def test_a_damaged_plan_is_named(cache: Place) -> None:
    plan = a_plan([b"a" * 16, b"b" * 16])
    freeze_plan(cache, plan)
    keys = cache / "plans" / plan.digest[:16] / "image_embeds.keys.npy"
    content = bytearray(keys.read_bytes())
    content[-1] ^= 1
    write_bytes(keys, bytes(content))
    with pytest.raises(CacheCorruptError, match="digest does not match"):
        open_plan(cache)
