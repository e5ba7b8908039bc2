# SPDX-License-Identifier: Apache-2.0
"""What a worker answers to those whom the end of its device overtakes."""

import asyncio
import os
import socket
import threading
from types import SimpleNamespace

import pytest

from fvdd.worker.channel import Channel
from fvdd.worker.service import WorkerService

LIMIT = 30.0


class Disk:
    """A device that is closed while somebody is about to ask it."""

    size = 1 << 20

    def __init__(self):
        self.event_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self.asked, self.closed, self.left = (threading.Event() for _ in range(3))

    def block_status(self, offset, length):
        self.asked.set()
        assert self.closed.wait(LIMIT)
        raise ValueError("the device is closed")

    def close(self):
        self.closed.set()
        assert self.left.wait(LIMIT)


@pytest.mark.parametrize("op", ["map", "extents"])
def test_what_is_asked_of_a_device_that_ends_is_no_fault(op, caplog):
    disk = Disk()

    async def scenario():
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        service = WorkerService(None)
        service._image = SimpleNamespace(device=disk, close=disk.close)
        running = asyncio.create_task(service.run(theirs))
        channel = Channel(ours)
        await channel.send({"id": 1, "op": op})
        assert await asyncio.to_thread(disk.asked.wait, LIMIT)
        await channel.send({"id": 2, "op": "stop"})
        answers = {}
        while len(answers) < 2:
            message, _ = await channel.receive()
            answers[message["id"]] = message
            disk.left.set()
        channel.close()
        assert await running == 0
        return answers

    async def bounded():
        async with asyncio.timeout(LIMIT):
            return await scenario()

    answers = asyncio.run(bounded())
    os.close(disk.event_fd)
    assert answers[2]["ok"]
    assert answers[1]["error"]["code"] == "not_open"
    assert not [one for one in caplog.records if one.exc_info]
