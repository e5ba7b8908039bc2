# SPDX-License-Identifier: Apache-2.0
"""A set of small numbers agrees with Python's own, and far numbers cost no memory between."""

import random
import tracemalloc

from fvdengine.number_set import NumberSet


def test_it_agrees_with_a_plain_set(rng: random.Random):
    mine, plain = NumberSet(), set()
    assert not mine
    for _ in range(5000):
        number = rng.choice((rng.randrange(100), rng.randrange(10_000), rng.randrange(1 << 31)))
        assert mine.take(number) == (number in plain)
        plain.add(number)
    assert mine
    assert all(number in mine for number in plain)
    missing = set(range(5000)) - plain
    assert not any(number in mine for number in missing)


def test_what_lies_between_costs_nothing():
    tracemalloc.start()
    try:
        numbers = NumberSet()
        for number in (0, 1 << 20, (1 << 31) - 2):
            assert not numbers.take(number)
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()
