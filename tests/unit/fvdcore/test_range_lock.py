# SPDX-License-Identifier: Apache-2.0
"""Block-range locks with real threads: exclusion, try, order, idleness, a full table."""

import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

RANGE_LOCKS = 256


@pytest.fixture
def locks(probes):
    return probes.bitmap.RangeLocks()


@pytest.mark.parametrize(
    ("other", "free"),
    [((0, 10), True), ((20, 30), True), ((0, 11), False), ((19, 20), False), ((10, 20), False),
     ((12, 13), False), ((0, 100), False)],
)  # fmt: skip
def test_try_gets_what_does_not_overlap_and_never_waits(locks, other, free):
    locks.lock(10, 20)
    assert locks.try_lock(*other) is free
    expected = [(10, 20), other] if free else [(10, 20)]
    assert locks.held() == sorted(expected)


ranges = st.tuples(st.integers(0, 40), st.integers(1, 12)).map(lambda r: (r[0], r[0] + r[1]))


@given(st.lists(ranges, max_size=30), st.randoms(use_true_random=False))
def test_the_table_is_a_set_of_disjoint_ranges(probes, wanted, random):
    locks, held = probes.bitmap.RangeLocks(), []
    for first, end in wanted:
        free = all(end <= a or b <= first for a, b in held)
        assert locks.try_lock(first, end) is free
        if free:
            held.append((first, end))
        elif held:
            locks.unlock(*held.pop(random.randrange(len(held))))
        assert locks.held() == sorted(held)


def test_a_locker_waits_for_every_part_of_its_range(locks, task, wait_until):
    locks.lock(0, 5)
    locks.lock(10, 15)
    waiter = task(locks.lock, 4, 11)
    wait_until(lambda: locks.waiting == 1, "the locker to wait")
    locks.unlock(0, 5)
    wait_until(lambda: locks.waiting == 1, "the locker to look and wait again")
    assert (4, 11) not in locks.held()
    locks.unlock(10, 15)
    waiter.result()
    assert locks.held() == [(4, 11)]


def test_try_does_not_overtake_a_waiter(locks, task, wait_until):
    """Copy-on-read and prefetch must not take a range from under a guest write that waits."""
    locks.lock(0, 5)
    waiter = task(locks.lock, 4, 8)
    wait_until(lambda: locks.waiting == 1, "the locker to wait")
    assert not locks.try_lock(6, 8), "a part of what the waiter wants"
    locks.unlock(0, 5)
    waiter.result()
    assert locks.held() == [(4, 8)]
    assert locks.try_lock(0, 4)


def test_a_patient_one_waits_behind_those_that_wait_and_no_longer_than_it_may(
    locks, task, wait_until
):
    locks.lock(0, 5)
    assert not locks.lock_within(4, 8, 0.01)
    first = task(locks.lock_within, 4, 8, 600.0)
    wait_until(lambda: locks.patient == 1, "the patient one to wait")
    second = task(locks.lock, 3, 6)
    wait_until(lambda: locks.waiting == 1, "the other one to wait")
    locks.unlock(0, 5)
    second.result()
    assert locks.held() == [(3, 6)]
    locks.unlock(3, 6)
    assert first.result()
    assert locks.held() == [(4, 8)]
    assert locks.lock_within(0, 4, 0.0)


def test_one_release_wakes_all_who_can_go_on(locks, task, wait_until):
    locks.lock(0, 100)
    waiters = [task(locks.lock, at, at + 10) for at in range(0, 100, 10)]
    wait_until(lambda: locks.waiting == 10, "ten to wait")
    locks.unlock(0, 100)
    for waiter in waiters:
        waiter.result()
    assert locks.held() == [(at, at + 10) for at in range(0, 100, 10)]


def test_overlapping_ranges_exclude_each_other(locks, task):
    """Unprotected counters in shared memory: any two holders at once would lose an addition."""
    counter = array.array("Q", bytes(8 * 12))
    ranges, rounds = [(0, 8), (4, 12), (6, 7), (0, 12)], 4000
    workers = [task(locks.guard, counter, *span, rounds) for span in ranges]
    for worker in workers:
        worker.result()
    for at in range(12):
        expected = rounds * sum(first <= at < end for first, end in ranges)
        assert counter[at] == expected, at
    assert locks.held() == []


def test_wait_idle_returns_when_nothing_is_locked(locks, task, wait_until):
    locks.wait_idle()
    locks.lock(0, 1)
    locks.lock(5, 6)
    idle = task(locks.wait_idle)
    wait_until(lambda: locks.waiting == 1, "wait_idle to wait")
    locks.unlock(0, 1)
    wait_until(lambda: locks.waiting == 1, "wait_idle to look again")
    assert idle.is_alive()
    locks.unlock(5, 6)
    idle.result()
    locks.lock(0, 1)


def test_a_full_table_makes_wait_and_loses_nobody(locks, task, wait_until):
    for at in range(RANGE_LOCKS):
        assert locks.try_lock(at, at + 1)
    assert not locks.try_lock(1000, 1001)
    waiter = task(locks.lock, 1000, 1001)
    wait_until(lambda: locks.waiting == 1, "the locker to wait for a place")
    locks.unlock(17, 18)
    waiter.result()
    assert (1000, 1001) in locks.held()
    assert len(locks.held()) == RANGE_LOCKS
