# SPDX-License-Identifier: Apache-2.0
"""What is wrong, in words: out of a statistics page and the last failures."""

import errno

import pytest

from fvdapi.models import DeviceState, PrefetchState
from fvdd.devices.rendering import prefetch_status
from fvdd.devices.troubles import (
    RECENT_SECONDS,
    SILENT_SECONDS,
    page_troubles,
    state_troubles,
)
from fvdengine.stats import Stats

SECOND = 10**9
NOW = 100_000 * SECOND
WRITE = {
    "operation": "write", "length": 4096, "offset": 8192, "meaning": "No space left on device",
    "file": "/srv/web.fvd",
}  # fmt: skip


def told(failures=(), *, gauges=(), counters=(), times=()):
    page = Stats(
        gauges=dict(gauges), counters=dict(counters),
        times={key: NOW - int(ago * SECOND) for key, ago in dict(times).items()},
    )  # fmt: skip
    return list(page_troubles(page, NOW, dict(failures), "web"))


def only(found):
    (one,) = found
    return one


def test_what_is_wrong_with_its_life_is_told_with_the_remedy():
    def of(state, reason=None, silent=0.0):
        return list(state_troubles(state, reason, silent, "web"))

    failed = only(of(DeviceState.FAILED, "it died"))
    assert failed.text == (
        "nobody serves it: it died. Remove the cause, then: fvdctl recover web"
    )
    assert failed.word == "FAILED"
    assert only(of(DeviceState.RECOVERING, "it died")).text.endswith("requests wait: it died")
    assert of(DeviceState.ATTACHED, None, SILENT_SECONDS) == []
    silent = only(of(DeviceState.ATTACHED, None, 7.0))
    assert (silent.topic, silent.word) == ("worker", "HANGS")
    assert silent.text == "it has not answered for 7s, and is replaced if it goes on"


def test_a_healthy_device_has_none():
    counters = {"io_requests_read": 9, "io_errors_read_einval": 3, "io_errors_write_eperm": 2}
    gauges = {"base_bytes_left": 5, "prefetch_state": 2}
    times = {"base_ok": 1, "base_error": 2, "busy_since": 3, "io_error": 1}
    assert told(gauges=gauges, counters=counters, times=times) == []


def test_a_base_that_is_not_needed_any_more_is_no_trouble():
    assert told(gauges={"base_bytes_left": 0}, times={"base_ok": 9, "base_error": 2}) == []


def test_a_base_that_fails_is_told_with_since_when_and_why():
    one = only(
        told(
            {"base": {"meaning": "Connection timed out", "length": 4096, "offset": 512}},
            gauges={"base_bytes_left": 5},
            times={"base_ok": 3725, "base_error": 4},
        )
    )  # fmt: skip
    assert (one.topic, one.word) == ("base", "NO BASE")
    assert one.text.startswith("the last read of the base failed: no good answer since 20")
    assert "1h02m ago" in one.text
    assert one.text.endswith("the last error 4s ago, of 4k at 512: Connection timed out")
    assert "the next read that it answers ends this" in one.text
    never = only(told(gauges={"base_bytes_left": 5}, times={"base_error": 75}))
    assert "no good answer since it was attached, the next" in never.text
    assert never.text.endswith("; the last error 1m15s ago")


def test_prefetch_says_what_it_waits_for():
    gauges = {"base_bytes_left": 5, "prefetch_state": 2}
    found = told(gauges=gauges, times={"base_error": 1})
    assert [one.topic for one in found] == ["base", "prefetch"]
    assert found[1].text == "waits for the base, and tries again by itself"


def test_prefetch_that_waits_for_the_base_tells_no_rate_and_no_end():
    """The worker still knows the rate of the time when the base answered."""
    said = {"prefetch_state": "running", "prefetch_rate": 1 << 20, "prefetch_eta": 4.0}
    gauges = {"base_bytes_left": 5, "prefetch_state": 2}
    down = Stats(gauges=gauges, times={"base_ok": 9, "base_error": 10})
    found = prefetch_status(said, down)
    assert (found.state, found.paused_reason) == (PrefetchState.WAITING, "base")
    assert (found.rate_bytes_per_second, found.eta_seconds) == (0, None)
    for page in (None, Stats(gauges=gauges, times={"base_ok": 10, "base_error": 9})):
        runs = prefetch_status(said, page)
        assert (runs.state, runs.paused_reason) == (PrefetchState.RUNNING, None)
        assert (runs.rate_bytes_per_second, runs.eta_seconds) == (1 << 20, 4.0)
    paused = prefetch_status({**said, "prefetch_state": "paused"}, down)
    assert (paused.state, paused.paused_reason) == (PrefetchState.PAUSED, "manual")


def test_prefetch_says_why_it_failed():
    full = only(told(gauges={"prefetch_state": 5}))
    assert (full.word, "storage of the image is full" in full.text) == ("FULL", True)
    fault, stopped = told(gauges={"prefetch_state": 5, "fault_errno": errno.EIO})
    assert (fault.word, stopped.text) == ("FAULT", "failed: the image has stopped")


def test_a_fault_is_told_with_its_remedy():
    one = only(told(gauges={"fault_errno": errno.EIO}))
    assert one.text.startswith("the image has stopped: Input/output error")
    assert "fvdctl recover web --discard-unflushed" in one.text
    cut = only(told(gauges={"fault_errno": errno.ENODATA}))
    assert "its file, or its data file, was made shorter by another program" in cut.text


def test_errors_are_counted_with_the_last_of_them():
    counters = {"io_errors_write_enospc": 2, "io_errors_read_base": 1, "io_errors_read_einval": 7}
    one = only(told({"request": WRITE}, counters=counters, times={"io_error": 12}))
    assert one.text == (
        "3 requests failed (1 read base, 2 write enospc), the last one 12s ago: write of 4k at "
        "8192: No space left on device, /srv/web.fvd"
    )
    assert one.word == "ERRORS"
    # fvdd has been started anew since: the numbers stand, the rest nobody knows.
    assert only(told(counters=counters, times={"io_error": 61})).text.endswith(
        "the last one 1m01s ago"
    )


@pytest.mark.parametrize(("ago", "word"), [(RECENT_SECONDS - 1, "ERRORS"), (RECENT_SECONDS, "")])
def test_errors_are_trouble_of_now_only_for_a_while(ago, word):
    assert only(told(counters={"io_errors_read_eio": 1}, times={"io_error": ago})).word == word


def test_what_waits_hangs_or_was_not_closed_is_told():
    assert only(told(gauges={"io_parked": 3})).text == "FULL: 3 writes wait for space"
    assert only(told(times={"busy_since": 31})).word == "HANGS"
    assert only(told(counters={"unclean_opens": 1})).word == ""
