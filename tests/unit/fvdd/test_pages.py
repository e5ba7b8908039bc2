# SPDX-License-Identifier: Apache-2.0
"""Metrics of statistics pages: sums of entries, states as sets, times as ages."""

import math

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fvdd.metrics.exposition import Exposition
from fvdd.metrics.names import PREFETCH_STATES
from fvdd.metrics.pages import prefetch_eta, seconds_since, write_pages
from fvdengine.stats import Histogram, Stats

NOW = 100 * 10**9
WALL = 1_800_000_000.0


def samples(page):
    out = Exposition()
    write_pages(out, [("nbd0", page)], NOW, WALL)
    return {
        (sample.name, tuple(v for k, v in sorted(sample.labels.items()) if k != "device")): (
            sample.value
        )
        for family in text_string_to_metric_families(out.text())
        for sample in family.samples
    }


def duration(*placed, total=0):
    buckets = [0] * 48
    for k in placed:
        buckets[k] += 1
    return Histogram(tuple(buckets), total)


def test_requests_of_the_base_that_failed_are_not_also_good_ones():
    found = samples(Stats(counters={"base_requests_demand": 5, "base_errors_demand": 2}))
    assert found["fvd_base_requests_total", ("ok", "demand")] == 3
    assert found["fvd_base_requests_total", ("error", "demand")] == 2
    assert ("fvd_base_requests_total", ("ok", "cow")) not in found


def test_reads_of_all_sources_are_one_operation():
    found = samples(
        Stats(
            histograms={
                "read_duration_image": duration(13, 13, total=20_000),
                "read_duration_base": duration(25, total=5 * 10**7),
                "io_duration_write": duration(14, total=30_000),
            }
        )
    )
    name = "fvd_io_request_duration_seconds"
    assert found[f"{name}_count", ("read",)] == 3
    assert found[f"{name}_count", ("write",)] == 1
    assert found[f"{name}_sum", ("read",)] == pytest.approx(0.05002)
    assert found["fvd_read_duration_seconds_count", ("image",)] == 2
    assert found["fvd_read_duration_seconds_count", ("base",)] == 1


def test_prefetch_has_exactly_one_state():
    for number, state in enumerate(PREFETCH_STATES):
        found = samples(Stats(gauges={"prefetch_state": number}))
        states = {key[1][0]: value for key, value in found.items() if key[0].endswith("_state")}
        assert states == {word: int(word == state) for word in PREFETCH_STATES}


@pytest.mark.parametrize(
    ("state", "rate", "left", "eta"),
    [(2, 50, 100, 2.0), (2, 0, 100, None), (3, 50, 100, None), (4, 0, 0, 0.0), (99, 5, 5, None)],
)
def test_estimate_of_prefetch(state, rate, left, eta):
    page = Stats(gauges={"prefetch_state": state, "prefetch_rate": rate, "base_bytes_left": left})
    assert prefetch_eta(page) == eta
    shown = samples(page)["fvd_prefetch_eta_seconds", ()]
    assert math.isnan(shown) if eta is None else shown == eta


def test_a_pause_counts_while_it_lasts():
    found = samples(
        Stats(
            counters={"prefetch_paused_ns": 2 * 10**9},
            times={"prefetch_paused_since": NOW - 5 * 10**8},
        )
    )
    assert found["fvd_prefetch_paused_seconds_total", ()] == 2.5


def test_pending_is_told_in_records_and_bytes_and_never_below_zero():
    gauges = {"pending_blocks": 3, "block_bytes": 65536}
    found = samples(Stats(gauges=gauges))
    assert found["fvd_journal_pending_records", ()] == 3
    assert found["fvd_journal_pending_bytes", ()] == 3 * 65536
    found = samples(Stats(gauges=gauges | {"pending_blocks": -1}))
    assert found["fvd_journal_pending_records", ()] == found["fvd_journal_pending_bytes", ()] == 0


@pytest.mark.parametrize(
    ("times", "up"),
    [({}, 1), ({"base_ok": 5}, 1), ({"base_ok": 5, "base_error": 6}, 0), ({"base_error": 1}, 0),
     ({"base_ok": 7, "base_error": 6}, 1)],
)  # fmt: skip
def test_the_base_is_as_its_last_answer(times, up):
    found = samples(Stats(gauges={"base_bytes_left": 1}, times=times))
    assert found["fvd_base_up", ()] == up


def test_a_device_without_base_has_no_word_about_one():
    found = samples(Stats(gauges={"base_bytes_left": 0}))
    assert ("fvd_base_up", ()) not in found
    assert ("fvd_base_last_success_timestamp_seconds", ()) not in found


def test_ages_and_timestamps():
    times = {"busy_since": NOW - 31 * 10**9, "base_ok": NOW - 10**9, "prefetch_done": NOW}
    found = samples(Stats(gauges={"base_bytes_left": 0}, times=times))
    assert found["fvd_io_oldest_inflight_seconds", ()] == 31.0
    assert found["fvd_base_last_success_timestamp_seconds", ()] == WALL - 1
    assert found["fvd_prefetch_completed_timestamp_seconds", ()] == WALL
    assert samples(Stats())["fvd_io_oldest_inflight_seconds", ()] == 0
    assert seconds_since(Stats(times={"x": NOW + 5}), "x", NOW) == 0
