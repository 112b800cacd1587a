"""A store that fails as stores do: what is written is there, once, and what is read is what was written."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from faulty_s3 import Faults, Kind

from kcache.places import place_of
from kcache.places.effects import create_bytes, read_all, remove, write_bytes

SURVIVED: list[Kind] = [
    "slow_down", "conflict", "landed_500", "lost_answer", "lost_request", "stall", "cut",
]  # fmt: skip


@pytest.mark.parametrize("kind", SURVIVED)
def test_what_stores_do_now_and_then_changes_nothing(faulty: Faults, kind: Kind) -> None:
    folder = place_of(faulty.url)
    faulty.rates, faulty.stall_seconds = {kind: 0.3}, 0.05
    contents = [str(number).encode() * 100 for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: create_bytes(folder / f"created-{i}", contents[i]), range(24)))
    for number, content in enumerate(contents):
        write_bytes(folder / f"written-{number}", content)
    assert all(made)
    for name in ("created", "written"):
        assert list(read_all([folder / f"{name}-{number}" for number in range(24)])) == contents
    remove(folder)
    assert list(folder.iterdir()) == []
    assert faulty.happened[kind] > 0
