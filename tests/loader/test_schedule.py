"""The schedule: no sample missed or repeated, whatever the buckets, the passes and the interruptions."""

import math
from collections import Counter
from itertools import islice, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kcache.errors import ConfigError
from kcache.loader.schedule import Pass, Schedule, Standing

SEED = 7
COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any)


def sizes_for(counts: list[int], data: st.DataObject) -> list[int]:
    """Samples of a pass of each bucket, in some processes."""
    batches = data.draw(st.lists(st.integers(1, 6), min_size=len(counts), max_size=len(counts)))
    processes = data.draw(st.integers(1, 4))
    return [batch * processes for batch in batches]


def check_that_it_follows(one: Pass, standing: Standing) -> None:
    """That a pass takes what comes next, and that what stands after it says so."""
    assert (one.turn, one.place) == (standing.turn, standing.taken[one.bucket])
    expected = list(standing.taken)
    expected[one.bucket] += one.samples
    assert (one.after.turn, one.after.taken) == (standing.turn + one.samples, tuple(expected))


@given(counts=COUNTS, data=st.data())
@settings(max_examples=60, deadline=None)
def test_nothing_is_missed_or_repeated_whatever_interrupts(counts: list[int], data: st.DataObject) -> None:
    """Three epochs in several starts, each with passes of its own: at every moment all is accounted for.

    That each bucket's places follow one another means that of its samples none comes again before all have come.
    """
    standing = Schedule(counts, sizes_for(counts, data), SEED).begin()
    for last in (False, False, True):
        sizes = sizes_for(counts, data)
        schedule = Schedule(counts, sizes, SEED)
        left = schedule.passes_until(3, standing)
        if len(counts) == 1:
            left = max(0, 3 * counts[0] - standing.taken[0]) // sizes[0]
        epoch = standing.epoch
        for one in islice(schedule.forever(standing), left if last else data.draw(st.integers(0, left))):
            check_that_it_follows(one, standing)
            standing = one.after
            assert epoch <= standing.epoch <= 3
            epoch = standing.epoch
            assert all(have <= 3 * count for have, count in zip(standing.taken, counts, strict=True))
        if last:
            for have, count, size in zip(standing.taken, counts, sizes, strict=True):
                assert 0 <= 3 * count - have < size
    assert standing.turn == sum(standing.taken)


@given(counts=COUNTS, data=st.data())
@settings(max_examples=60, deadline=None)
def test_after_each_epoch_less_than_a_pass_of_each_bucket_waits(counts: list[int], data: st.DataObject) -> None:
    """In every epoch each bucket has had all full passes of its samples until then, and passes stay in their epoch."""
    sizes = sizes_for(counts, data)
    schedule = Schedule(counts, sizes, SEED)
    for epochs in (1, 2, 5):
        expected = [epochs * count // size for count, size in zip(counts, sizes, strict=True)]
        passes = list(islice(schedule.forever(schedule.begin()), sum(expected)))
        had = Counter(one.bucket for one in passes)
        assert [had[bucket] for bucket in range(len(counts))] == expected
        if len(counts) > 1:
            assert schedule.passes_until(epochs, schedule.begin()) == len(passes)


@given(counts=COUNTS, data=st.data())
@settings(max_examples=60, deadline=None)
def test_going_on_with_the_same_passes_changes_nothing(counts: list[int], data: st.DataObject) -> None:
    """Wherever one begins, in whatever order places are asked for."""
    sizes = sizes_for(counts, data)
    schedule = Schedule(counts, sizes, SEED)
    whole = list(islice(schedule.forever(schedule.begin()), 30))
    for taken in data.draw(st.lists(st.integers(1, 29), max_size=4)):
        assert list(islice(schedule.forever(whole[taken - 1].after), 30 - taken)) == whole[taken:]
        other = Schedule(counts, sizes, SEED)
        assert list(islice(other.forever(whole[taken - 1].after), 30 - taken)) == whole[taken:]


@given(counts=COUNTS, least=st.integers(1, 4), data=st.data())
@settings(max_examples=60, deadline=None)
def test_epoch_by_epoch_every_bucket_gives_its_rest(counts: list[int], least: int, data: st.DataObject) -> None:
    """From anywhere; what is too little for all processes waits where there are several buckets."""
    sizes = sizes_for(counts, data)
    schedule = Schedule(counts, sizes, SEED)
    standing = schedule.begin()
    for one in islice(schedule.forever(standing), data.draw(st.integers(0, 12))):
        standing = one.after
    for _ in range(3):
        epoch, full = standing.epoch, True
        whole = list(schedule.rest(standing, least))
        cut = data.draw(st.integers(0, len(whole)))
        for number, one in enumerate(whole):
            if number == cut and standing.epoch == epoch:
                assert list(schedule.rest(standing, least)) == whole[number:]
            check_that_it_follows(one, standing)
            assert one.samples == sizes[one.bucket] or least <= one.samples < sizes[one.bucket]
            assert full or one.samples < sizes[one.bucket]
            full = one.samples == sizes[one.bucket]
            standing = one.after
        left = [(epoch + 1) * count - have for count, have in zip(counts, standing.taken, strict=True)]
        assert all(more < least for more in left)
        standing = schedule.behind(epoch, standing)
        assert standing.epoch == epoch + 1
        if len(counts) == 1:
            assert standing.taken[0] == standing.turn == (epoch + 1) * counts[0]
        else:
            assert standing.turn == sum(standing.taken)


@given(samples=st.integers(1, 60), size=st.integers(3, 90), passes=st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_one_bucket_is_its_samples_one_after_another(samples: int, size: int, passes: int) -> None:
    """Whatever its size; an epoch is what a run without buckets calls one."""
    schedule = Schedule([samples], [size], SEED)
    standing = schedule.begin(turn=100, epoch=2)
    for number, one in enumerate(islice(schedule.forever(standing), passes)):
        assert one[:4] == (0, 100 + number * size, 2 * samples + number * size, size)
        standing = one.after
    assert standing.epoch == standing.taken[0] // samples
    assert standing.passes == 0
    assert schedule.passes_until(9, standing) == math.ceil(max(0, 7 * samples - passes * size) / size)
    end = (standing.epoch + 1) * samples
    starts = range(standing.taken[0], end, size)
    expected = [(start, min(start + size, end) - start) for start in starts if end - start >= 3]
    assert [(one.place, one.samples) for one in schedule.rest(standing, 3)] == expected


@pytest.mark.parametrize("seed", [0, 2**32])
def test_all_orders_of_an_epochs_passes_are_equally_likely(seed: int) -> None:
    """Two passes of one bucket, one of each of two others: twelve orders, in 2,400 epochs about 200 times each."""
    schedule = Schedule([20, 10, 0, 10], [10] * 4, seed)
    passes = [one.bucket for one in islice(schedule.forever(schedule.begin()), 4 * 2400)]
    found = Counter(tuple(passes[first : first + 4]) for first in range(0, len(passes), 4))
    assert found.keys() == set(permutations((0, 0, 1, 3)))
    assert sum((count - 200) ** 2 / 200 for count in found.values()) < 31.3  # of 11 degrees: once in a thousand
    other = Schedule([20, 10, 0, 10], [10] * 4, seed + 1)
    assert [one.bucket for one in islice(other.forever(other.begin()), len(passes))] != passes


def test_a_bucket_of_few_samples_waits_for_a_whole_pass() -> None:
    """One of 5, two of 3, passes of 8: it comes in the epoch that brings its eighth sample, several times over."""
    schedule = Schedule([1, 80], [8, 8], SEED)
    epochs = [one.after.epoch for one in islice(schedule.forever(schedule.begin()), 2 * 81) if one.bucket == 0]
    assert [epoch for epoch in epochs if epoch % 8 == 7] == epochs == [7, 15]


def test_what_is_far_away_is_found_at_once() -> None:
    """A sample that fills a pass after a million epochs; the first passes of a hundred million samples."""
    alone = Schedule([1, 0], [10**6, 1], SEED)
    assert next(alone.forever(alone.begin())).after == Standing(10**6, 10**6, (10**6, 0), 1)
    many = Schedule([10**8, 10**7], [64, 16], SEED)
    assert many.passes_until(3, many.begin()) == 3 * 10**8 // 64 + 3 * 10**7 // 16
    assert len(list(islice(many.forever(many.begin()), 100))) == 100


@pytest.mark.parametrize(
    ("counts", "sizes"), [([], []), ([0, 0], [1, 1]), ([3, -1], [1, 1]), ([3], [0]), ([3, 4], [2])]
)
def test_what_is_no_schedule_is_refused(counts: list[int], sizes: list[int]) -> None:
    with pytest.raises(ConfigError, match="expected samples in one of them"):
        Schedule(counts, sizes, SEED)
