import numpy as np
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from kcache.store.formats.checksums import joined_crc32c


@given(rows=st.integers(0, 70), length=st.integers(0, 300), seed=st.integers(0, 2**32 - 1))
def test_the_joined_checksum_is_that_of_all_bytes(rows: int, length: int, seed: int) -> None:
    data = np.random.default_rng(seed).integers(0, 256, (rows, length), dtype=np.uint8)
    checksums = np.array([crc32c(row) for row in data], np.uint32)
    assert joined_crc32c(checksums, length) == crc32c(data.tobytes())


def test_rows_as_long_as_latents_and_their_order_count() -> None:
    data = np.random.default_rng(0).integers(0, 256, (3, 73_728), dtype=np.uint8)
    checksums = np.array([crc32c(row) for row in data], np.uint32)
    assert joined_crc32c(checksums, 73_728) == crc32c(data.tobytes())
    assert joined_crc32c(checksums[::-1], 73_728) != crc32c(data.tobytes())
