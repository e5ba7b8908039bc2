# SPDX-License-Identifier: Apache-2.0
"""Quiescence: a stamp is quiescent once all that entered before it has left (I8)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

SHARED = 0
OWN = 5


@pytest.fixture
def quiescence(probes):
    return probes.compact.Quiescence()


def test_nobody_inside_is_quiet_at_once(quiescence):
    first = quiescence.stamp()
    assert first > 0
    assert quiescence.quiescent(first)
    assert quiescence.stamp() == first + 1


@pytest.mark.parametrize("slot", [SHARED, 1, OWN])
def test_who_entered_before_holds_a_stamp_up_and_who_enters_after_does_not(quiescence, slot):
    taken = quiescence.enter(slot)
    stamp = quiescence.stamp()
    assert not quiescence.quiescent(stamp)
    quiescence.leave(taken)
    assert quiescence.quiescent(stamp)
    quiescence.enter(slot)
    assert quiescence.quiescent(stamp)
    assert not quiescence.quiescent(quiescence.stamp())


def test_each_slot_holds_up_by_itself(quiescence):
    quiescence.enter(OWN)
    first = quiescence.stamp()
    quiescence.enter(OWN + 1)
    second = quiescence.stamp()
    quiescence.leave(OWN)
    assert quiescence.quiescent(first)
    assert not quiescence.quiescent(second)
    quiescence.leave(OWN + 1)
    assert quiescence.quiescent(second)


def test_callers_that_share_a_slot_hold_up_each_by_itself(quiescence):
    one = quiescence.enter(SHARED)
    first = quiescence.stamp()
    other = quiescence.enter(SHARED)
    second = quiescence.stamp()
    quiescence.leave(one)
    assert quiescence.quiescent(first)
    assert not quiescence.quiescent(second)
    quiescence.leave(other)
    assert quiescence.quiescent(second)


def test_more_callers_than_there_are_slots_wait_for_one(quiescence, task):
    taken = [quiescence.enter(SHARED) for _ in range(64)]
    assert len(set(taken)) == 64
    call = task(quiescence.enter, SHARED)
    quiescence.leave(taken[17])
    assert call.result() == taken[17]
    assert not quiescence.quiescent(quiescence.stamp())


def test_waiting_ends_with_the_last_user_or_the_deadline(quiescence, task):
    stamp = quiescence.stamp()
    assert quiescence.wait(stamp, 0)
    quiescence.enter(OWN)
    stamp = quiescence.stamp()
    assert not quiescence.wait(stamp, 0.01)
    call = task(quiescence.wait, stamp, 30)
    quiescence.leave(OWN)
    assert call.result()


moves = st.lists(st.tuples(st.sampled_from("els"), st.integers(1, 4)), max_size=60)


@given(steps=moves)
def test_it_is_never_too_early_and_never_late(probes, steps):
    """Against a model that remembers, for each stamp, who was inside when it was taken."""
    one = probes.compact.Quiescence()
    inside, waiting = {}, []
    for number, (step, slot) in enumerate(steps):
        if step == "e" and slot not in inside:
            one.enter(slot)
            inside[slot] = number
        elif step == "l" and slot in inside:
            one.leave(slot)
            del inside[slot]
        elif step == "s":
            waiting.append((one.stamp(), set(inside.items())))
        for stamp, users in waiting:
            assert one.quiescent(stamp) == users.isdisjoint(inside.items())
