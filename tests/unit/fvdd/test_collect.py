# SPDX-License-Identifier: Apache-2.0
"""Turning the engine's powers of two into classic buckets."""

import pytest

from fvdd.metrics.collect import BUCKET_FIRST, BUCKET_LAST, classic_buckets
from fvdd.metrics.names import COUNTERS, GAUGES, HISTOGRAMS


def _cumulative(*placed: int) -> dict[str, float]:
    buckets = [0] * 48
    for k in placed:
        buckets[k] += 1
    return dict(classic_buckets(buckets))


def test_bounds_are_the_ends_of_the_buckets_in_seconds():
    bounds = [float(bound) for bound, _ in classic_buckets([0] * 48)]
    assert bounds[0] == 2 ** (BUCKET_FIRST + 1) / 1e9
    assert bounds[-2] == 2 ** (BUCKET_LAST + 1) / 1e9
    assert bounds[-1] == float("inf")
    assert bounds == sorted(bounds)


@pytest.mark.parametrize("k", [0, BUCKET_FIRST, 20, BUCKET_LAST])
def test_a_duration_is_below_its_bound_and_not_below_the_one_before(k):
    # Bucket k holds 2^k <= d < 2^(k+1) ns.
    found = _cumulative(k)
    for bound, count in found.items():
        assert count == (2 ** (k + 1) / 1e9 <= float(bound))


def test_what_is_longer_than_the_last_bound_counts_only_at_infinity():
    found = _cumulative(47)
    assert found.pop("+Inf") == 1
    assert set(found.values()) == {0}


def test_no_entry_is_used_twice_and_no_name_is_given_twice():
    for sources in (COUNTERS, GAUGES, HISTOGRAMS):
        entries = [entry for source in sources for entry in source.entries]
        assert len(entries) == len(set(entries))
    names = [source.name for source in (*COUNTERS, *GAUGES, *HISTOGRAMS)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("source", [*COUNTERS, *GAUGES, *HISTOGRAMS], ids=lambda s: s.name)
def test_label_values_fit_the_label_names(source):
    assert source.name.startswith("fvd_")
    assert source.help.endswith(".")
    assert all(len(values) == len(source.labels) for values in source.entries.values())
