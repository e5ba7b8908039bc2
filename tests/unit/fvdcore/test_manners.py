# SPDX-License-Identifier: Apache-2.0
"""Policies of prefetch: windows that latency makes, waits for guests, and shares that stay.

A way is played: it carries so many bytes a second and takes so long, whatever is in flight."""

import heapq
import random

import pytest

FIXED, EAGER, POLITE = range(3)
KIB, MIB = 1 << 10, 1 << 20
MS, S = 10**6, 10**9
STEP, MOST = MIB, 16 * MIB
NEVER = 0


@pytest.fixture
def manners(probes):
    def make(policy=POLITE, distant=True, least=8 * KIB, step=STEP, most=MOST):
        return probes.throttle.Manners(policy, distant, least, step, most)

    return make


class Way:
    """First in, first out, at `rate` bytes a second behind a delay; and a prefetch that uses it.
    burst: bytes that pass at once after a rest, as a token bucket lets them."""

    def __init__(self, one, rate, delay, now=S, burst=0):
        self.one, self.rate, self.delay, self.now = one, rate, delay, now
        self.burst = burst
        self.free_at = now
        self.flying = []
        self.carried = 0
        self.demanded = 0
        self.paced = False

    def send(self, size):
        """When the answer to a request of now is there."""
        there = self.now + self.delay
        self.free_at = max(self.free_at, there - self.burst * S // self.rate)
        self.free_at += size * S // self.rate
        return max(self.free_at, there)

    def begin(self):
        """Send what may be sent. When more is due that has to wait for its time alone."""
        while self.one.may():
            if self.one.ready() > self.now:
                self.paced = True
                return self.one.ready()
            size = self.one.piece()
            self.one.begin(size, self.now)
            heapq.heappush(self.flying, (self.send(size), self.now, size))
        return 1 << 63

    def run(self, seconds, guest=0, prefetch=True, chance=None):
        """Prefetch for so long, beside a guest with so many reads of 4 KiB a second (at moments
        that chance draws). The latencies of the guest's reads, sorted, and the bytes a second that
        prefetch got."""
        end, began, latencies = self.now + int(seconds * S), self.carried, []
        next_guest = self.now if guest else end
        while self.now < end:
            self.one.meter(self.demanded, self.now)
            self.one.look(0, self.now if guest else NEVER, 0, self.now)
            due = self.begin() if prefetch else end
            came = self.flying[0][0] if self.flying else end
            if guest and next_guest <= min(came, due):
                self.now = next_guest
                latencies.append(self.send(4 * KIB) - self.now)
                self.demanded += 4 * KIB
                next_guest += int(chance.expovariate(guest) * S) if chance else S // guest
                continue
            if due < came or not self.flying:
                self.now = min(due, came)
                continue
            self.now, sent, size = heapq.heappop(self.flying)
            self.one.end(size, self.now - sent, True, self.now)
            self.carried += size
        return sorted(latencies), (self.carried - began) / seconds


def p99(latencies):
    return latencies[len(latencies) * 99 // 100]


WAYS = [
    (100_000_000 // 8, 1 * MS), (100_000_000 // 8, 50 * MS),
    (1_000_000_000 // 8, 1 * MS), (1_000_000_000 // 8, 50 * MS),
]  # fmt: skip


@pytest.mark.parametrize(("rate", "delay"), WAYS)
def test_a_way_without_guests_is_filled(manners, rate, delay):
    way = Way(manners(), rate, delay)
    way.run(2)
    _, got = way.run(2)
    assert got >= 0.95 * rate


@pytest.mark.parametrize(("rate", "delay"), WAYS)
def test_no_long_queue_is_built(manners, rate, delay):
    way = Way(manners(), rate, delay)
    way.run(4)
    assert way.one.window <= rate * (2 * delay + 35 * MS) / S


@pytest.mark.parametrize(("rate", "delay"), WAYS)
def test_a_guest_waits_little_and_prefetch_gets_its_share(manners, rate, delay):
    """A guest's reads of a fifth of the way. Where a round trip is short, one piece is felt."""
    often = rate // 5 // (4 * KIB)
    way = Way(manners(), rate, delay)
    way.run(2)
    way.run(1, often)
    latencies, got = way.run(1, often)
    alone = delay + 4 * KIB * S // rate
    assert p99(latencies) <= 1.25 * alone + 8 * KIB * S // rate + MS // 2
    if delay > MS:
        assert p99(latencies) <= 1.25 * alone
    assert got >= 0.6 * 0.8 * rate


SHORT = (100_000_000 // 8, 1 * MS)  # holds 12 KiB


@pytest.mark.parametrize("burst", [0, 32 * KIB])
def test_on_a_short_way_prefetch_leaves_a_part_of_what_the_guest_leaves(manners, burst):
    """One piece is a large part of what the way holds: no window keeps its queue short enough."""
    rate, delay = SHORT
    often = rate // 5 // (4 * KIB)
    way = Way(manners(), rate, delay, burst=burst)
    alone, _ = way.run(10, often, prefetch=False, chance=random.Random(7))
    way.run(2)
    way.run(0.3, often, chance=random.Random(8))
    latencies, got = way.run(10, often, chance=random.Random(7))
    share = got / (0.8 * rate)
    assert p99(latencies) <= 1.25 * p99(alone) + (0 if burst else 8 * KIB * S // rate)
    assert 0.6 <= share <= 0.78, share


def test_beside_a_guest_that_was_there_first_the_rate_is_found_too(manners):
    rate, delay = SHORT
    way = Way(manners(), rate, delay, burst=32 * KIB)
    often = rate // 5 // (4 * KIB)
    way.run(2, often, chance=random.Random(7))
    assert way.paced
    _, got = way.run(60, often, chance=random.Random(8))
    assert 0.6 <= got / (0.8 * rate) <= 0.8


def test_a_way_that_carries_more_or_less_is_found_again_beside_a_guest(manners):
    rate, delay = SHORT
    way = Way(manners(), rate, delay)
    way.run(2)
    often = rate // 20 // (4 * KIB)
    for part in (1, 2, 1):
        way.rate = rate // part
        way.run(32, often, chance=random.Random(7))
        assert 0.85 * way.rate <= way.one.rate <= 1.05 * way.rate


def test_however_much_guests_take_prefetch_goes_on(manners):
    rate, delay = SHORT
    way = Way(manners(), rate, delay, burst=32 * KIB)
    way.run(2)
    way.run(1, rate // 5 // (4 * KIB))
    _, got = way.run(3, rate * 9 // 10 // (4 * KIB))
    assert got >= 0.05 * rate


@pytest.mark.parametrize(("rate", "delay"), WAYS[1:])
def test_where_the_way_holds_many_pieces_none_waits_for_its_time(manners, rate, delay):
    way = Way(manners(), rate, delay)
    way.run(2)
    way.run(2, rate // 5 // (4 * KIB))
    assert not way.paced


def test_without_guests_no_piece_waits_for_its_time(manners):
    way = Way(manners(), *SHORT)
    way.run(2)
    way.run(1, 600)
    way.paced = False
    way.run(0.5)
    _, got = way.run(2)
    assert not way.paced
    assert got >= 0.95 * way.rate


def test_the_first_read_of_a_guest_finds_no_long_queue(manners):
    rate, delay = WAYS[0]
    way = Way(manners(), rate, delay)
    way.run(3)
    latencies, _ = way.run(0.002, 1000)
    assert latencies[0] <= delay + 25 * MS


def test_the_window_comes_back_when_guests_are_gone(manners):
    rate, delay = WAYS[1]
    way = Way(manners(), rate, delay)
    way.run(2)
    before = way.one.window
    way.run(2, rate // 5 // (4 * KIB))
    assert way.one.window < before
    way.run(2)
    assert way.one.window >= rate * delay // S, "it fills the way"


def test_a_way_that_became_longer_is_measured_again(manners):
    way = Way(manners(), 100_000_000 // 8, 1 * MS)
    way.run(2)
    way.delay = 50 * MS
    way.run(25)
    _, got = way.run(2)
    assert got >= 0.8 * way.rate


def test_looking_for_the_floor_costs_little(manners):
    rate = WAYS[3][0]
    way = Way(manners(most=32 * MIB), *WAYS[3])
    way.run(3)
    assert way.run(20)[1] >= 0.98 * rate


@pytest.mark.parametrize("policy", [FIXED, EAGER])
def test_others_have_all_slots_whatever_is_measured(manners, policy):
    one = manners(policy)
    assert (one.window, one.piece()) == (MOST, STEP)
    one.look(7, S, 20, S)
    for turn in range(1, 20):
        one.begin(STEP)
        assert one.may()
        one.end(STEP, turn * S, True, turn * S)
    assert (one.window, one.piece(), one.in_flight) == (MOST, STEP, 0)


@pytest.mark.parametrize("policy", [FIXED, EAGER])
def test_others_wait_for_nobody(manners, policy):
    assert not manners(policy, distant=False).look(3, S, 9, S)


@pytest.mark.parametrize("distant", [True, False])
def test_it_waits_for_requests_of_guests_but_not_for_long(manners, distant):
    one = manners(distant=distant)
    assert not one.look(0, NEVER, 0, S)
    assert [one.look(0, NEVER, 2, S + ms * MS) for ms in (0, 1, 19, 20)] == [1, 1, 1, 0]
    assert one.look(0, NEVER, 2, S + 21 * MS), "the next piece waits again"
    assert not one.look(0, NEVER, 0, S + 22 * MS)


def test_reads_from_a_distant_base_are_no_reason_to_wait(manners):
    assert not manners().look(5, NEVER, 5, S)


def test_reads_from_a_local_base_are(manners):
    one = manners(distant=False)
    assert one.look(0, S, 0, S + 10 * MS)
    assert one.piece() == 256 * KIB
    assert not one.look(0, S, 0, S + 100 * MS)
    assert one.piece() == STEP


def test_one_piece_is_always_in_flight(manners):
    one = manners()
    for turn in range(1, 200):
        assert one.may()
        size = one.piece()
        one.begin(size)
        one.look(1, S, 1, S + turn * 40 * MS)
        one.end(size, MS if turn == 1 else S, True, S + turn * 40 * MS)
    assert one.window == one.piece() == 8 * KIB
    one.begin(one.piece())
    assert not one.may()


def test_what_failed_teaches_nothing(manners):
    one = manners()
    one.begin(8 * KIB)
    one.end(8 * KIB, 1, False, S)
    assert (one.window, one.in_flight) == (8 * KIB, 0)
    one.begin(8 * KIB)
    one.end(8 * KIB, 50 * MS, True, 2 * S)
    assert one.window > 8 * KIB


@pytest.mark.parametrize("block", [512, 4 * KIB, 2 * MIB])
def test_a_piece_is_never_smaller_than_a_block(manners, block):
    one = manners(least=max(block, 16 * KIB), step=max(block, MIB))
    assert block <= one.piece() <= max(block, MIB)
