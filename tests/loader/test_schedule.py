"""The schedule: no sample missed or repeated, whatever the buckets, the batches and the interruptions."""

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


def schedule_of(counts: list[int], data: st.DataObject) -> Schedule:
    """Batches of any size for some processes: they may be larger than a bucket."""
    batches = data.draw(st.lists(st.integers(1, 20), min_size=len(counts), max_size=len(counts)))
    return Schedule(counts, batches, SEED, data.draw(st.integers(1, 4)))


def check_that_it_follows(one: Pass, standing: Standing) -> None:
    """That a pass takes what comes next, and that what stands after it says so."""
    assert (one.turn, one.place) == (standing.turn, standing.taken[one.bucket])
    expected = list(standing.taken)
    expected[one.bucket] += one.samples
    assert (one.after.turn, one.after.taken) == (standing.turn + one.samples, tuple(expected))


def waiting(schedule: Schedule, epochs: int, standing: Standing) -> list[int]:
    return [epochs * count - taken for count, taken in zip(schedule.counts, standing.taken, strict=True)]


@given(counts=COUNTS, data=st.data())
@settings(max_examples=60, deadline=None)
def test_nothing_is_missed_or_repeated_whatever_interrupts(counts: list[int], data: st.DataObject) -> None:
    """Three epochs in three starts, each with batches and processes of its own: at every moment all is accounted for.

    The places of each bucket follow one another, so that of its samples none comes again before all have come.
    """
    standing = schedule_of(counts, data).begin()
    for start in range(3):
        schedule = schedule_of(counts, data)
        left = sum(
            max(0, more) // size for more, size in zip(waiting(schedule, 3, standing), schedule.sizes, strict=True)
        )
        for one in islice(schedule.forever(standing), left if start == 2 else data.draw(st.integers(0, left))):
            check_that_it_follows(one, standing)
            assert standing.epoch <= one.after.epoch <= 3
            standing = one.after
            assert min(waiting(schedule, 3, standing)) >= 0
    for more, size, count in zip(waiting(schedule, 3, standing), schedule.sizes, counts, strict=True):
        assert 0 <= more < size
        assert more < max(count, 1) or len(counts) == 1  # no sample has come two times less often than another
    assert standing.turn == sum(standing.taken)


@given(counts=COUNTS, data=st.data())
@settings(max_examples=60, deadline=None)
def test_in_every_epoch_each_bucket_has_all_the_passes_that_it_fills(counts: list[int], data: st.DataObject) -> None:
    schedule = schedule_of(counts, data)
    for epochs in (1, 2, 5):
        expected = [epochs * count // size for count, size in zip(counts, schedule.sizes, strict=True)]
        passes = list(islice(schedule.forever(schedule.begin()), sum(expected)))
        had = Counter(one.bucket for one in passes)
        assert [had[bucket] for bucket in range(len(counts))] == expected
        if len(counts) > 1:
            assert all(expected[bucket] >= epochs for bucket, count in enumerate(counts) if count)
            assert schedule.steps_until(epochs, schedule.begin()) == math.ceil(len(passes) / schedule.world_size)
            some = passes[len(passes) // 2].after
            left = math.ceil((len(passes) - len(passes) // 2 - 1) / schedule.world_size)
            assert schedule.steps_until(epochs, some) == left


@given(counts=COUNTS, data=st.data())
@settings(max_examples=60, deadline=None)
def test_going_on_changes_nothing(counts: list[int], data: st.DataObject) -> None:
    """Wherever one begins, whatever was asked before; several buckets with other processes, too."""
    schedule = schedule_of(counts, data)
    whole = list(islice(schedule.forever(schedule.begin()), 30))
    processes = data.draw(st.integers(1, 4)) if len(counts) > 1 else schedule.world_size
    batches = [size // (schedule.world_size if len(counts) == 1 else 1) for size in schedule.sizes]
    other = Schedule(counts, batches, SEED, processes)
    for taken in data.draw(st.lists(st.integers(1, 29), max_size=4)):
        assert list(islice(schedule.forever(whole[taken - 1].after), 30 - taken)) == whole[taken:]
        assert list(islice(other.forever(whole[taken - 1].after), 30 - taken)) == whole[taken:]
    if len(counts) > 1:
        steps = list(other.steps(whole))
        assert all(len(step) == processes for step in steps)
        assert [one for step in steps for one in step] == whole[: 30 // processes * processes]


@given(counts=COUNTS, data=st.data())
@settings(max_examples=60, deadline=None)
def test_epoch_by_epoch_every_bucket_gives_its_rest(counts: list[int], data: st.DataObject) -> None:
    """From anywhere; what is not enough for all processes waits where there are several buckets."""
    schedule = schedule_of(counts, data)
    standing = schedule.begin()
    for one in islice(schedule.forever(standing), data.draw(st.integers(0, 12))):
        standing = one.after
    for _ in range(3):
        epoch, begun = standing.epoch, standing
        whole = list(schedule.rest(standing))
        steps = list(schedule.steps(whole))
        if standing == schedule.begin():
            assert len(steps) == schedule.steps_of_epoch()
        full = [one.samples == schedule.sizes[one.bucket] for one in whole]
        assert full == sorted(full, reverse=True)
        assert all(0 < one.samples <= schedule.sizes[one.bucket] for one in whole)
        for number, step in enumerate(steps):
            if standing.epoch == epoch:
                assert list(schedule.steps(schedule.rest(standing))) == steps[number:]
            for one in step:
                check_that_it_follows(one, standing)
                standing = one.after
        left = waiting(schedule, epoch + 1, whole[-1].after if whole else begun)
        assert max(left) <= (0 if len(counts) > 1 else schedule.world_size - 1)
        assert sum(map(len, steps)) > len(whole) - schedule.world_size
        standing = schedule.behind(epoch, standing)
        assert standing.epoch == epoch + 1
        assert standing.turn == sum(standing.taken)
        assert len(counts) > 1 or standing.taken == ((epoch + 1) * counts[0],)


@given(samples=st.integers(1, 60), batch=st.integers(1, 30), passes=st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_one_bucket_is_its_samples_one_after_another(samples: int, batch: int, passes: int) -> None:
    """Three processes take any number of them together; epochs are those of a run that knows of no buckets."""
    schedule, size = Schedule([samples], [batch], SEED, 3), 3 * batch
    standing = schedule.begin(turn=100, epoch=2)
    for number, one in enumerate(islice(schedule.forever(standing), passes)):
        assert one[:4] == (0, 100 + number * size, 2 * samples + number * size, size)
        standing = one.after
    assert standing.epoch == standing.taken[0] // samples
    assert standing.passes == 0
    assert schedule.steps_until(9, standing) == math.ceil(max(0, 7 * samples - passes * size) / size)
    end = (standing.epoch + 1) * samples
    starts = range(standing.taken[0], end, size)
    expected = [(start, min(start + size, end) - start) for start in starts if end - start >= 3]
    assert [(one.place, one.samples) for one in schedule.rest(standing)] == expected


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


def test_the_passes_are_what_they_were() -> None:
    """Runs go on in them: others would be another run."""
    schedule = Schedule([20, 3, 11], [4, 4, 2], SEED)
    passes = "".join(str(one.bucket) for one in islice(schedule.forever(schedule.begin()), 40))
    assert passes == "2000222020110002220222022000201022222002"


def test_what_is_far_away_is_found_at_once() -> None:
    """One sample that fills a pass after a million epochs; the first passes of a hundred million samples."""
    alone = Schedule([1], [10**6], SEED)
    assert next(alone.forever(alone.begin())).after == Standing(10**6, 10**6, (10**6,))
    many = Schedule([10**8, 10**7], [64, 16], SEED, 8)
    assert many.steps_until(3, many.begin()) == math.ceil((3 * 10**8 // 64 + 3 * 10**7 // 16) / 8)
    assert len(list(islice(many.forever(many.begin()), 100))) == 100


@pytest.mark.parametrize(
    ("counts", "batches"), [([], []), ([0, 0], [1, 1]), ([3, -1], [1, 1]), ([3], [0]), ([3, 4], [2])]
)
def test_what_is_no_schedule_is_refused(counts: list[int], batches: list[int]) -> None:
    with pytest.raises(ConfigError, match="expected samples in one of them"):
        Schedule(counts, batches, SEED)
