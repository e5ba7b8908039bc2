# SPDX-License-Identifier: Apache-2.0
"""Conditions with deadlines, threads that leave signals to Python, the clock."""

import errno
import time

import pytest


def test_the_clock_is_the_monotonic_one(probes):
    before = time.monotonic_ns()
    seen = probes.sync.now()
    assert before <= seen <= time.monotonic_ns()


@pytest.mark.parametrize("ms", [0, 20])
def test_a_wait_ends_at_its_deadline(probes, ms):
    begin = time.monotonic()
    assert probes.sync.Bell().wait(ms) == -errno.ETIMEDOUT
    assert ms / 1000 <= time.monotonic() - begin < 5


@pytest.mark.parametrize("ms", [-1, 60_000])
def test_a_wait_ends_when_it_is_woken(probes, task, wait_until, ms):
    bell = probes.sync.Bell()
    waiter = task(bell.wait, ms)
    wait_until(bell.waiting, "it to wait")
    bell.ring()
    assert waiter.result() == 0


def test_a_broadcast_wakes_all(probes, task, wait_until):
    bell = probes.sync.Bell()
    waiters = [task(bell.wait) for _ in range(5)]
    wait_until(lambda: bell.waiting() == 5, "all to wait")
    bell.ring(5)
    assert [waiter.result() for waiter in waiters] == [0] * 5


def test_native_threads_take_no_signals(probes):
    """They are Python's; and joining twice, or what never began, is harmless."""
    before = probes.sync.signals_blocked_here()
    assert probes.sync.signals_blocked_in_a_thread() == 29
    assert probes.sync.signals_blocked_here() == before
