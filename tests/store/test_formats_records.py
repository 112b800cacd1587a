"""Records in columns: what is asked for is what was given, in whatever order and by whomever."""

import random
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest

from kcache.store.formats import records
from kcache.store.formats.records import Records

SCHEMA = pa.schema({"number": pa.int64(), "captions": pa.list_(pa.string()), "key": pa.binary()})


@pytest.mark.parametrize("tables_in_memory", [16, 1])
def test_values_are_those_that_were_given(tables_in_memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "RECORDS_PER_TABLE", 700)
    monkeypatch.setattr(records, "TABLES_IN_MEMORY", tables_in_memory)
    rows = [(i, [f"{i}", "a"][: i % 3], None if i % 5 else b"%d" % i) for i in range(2000)]
    found = Records.of(SCHEMA, rows)
    assert len(found) == 2000
    mixed = random.Random(0).sample(range(2000), 2000)
    orders = [range(2000), reversed(range(2000)), mixed, range(0, 2000, 3), range(699, 1402), [5, 5, 6, 6, 1999, 0, 1]]

    def read(order: list[int]) -> bool:
        return all(tuple(found.value(i, name) for name in SCHEMA.names) == rows[i] for i in order)

    assert all(read(list(order)) for order in orders)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, [list(range(2000)), mixed, list(range(2000)), mixed[::-1]]))
    assert found.numbers("number", 650, 1450).tolist() == list(range(650, 1450))
