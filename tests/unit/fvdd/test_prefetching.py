# SPDX-License-Identifier: Apache-2.0
"""A budget is shared by those that copy; rates become fields of the header."""

import asyncio

import pytest
from pydantic import ValidationError

from fvdapi.errors import ApiError
from fvdapi.models import DeviceStatus, PrefetchRequest, PrefetchStatus
from fvdd.devices import prefetching
from fvdd.devices.prefetching import BudgetSharing, rate_fields
from fvdd.devices.session import PREFETCH_JITTER
from fvdd.worker.opened import OpenedImage, OpenRequest
from fvdengine.create import create_image
from fvdengine.options import CreateOptions

TIMES = {"resend_timeout": 2, "base_timeout": 60, "kernel_timeout": 0, "dead_timeout": 100}


class Device:
    def __init__(self, name, state="running"):
        self.name, self.state, self.pid = name, state, 1
        self.told = []
        self.fails = False

    async def status(self):
        return DeviceStatus(
            name=self.name, device=None, image="/i", state="attached", read_only=False,
            timeouts=TIMES, worker_pid=self.pid, prefetch=PrefetchStatus(state=self.state),
        )  # fmt: skip

    async def set_budget(self, rate):
        if self.fails:
            raise ApiError("worker_gone", "it has gone")
        self.told.append(rate)


def share(budget, *devices, times=1):
    sharing = BudgetSharing(budget, lambda: devices)
    for _ in range(times):
        asyncio.run(sharing.share())
    return sharing


def test_those_that_copy_share_evenly_and_are_told_once():
    one, two, idle = Device("a"), Device("b"), Device("c", "done")
    share(1000, one, two, idle, times=3)
    assert (one.told, two.told, idle.told) == ([500], [500], [])


def test_a_look_that_fails_is_not_the_last(monkeypatch):
    monkeypatch.setattr(prefetching, "SHARE_PERIOD_SECONDS", 0)
    device, looks = Device("a"), []

    def devices():
        looks.append(0)
        if len(looks) == 1:
            raise ValueError("a defect")
        return [device]

    async def run():
        sharing = asyncio.create_task(BudgetSharing(1000, devices).run())
        while not device.told and not sharing.done():
            await asyncio.sleep(0)
        sharing.cancel()

    asyncio.run(run())
    assert device.told == [1000]


def test_parts_follow_what_the_others_do():
    one, two = Device("a"), Device("b")
    sharing = share(1000, one, two)
    two.state = "done"
    asyncio.run(sharing.share())
    assert one.told == [500, 1000]


def test_a_successor_is_told_again():
    one, two = Device("a"), Device("b")
    sharing = share(1000, one, two)
    one.pid = 2
    asyncio.run(sharing.share())
    assert (one.told, two.told) == ([500, 500], [500])


def test_who_could_not_be_told_is_told_later():
    one = Device("a")
    one.fails = True
    sharing = share(1000, one)
    one.fails = False
    asyncio.run(sharing.share())
    assert one.told == [1000]


def test_no_part_is_nothing():
    devices = [Device(str(number)) for number in range(5)]
    share(3, *devices)
    assert [device.told for device in devices] == [[1]] * 5


def test_without_a_budget_nobody_is_asked():
    asyncio.run(BudgetSharing(0, lambda: pytest.fail("asked")).run())


@pytest.mark.parametrize(
    ("least", "most", "expected"),
    [
        (2048, None, {"min": "2"}), (None, 1, {"max": "1"}),
        (0, 0, {"min": "0", "max": "1000000000"}), (1025, 20 << 20, {"min": "2", "max": "20480"}),
    ],
)  # fmt: skip
def test_rates_become_fields_of_both_ways(least, most, expected):
    request = PrefetchRequest(action="rate", min_bytes_per_second=least, max_bytes_per_second=most)
    assert rate_fields(request) == {
        f"prefetch_{bound}_{way}_throughput": value
        for bound, value in expected.items() for way in ("read", "write")
    }  # fmt: skip


@pytest.mark.parametrize(
    "request_",
    [
        {"action": "rate"}, {"action": "policy"}, {"action": "start", "policy": "eager"},
        {"action": "pause", "min_bytes_per_second": 1}, {"action": "policy", "policy": "rude"},
        {"action": "rate", "max_bytes_per_second": -1}, {"action": "stop"},
    ],
)  # fmt: skip
def test_requests_that_make_no_sense_are_refused(request_):
    with pytest.raises(ValidationError):
        PrefetchRequest(**request_)


@pytest.mark.parametrize(("delay", "most"), [(100, 125), (0, 0), (-1, -1), (10**8, 10**8 + 900)])
def test_clones_opened_together_do_not_start_together(monkeypatch, tmp_path, delay, most):
    """A start delay becomes longer by chance; "at once" and "off" stay what they are."""
    (tmp_path / "base").write_bytes(bytes(65536))
    create_image(tmp_path / "c.fvd", CreateOptions(base=str(tmp_path / "base")))
    seen = []

    def spy(plan, *, prefetch_delay, **_options):
        seen.append(prefetch_delay)
        raise OSError("far enough")

    monkeypatch.setattr("fvdd.worker.opened.open_device", spy)
    request = OpenRequest(
        str(tmp_path / "c.fvd"), prefetch_delay=delay, prefetch_jitter=PREFETCH_JITTER
    )
    for _ in range(40):
        with pytest.raises(OSError, match="far enough"):
            OpenedImage.open(request)
    assert min(seen) >= delay
    assert max(seen) <= most
    assert (len(set(seen)) > 1) == (most > delay)
