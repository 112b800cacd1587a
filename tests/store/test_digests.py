"""Keys are digests of content, one by one and many in an array."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kcache.disk import scratch
from kcache.store import digests
from kcache.store.digests import (
    EMPTY_CAPTION_KEY,
    ZERO_IMAGE_KEY,
    Keys,
    Positions,
    caption_key,
    content_key,
)


def test_keys_are_the_first_half_of_sha256() -> None:
    assert content_key(b"picture") == hashlib.sha256(b"picture").digest()[:16]
    assert caption_key("ein Würfel") == hashlib.sha256("ein Würfel".encode()).digest()[:16]


def test_reserved_keys_are_fixed_and_differ() -> None:
    assert EMPTY_CAPTION_KEY.hex() == "e3b0c44298fc1c149afbf4c8996fb924"
    assert content_key(b"kcache: all-zero pixels") == ZERO_IMAGE_KEY


@given(st.text(), st.text())
def test_captions_share_a_key_only_when_equal(first: str, second: str) -> None:
    assert (caption_key(first) == caption_key(second)) == (first == second)


# Few first and few second halves, so that many keys share one or both; zeros at the end, which numpy cuts off text.
KEYS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=60).map(
    lambda pairs: [bytes([high] * 8 + [low] + [0] * 7) for high, low in pairs]
)


def as_in_a_list(keys: list[bytes], others: list[bytes]) -> None:
    """What is asked of keys in an array comes as of those in a list."""
    packed = Keys.of(keys)
    assert Keys.of(packed) is packed
    assert (list(packed), len(packed), packed == Keys.of(others)) == (keys, len(keys), keys == others)
    assert [packed[i] for i in range(-len(keys), len(keys))] == keys + keys
    assert list(packed[3:20]) == keys[3:20]
    order, new = packed.in_order()
    assert [keys[i] for i in order] == sorted(keys)
    assert order.tolist() == sorted(range(len(keys)), key=lambda i: (keys[i], i))
    assert [keys[i] for i in order[new]] == sorted(set(keys))
    assert list(packed.unique()) == list(dict.fromkeys(keys))
    assert packed.among(others).tolist() == [key in others for key in keys]
    known = sorted(set(others))
    found = Keys.of(known).find(packed).tolist()
    assert found == [known.index(key) if key in known else -1 for key in keys]


@given(keys=KEYS, others=KEYS)
def test_keys_in_an_array_are_what_they_are_in_a_list(keys: list[bytes], others: list[bytes]) -> None:
    as_in_a_list(keys, others)


@given(
    keys=KEYS, others=KEYS, many=st.sampled_from([1, 1 << 20]), together=st.sampled_from([1, 3, 100]),
    step=st.sampled_from([1, 2, 7]), in_memory=st.sampled_from([0, 100]),
)  # fmt: skip
def test_of_many_keys_the_same_comes_part_by_part(
    keys: list[bytes], others: list[bytes], many: int, together: int, step: int, in_memory: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scratch, "_IN_MEMORY", in_memory)
        for name, value in (("_MANY", many), ("_TOGETHER", together), ("_STEP", step), ("_WIDE", 2 * step)):
            patch.setattr(digests, name, value)
        as_in_a_list(keys, others)
        packed, known = Keys.of(keys), sorted(set(others))
        assert packed.ascending() == Keys.of(sorted(set(keys)))
        ascending = Keys.of(known)
        assert ascending.ascending() is ascending
        assert list(packed.where(np.array([key in known for key in keys], np.bool_))) == [k for k in keys if k in known]


@given(keys=KEYS, others=KEYS)
def test_the_last_of_equal_keys_says_the_number(keys: list[bytes], others: list[bytes]) -> None:
    for numbers in (range(len(keys)), [7 * i % 11 for i in range(len(keys))]):
        expected = dict(zip(keys, numbers, strict=True))
        found = Positions(Keys.of(keys), None if isinstance(numbers, range) else np.array(numbers, np.int64))
        assert found.find(others).tolist() == [expected.get(key, -1) for key in others]


def test_many_keys_are_taken_out_one_by_one() -> None:
    keys = [i.to_bytes(16, "big") for i in range(10_000)]
    assert list(Keys.of(keys)) == keys
