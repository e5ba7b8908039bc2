# SPDX-License-Identifier: Apache-2.0
"""Packets with descriptors between two channels, and what is not a packet."""

from __future__ import annotations

import array
import asyncio
import os
import socket
from collections.abc import Awaitable, Callable

import pytest

from fvdd.worker.channel import (
    DESCRIPTORS_MAX,
    PACKET_LENGTH_MAX,
    Channel,
    ChannelError,
)


def drive(scenario: Callable[[Channel, Channel, socket.socket], Awaitable[None]]) -> None:
    """Run a scenario with two connected channels and the raw socket of the first."""

    async def bounded() -> None:
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        async with asyncio.timeout(10):
            try:
                await scenario(Channel(left), Channel(right), left)
            finally:
                left.close()
                right.close()

    asyncio.run(bounded())


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_messages_arrive_whole_and_in_order() -> None:
    async def scenario(left: Channel, right: Channel, raw: socket.socket) -> None:
        for number in range(50):
            await left.send({"id": number, "text": "ü" * number})
        for number in range(50):
            assert await right.receive() == ({"id": number, "text": "ü" * number}, [])

    drive(scenario)


def test_descriptors_arrive_with_their_message_and_are_not_inherited() -> None:
    async def scenario(left: Channel, right: Channel, raw: socket.socket) -> None:
        read_end, write_end = os.pipe()
        await left.send({"op": "serve"}, [read_end, write_end])
        packet = await right.receive()
        assert packet is not None
        message, received = packet
        assert message == {"op": "serve"}
        assert len(received) == 2
        assert not any(os.get_inheritable(descriptor) for descriptor in received)
        os.write(received[1], b"through")
        assert os.read(read_end, 10) == b"through"
        for descriptor in (read_end, write_end, *received):
            os.close(descriptor)

    drive(scenario)


def test_receiver_waits_for_a_late_sender() -> None:
    async def scenario(left: Channel, right: Channel, raw: socket.socket) -> None:
        waiting = asyncio.create_task(right.receive())
        await asyncio.sleep(0)
        assert not waiting.done()
        await left.send({"late": True})
        assert await waiting == ({"late": True}, [])

    drive(scenario)


def test_sender_waits_for_a_slow_receiver() -> None:
    async def scenario(left: Channel, right: Channel, raw: socket.socket) -> None:
        text = "x" * 50_000
        sending = [asyncio.create_task(left.send({"id": i, "text": text})) for i in range(40)]
        await asyncio.sleep(0)
        assert not all(task.done() for task in sending)
        for number in range(40):
            packet = await right.receive()
            assert packet is not None
            assert packet[0]["id"] == number
        await asyncio.gather(*sending)

    drive(scenario)


@pytest.mark.parametrize("way", ["close", "shutdown"])
def test_end_of_the_other_side_is_none(way: str) -> None:
    async def scenario(left: Channel, right: Channel, raw: socket.socket) -> None:
        if way == "close":
            left.close()
        else:
            raw.shutdown(socket.SHUT_WR)
        assert await right.receive() is None

    drive(scenario)


def test_sending_to_nobody_is_an_error() -> None:
    async def scenario(left: Channel, right: Channel, raw: socket.socket) -> None:
        right.close()
        with pytest.raises(OSError, match="Broken pipe"):
            await left.send({"id": 1})

    drive(scenario)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"not json", id="no json"),
        pytest.param(b"[1, 2]", id="no object"),
        pytest.param(b'{"a": "\xff"}', id="no utf-8"),
        pytest.param(b'{"a": "' + b"x" * PACKET_LENGTH_MAX + b'"}', id="too long"),
    ],
)
def test_bad_packets_are_refused_and_their_descriptors_closed(data: bytes) -> None:
    async def scenario(left: Channel, right: Channel, raw: socket.socket) -> None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        rights = array.array("i", [raw.fileno()])
        before = open_descriptors()
        raw.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        with pytest.raises(ChannelError):
            await right.receive()
        assert open_descriptors() == before

    drive(scenario)


def test_too_many_descriptors_are_refused_and_closed() -> None:
    async def scenario(left: Channel, right: Channel, raw: socket.socket) -> None:
        rights = array.array("i", [raw.fileno()] * (DESCRIPTORS_MAX + 9))
        before = open_descriptors()
        raw.sendmsg([b"{}"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        with pytest.raises(ChannelError):
            await right.receive()
        assert open_descriptors() == before
        with pytest.raises(ChannelError):
            await left.send({}, list(rights))

    drive(scenario)
