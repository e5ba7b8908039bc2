# SPDX-License-Identifier: Apache-2.0
"""The table of states: closed under itself, every state reachable, wrong changes refused."""

import itertools

import pytest

from fvdapi.models import DeviceState
from fvdd.devices import states
from fvdd.devices.states import TRANSITIONS, Life, WrongTransition

MADE_HERE = set(DeviceState) - {DeviceState.ORPHANED}


def test_every_state_has_a_row():
    assert set(TRANSITIONS) == set(DeviceState)


def test_every_state_can_be_reached_and_left():
    reached, todo = set(), [DeviceState.OPENING]
    while todo:
        state = todo.pop()
        if state not in reached:
            reached.add(state)
            todo.extend(TRANSITIONS[state])
    assert reached == MADE_HERE
    final = {state for state in MADE_HERE if not TRANSITIONS[state]}
    assert final == {DeviceState.CLOSED}


def test_what_was_found_can_only_be_adopted():
    assert TRANSITIONS[DeviceState.ORPHANED] == {DeviceState.RECOVERING}


@pytest.mark.parametrize(("previous", "to"), list(itertools.product(DeviceState, DeviceState)))
def test_exactly_the_table_is_allowed(previous, to):
    life = Life("web", previous)
    if to in TRANSITIONS[previous]:
        before = states.COUNTS[(previous.value, to.value)]
        life.move(to, "why")
        assert (life.state, life.reason) == (to, "why")
        assert states.COUNTS[(previous.value, to.value)] == before + 1
    else:
        with pytest.raises(WrongTransition, match="web"):
            life.move(to)
        assert life.state is previous


def test_reason_ends_with_the_state():
    life = Life("web", DeviceState.ATTACHED)
    life.move(DeviceState.RECOVERING, "it died")
    life.move(DeviceState.ATTACHED)
    assert life.reason is None


def test_the_time_without_service_grows_while_nobody_serves(monkeypatch):
    now = 100.0
    monkeypatch.setattr(states.time, "monotonic", lambda: now)
    life = Life("web", DeviceState.ATTACHED)
    now += 7
    assert life.stalled_seconds == 0
    life.move(DeviceState.RECOVERING, "it died")
    now += 2
    assert life.stalled_seconds == 2
    life.move(DeviceState.FAILED, "for good")
    now += 3600
    assert life.stalled_seconds == 3602
    life.move(DeviceState.RECOVERING, "tried again")
    now += 1
    life.move(DeviceState.ATTACHED)
    now += 50
    assert life.stalled_seconds == 3603


def test_transitions_that_never_happened_are_counted_as_none():
    possible = {
        (before.value, after.value)
        for before, afters in states.TRANSITIONS.items()
        for after in afters
    }
    assert set(states.COUNTS) >= possible
