# SPDX-License-Identifier: Apache-2.0
"""Naps are taken only where many requests gather meanwhile and the client waits for none."""

import pytest

US = 1000
LONGEST = 250 * US


class Client:
    """So many requests in flight, each of which takes so long to answer and to ask anew."""

    def __init__(self, depth, each_ns):
        self.depth = depth
        self.each_ns = each_ns
        self.waited_ns = 0
        self.batches = 0
        self.requests = 0

    def run(self, gather, batches, nap=0):
        """So many batches; the last nap."""
        for _ in range(batches):
            # Where nobody naps, a fast server finds one or two requests at a time.
            ready = nap // self.each_ns if nap else 1 + (self.depth > 1 and self.batches % 2)
            requests = max(1, min(self.depth, ready))
            starved = ready >= self.depth
            self.waited_ns += max(0, nap - self.depth * self.each_ns)
            self.batches += 1
            self.requests += requests
            nap = gather.note(requests, starved)
        return nap


@pytest.fixture
def gather(probes):
    return probes.gather.Gather()


def test_one_request_at_a_time_is_never_waited_for(gather):
    client = Client(1, 5 * US)
    assert {client.run(gather, 1) for _ in range(10_000)} == {0}


@pytest.mark.parametrize(("depth", "each_us"), [(32, 8), (32, 5), (64, 6), (24, 10)])
def test_many_in_flight_gather_until_a_batch_is_worth_it(gather, depth, each_us):
    client = Client(depth, each_us * US)
    nap = client.run(gather, 1000)
    assert 0 < nap <= LONGEST
    calm = Client(depth, each_us * US)
    calm.run(gather, 1000, nap)
    # Receive, send and nap are three calls a batch.
    assert 3 * calm.batches / calm.requests <= 0.3
    assert calm.waited_ns <= 0.05 * 1000 * nap


def test_few_in_flight_are_tried_ever_more_rarely(gather):
    client = Client(3, 5 * US)
    nap, trials = 0, 0
    for _ in range(100_000):
        nap = client.run(gather, 1, nap)
        trials += nap != 0
    assert trials <= 12


def test_client_that_stops_asking_ends_it_but_one_small_batch_does_not(gather):
    assert Client(32, 8 * US).run(gather, 1000)
    assert gather.note(1, False) > 0
    assert gather.note(24, False) > 0
    assert [gather.note(1, False) for _ in range(3)][-1] == 0


def test_client_that_waits_for_us_shortens_the_nap(gather):
    nap = Client(32, 8 * US).run(gather, 1000)
    assert nap
    naps = [gather.note(24, True) for _ in range(9)]
    assert naps[-1] < nap


def test_client_that_waits_even_for_the_shortest_nap_ends_it(gather):
    assert Client(32, 8 * US).run(gather, 1000)
    naps = [gather.note(24, True) for _ in range(400)]
    # Tried anew now and then, and given up at the next question.
    assert naps.count(0) > 200


def test_nap_never_grows_beyond_the_longest(gather):
    assert Client(32, 8 * US).run(gather, 1000)
    assert max(gather.note(8, False) for _ in range(1000)) == LONGEST
