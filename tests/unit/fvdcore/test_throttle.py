# SPDX-License-Identifier: Apache-2.0
"""Caps hold over any stretch; the measured minimum judges busy time alone; pauses are fair dice."""

import pytest

MIB = 1 << 20
S = 10**9
MS = 10**6


@pytest.mark.parametrize("rate", [1024, MIB, 100 * MIB, 3_333_333])
@pytest.mark.parametrize("step", [1, 4096, MIB, 1 << 30])
def test_a_cap_holds_over_many_steps(probes, rate, step):
    bucket = probes.throttle.Bucket(rate)
    now, moved = 10 * S, 0
    begin = now
    for _ in range(50):
        ready = bucket.pay(step, now)
        moved += step
        now = max(now, ready)
    assert moved / rate - 0.021 <= (now - begin) / S <= moved / rate + 50e-9


def test_what_was_not_used_is_lost_but_for_a_burst(probes):
    bucket = probes.throttle.Bucket(MIB)
    bucket.pay(MIB, S)
    late = 3600 * S
    assert bucket.pay(MIB, late) >= late + S - 20 * MS


def test_no_cap_costs_nothing(probes):
    bucket = probes.throttle.Bucket(0)
    assert bucket.pay(1 << 40, S) == 0


def test_a_window_is_judged_when_it_is_over(probes):
    meter = probes.throttle.Meter(5 * MIB, 100 * MS)
    meter.begin(0)
    assert not meter.end(MIB, 99 * MS)
    assert meter.average == 0
    meter.begin(99 * MS)
    assert not meter.end(MIB, 200 * MS)
    assert meter.average == pytest.approx(10 * MIB, rel=1e-6)


def test_idle_time_does_not_count(probes):
    meter = probes.throttle.Meter(5 * MIB, 100 * MS)
    for start in range(0, 1000, 100):
        meter.begin(start * S)
        assert not meter.end(MIB, start * S + 50 * MS)
    assert meter.average == pytest.approx(20 * MIB, rel=1e-6)


def test_several_in_flight_share_the_time(probes):
    meter = probes.throttle.Meter(5 * MIB, 100 * MS)
    for at in range(10):
        meter.begin(at)
    for at in range(9):
        assert not meter.end(MIB, 50 * MS + at)
    assert not meter.end(MIB, 101 * MS)
    assert meter.average == pytest.approx(10 * MIB * 1000 / 101, rel=1e-6)


def test_the_average_moves_slowly_and_falls_below_the_minimum(probes):
    meter = probes.throttle.Meter(5 * MIB, 100 * MS)
    now, verdicts = 0, []
    for rate in [10 * MIB] + [MIB] * 10:
        meter.begin(now)
        now += 100 * MS
        verdicts.append(meter.end(rate // 10, now))
    assert verdicts.index(True) == 4  # 10, 8.2, 6.76, 5.6, 4.69
    meter.forget(now)
    assert meter.average == 0


def test_no_minimum_is_never_missed(probes):
    meter = probes.throttle.Meter(0, MS)
    meter.begin(0)
    assert not meter.end(0, S)


def test_pauses_are_drawn_every_other_time_and_spread(probes):
    dice = probes.throttle.Random(12345)
    drawn = [dice.pause(30_000 * MS) for _ in range(10_000)]
    pauses = [one for one in drawn if one]
    assert 0.47 < len(pauses) / len(drawn) < 0.53
    assert max(pauses) <= 30_000 * MS
    assert 14_000 < sum(pauses) / len(pauses) / MS < 16_000
    assert all(dice.pause(0) == 0 for _ in range(100))


def test_seeds_give_sequences(probes):
    one, same, other = (probes.throttle.Random(seed) for seed in (7, 7, 9))
    first = [one.number() for _ in range(10)]
    assert first == [same.number() for _ in range(10)]
    assert first != [other.number() for _ in range(10)]
    assert len(set(first)) == 10


def test_a_pause_that_is_spread_stays_near_to_what_it_is_to_be(probes):
    one, other = probes.throttle.Random(7), probes.throttle.Random(8)
    drawn = [one.about(100 * MS) for _ in range(1000)]
    assert 75 * MS <= min(drawn) < 77 * MS
    assert 123 * MS < max(drawn) <= 125 * MS
    assert [other.about(100 * MS) for _ in range(9)] != drawn[:9]
    again = probes.throttle.Random(7)
    assert [again.about(100 * MS) for _ in range(9)] == drawn[:9], "a simulation is the same again"
