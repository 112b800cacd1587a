"""What need not fit into memory leaves nothing in the temporary folder, whoever is killed at whatever moment."""

import errno
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from kcache.disk import scratch
from kcache.store.formats import records
from kcache.store.formats.records import Records

SCHEMA = pa.schema({"number": pa.int64()})


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder, where little is much."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(scratch, "_IN_MEMORY", 16)
    monkeypatch.setattr(records, "RECORDS_PER_TABLE", 4)
    return tmp_path


def tables(count: int) -> Iterator[pa.Table]:
    return (pa.table({"number": range(4 * i, 4 * i + 4)}, schema=SCHEMA) for i in range(count))


def test_records_are_in_no_file_that_has_a_name(here: Path) -> None:
    def looking() -> Iterator[pa.Table]:
        for table in tables(40):
            yield table
            assert not list(here.iterdir())

    found = Records(SCHEMA, looking())
    assert found.numbers("number").tolist() == list(range(160))
    assert found.value(101, "number") == 101


def test_arrays_are_in_no_file_that_has_a_name(here: Path) -> None:
    pile = scratch.Pile(np.empty(0, np.int64))
    for first in range(0, 40, 4):
        pile.add(np.arange(first, first + 4))
        assert not list(here.iterdir())
    found = pile.array()
    scratch.release(found)
    assert found.tolist() == list(range(40))


def test_what_fails_where_records_come_from_is_no_failure_of_the_temporary_folder() -> None:
    def failing() -> Iterator[pa.Table]:
        yield from tables(40)
        raise OSError(errno.EIO, "it fails", "source.tar")

    with pytest.raises(OSError, match=r"it fails: 'source.tar'"):
        Records(SCHEMA, failing())
