# SPDX-License-Identifier: Apache-2.0
"""Metrics cost at most two instructions more in a hundred, scrapes included."""

import pytest

from fvdtest import cost

MORE_MAX = 0.02
CHAIN_MAX = 1.1


def test_what_is_taken_out_stands_in_the_source_once():
    for name, old, _ in cost.WITHOUT:
        assert (cost.ENGINE / name).read_text().count(old) == 1, (name, old)


@pytest.mark.proof
def test_metrics_cost_little(tmp_path, record_property):
    found = cost.measure(tmp_path)
    record_property("cost", found.text())
    print(found.text())
    assert 0 < found.more <= MORE_MAX


@pytest.mark.proof
def test_a_read_of_a_long_chain_costs_what_one_of_a_short_chain_costs(tmp_path, record_property):
    short, long = cost.measure_chains(tmp_path, 2, 11)
    record_property("short", f"{short:.0f}")
    record_property("long", f"{long:.0f}")
    print(f"{short:.0f} instructions a request over one lower image, {long:.0f} over ten")
    assert long <= CHAIN_MAX * short
