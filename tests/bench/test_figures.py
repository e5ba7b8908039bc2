# SPDX-License-Identifier: Apache-2.0
"""Ratios are of runs of one round, medians of them; a target is held against the worst peer."""

from dataclasses import replace

import pytest

from fvdtest.bench import figures
from fvdtest.bench.figures import Row, Run


def run(server, round_, value, cpu=1.0):
    return Run("job", server, round_, value, cpu, 1000, 0.5)


def row(**changed):
    base = Row("job", "a", "b", 1, 1, ratio=2.0, low=1, high=3, cpu_us=1, cpu_ratio=0.5, pairs=3)
    return replace(base, **changed)


def test_ratio_is_the_median_of_pairs_not_the_ratio_of_medians():
    ours = [run("a", 0, 10), run("a", 1, 100), run("a", 2, 30)]
    theirs = [run("b", 0, 1), run("b", 1, 50), run("b", 2, 10)]
    found = figures.compare([*ours, *theirs], "job", "a", "b")
    assert (found.ratio, found.low, found.high, found.pairs) == (3.0, 2.0, 10.0, 3)
    assert (found.value, found.peer_value) == (30, 10)


def test_only_rounds_that_both_took_part_in_count():
    found = figures.compare([run("a", 0, 4), run("a", 1, 9), run("b", 0, 2)], "job", "a", "b")
    assert (found.ratio, found.pairs) == (2.0, 1)


def test_no_common_round_is_no_row():
    assert figures.compare([run("a", 0, 4), run("b", 1, 2)], "job", "a", "b") is None


def test_processor_time_is_compared_in_pairs_too():
    runs = [run("a", 0, 1, cpu=2), run("b", 0, 1, cpu=8), run("a", 1, 1, 3), run("b", 1, 1, 4)]
    assert figures.compare(runs, "job", "a", "b").cpu_ratio == pytest.approx(0.5)


def test_peer_that_measured_nothing_makes_no_infinity():
    assert figures.ratio_of(1.0, 0.0) == 0.0


def test_worst_of_the_named_peers_counts():
    rows = [row(peer="x", ratio=1.2), row(peer="y", ratio=0.9), row(peer="z", ratio=0.5)]
    assert figures.fastest(rows, ["x", "y"]).peer == "y"
    assert figures.fastest(rows, ["w"]) is None


def test_where_only_processor_time_counts_the_leanest_peer_does():
    rows = [row(peer="x", cpu_ratio=0.5), row(peer="y", cpu_ratio=0.9)]
    assert figures.leanest(rows, ["x", "y"]).peer == "y"
    assert figures.leanest(rows, []) is None


@pytest.mark.parametrize(
    ("changed", "met"),
    [
        ({}, None),
        ({"wanted": 2.0}, True),
        ({"wanted": 2.1}, False),
        ({"wanted": 1.0, "wanted_cpu": 0.4}, False),
        ({"wanted_cpu": 0.5}, True),
    ],
)
def test_row_is_met_only_when_all_its_targets_are(changed, met):
    assert row(**changed).met is met


def test_every_second_round_goes_backwards():
    assert figures.order_of(["a", "b", "c"], 0) == ["a", "b", "c"]
    assert figures.order_of(["a", "b", "c"], 1) == ["c", "b", "a"]
