# SPDX-License-Identifier: Apache-2.0
"""The stream of events: what is logged about devices, to everyone who listens, and it ends."""

import asyncio
import json
import logging
import os

import pytest

from fvdd.events import KEPT_MAX, KINDS_MAX, WAITING_MAX, EventHub, stream
from fvdd.log import fields

log = logging.getLogger("fvdd.devices.something")


@pytest.fixture
def hub():
    made = EventHub()
    yield made
    made.close()


def data(text):
    return json.loads(text.removeprefix("data: ")) if text.startswith("data: ") else None


async def texts(hub, count, *, past=False):
    found = []
    async for text in stream(hub, past=past):
        found.append(text)
        if len(found) == count:
            break
    return found


def test_requests_that_fail_do_not_drive_changes_of_state_out(hub):
    log.error("device state", extra=fields(name="web", state="failed"))
    for number in range(3 * KEPT_MAX):
        log.error("a request failed", extra=fields(name="web", offset=number))
    log.info("device state", extra=fields(name="web", state="recovering"))
    told = [event["message"] for event in hub.past]
    assert told == ["device state", *["a request failed"] * KEPT_MAX, "device state"]
    assert hub.past[1]["values"] == {"offset": str(2 * KEPT_MAX)}


def test_texts_that_are_never_the_same_are_kept_in_bounds(hub):
    for number in range(2 * KINDS_MAX):
        log.error(f"text {number}", extra=fields(name="web"))  # noqa: G004
    assert [event["message"] for event in hub.past] == [f"text {n}" for n in range(2 * KINDS_MAX)]
    assert len(hub._kept) <= KINDS_MAX + 1


def test_what_is_logged_about_devices_is_an_event(hub):
    log.warning("device state", extra=fields(name="web", previous="attached", state="failed"))
    logging.getLogger("fvdd.api").warning("something else")
    (event,) = hub.past
    assert (event["level"], event["name"], event["message"]) == ("warning", "web", "device state")
    assert event["values"] == {"previous": "attached", "state": "failed"}


def test_names_that_are_no_text_can_be_sent(hub):
    name = os.fsdecode(b"w\xe9b.fvd")
    log.info("opened %s", name, extra=fields(name="web", image=name))
    (event,) = hub.past
    assert (event["message"], event["values"]) == ("opened w\ufffdb.fvd", {"image": "w\ufffdb.fvd"})


def test_every_listener_hears_what_comes_and_then_the_end(hub):
    async def run():
        first = asyncio.create_task(texts(hub, 9))
        second = asyncio.create_task(texts(hub, 9, past=True))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        log.info("now", extra=fields(name="web"))
        hub.close()
        return await asyncio.wait_for(asyncio.gather(first, second), 10)

    log.info("before", extra=fields(name="web"))
    first, second = asyncio.run(run())
    assert [data(text)["message"] for text in first if data(text)] == ["now"]
    assert [data(text)["message"] for text in second if data(text)] == ["before", "now"]


def test_a_listener_that_sleeps_loses_the_oldest_and_holds_nobody_up(hub):
    async def run():
        queue = hub.listen()
        for number in range(WAITING_MAX + 5):
            log.info("%d", number)
        await asyncio.sleep(0)
        return queue.qsize(), queue.get_nowait()["message"]

    assert asyncio.run(run()) == (WAITING_MAX, "5")


def test_the_past_has_a_bound(hub):
    for number in range(KEPT_MAX + 3):
        log.info("%d", number)
    assert len(hub.past) == KEPT_MAX
    assert hub.past[0]["message"] == "3"
