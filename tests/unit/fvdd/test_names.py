# SPDX-License-Identifier: Apache-2.0
"""The table of metrics: complete, without doubles, and powers of two become classic buckets."""

import pytest

from fvdd.metrics.names import COMPUTED, COUNTERS, GAUGES, HISTOGRAMS, Source

ALL = [*COUNTERS, *GAUGES, *HISTOGRAMS]
SOURCE = Source("fvd_x", "X.", {"x": ()}, powers=(12, 36))


def cumulative(*placed):
    buckets = [0] * 48
    for k in placed:
        buckets[k] += 1
    found, total = {}, 0
    for bound, number in zip(SOURCE.bounds(), SOURCE.fold(buckets), strict=True):
        total += number
        found[bound] = total
    return found


def test_bounds_are_powers_of_two_of_nanoseconds_in_seconds():
    bounds = [float(bound) for bound in SOURCE.bounds()]
    assert bounds[0] == 2**12 / 1e9
    assert bounds[-2] == 2**36 / 1e9
    assert bounds[-1] == float("inf")
    assert bounds == sorted(bounds)


@pytest.mark.parametrize("k", [0, 11, 12, 20, 35])
def test_a_duration_is_below_its_bound_and_not_below_the_one_before(k):
    # Bucket k holds 2^k <= d < 2^(k+1) ns.
    for bound, count in cumulative(k).items():
        assert count == (2 ** (k + 1) / 1e9 <= float(bound))


@pytest.mark.parametrize("k", [36, 47])
def test_what_is_longer_than_the_last_bound_counts_only_at_infinity(k):
    found = cumulative(k)
    assert found.pop("+Inf") == 1
    assert set(found.values()) == {0}


def test_no_name_is_given_twice_and_no_counter_or_gauge_is_shown_twice():
    names = [source.name for source in ALL]
    assert len(names) == len(set(names))
    entries = [entry for source in (*COUNTERS, *GAUGES) for entry in source.entries]
    assert len(entries) == len(set(entries))
    assert not set(entries) & set(COMPUTED)


@pytest.mark.parametrize("source", ALL, ids=lambda source: source.name)
def test_names_helps_and_label_values_are_well_formed(source):
    assert source.name.startswith("fvd_")
    assert not source.name.endswith("_total")
    assert source.help.endswith(".")
    assert all(len(values) == len(source.labels) for values in source.entries.values())
