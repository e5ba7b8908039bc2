# SPDX-License-Identifier: Apache-2.0
"""Maps are made one at a time, and shared by those who wait for the same."""

import asyncio

import pytest

from fvdapi.errors import ApiError
from fvdd.devices.maps import OBSERVED_MAX, Maps


class Worker:
    """Answers when it is let; says how much it was asked."""

    def __init__(self):
        self.asked = []
        self.at_once = self.most = 0
        self.may_answer = asyncio.Event()

    async def ask(self, cells):
        self.asked.append(cells)
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            await self.may_answer.wait()
            if cells == 13:
                raise ApiError("worker_failed", "gone")
            return {"cells": cells, "number": len(self.asked)}
        finally:
            self.at_once -= 1


async def settle():
    for _ in range(10):
        await asyncio.sleep(0)


def test_one_at_a_time_and_those_that_wait_for_the_same_share_it():
    async def run():
        worker = Worker()
        maps = Maps(worker.ask)
        first = asyncio.create_task(maps.map(8))
        await settle()
        rest = [asyncio.create_task(maps.map(8, is_observed=True)) for _ in range(100)]
        await settle()
        assert worker.asked == [8]
        rest[0].cancel()  # the others share what it asked for
        worker.may_answer.set()
        assert (await first)["number"] == 1  # begun before the rest asked
        assert {(await one)["number"] for one in rest[1:]} == {2}
        assert (worker.asked, worker.most) == ([8, 8], 1)

    asyncio.run(run())


def test_few_different_ones_wait_for_observers_and_all_for_the_owner():
    async def run():
        worker = Worker()
        maps = Maps(worker.ask)
        tasks = [asyncio.create_task(maps.map(1, is_observed=True))]
        await settle()
        tasks += [
            asyncio.create_task(maps.map(10 + n, is_observed=True)) for n in range(OBSERVED_MAX)
        ]
        await settle()
        with pytest.raises(ApiError) as caught:
            await maps.map(99, is_observed=True)
        assert (caught.value.code, caught.value.http_status) == ("map_busy", 503)
        own = asyncio.create_task(maps.map(99))
        worker.may_answer.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(one, ApiError) for one in found] == [False] * 4 + [True]
        assert (await own)["cells"] == 99
        assert worker.most == 1
        assert (await maps.map(8, is_observed=True))["cells"] == 8

    asyncio.run(run())


def test_failure_that_nobody_waits_for_is_silent(caplog):
    async def run():
        worker = Worker()
        worker.may_answer.set()
        maps = Maps(worker.ask)
        asker = asyncio.create_task(maps.map(13))
        await asyncio.sleep(0)
        asker.cancel()
        await settle()
        assert (await maps.map(8))["number"] == 2

    asyncio.run(run())
    assert not caplog.records
