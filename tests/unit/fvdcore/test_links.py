# SPDX-License-Identifier: Apache-2.0
"""Connections come and go: more ends than are remembered, places used again, shutting down."""

import socket

import pytest

from fvdtest.nbd_client import NbdClient


@pytest.fixture
def device(clone):
    return clone(bytes(65536)).open(crew_threads=1)


def test_places_are_used_again_and_the_oldest_ends_are_told(device, wait_until):
    """300 ends without a look at the events: 256 are kept, none is invented."""
    for _ in range(300):
        mine, theirs = socket.socketpair()
        device.serve(theirs.detach())
        mine.close()
        wait_until(lambda: device.connections() == [], "its end")
    events = device.take_events()
    assert events == [("connection_closed", number) for number in range(1, 257)]
    assert device.take_events() == []


def test_a_drain_that_a_client_holds_up_says_so(device):
    """The client never reads what it asked for."""
    mine, theirs = socket.socketpair()
    mine.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    device.serve(theirs.detach())
    client = NbdClient(mine)
    for _ in range(400):
        client.send_request(0, 0, 65536)
    assert device.drain(0.05) is False
    assert device.status()["connections"] == 1
    client.close()
    assert device.drain(10) is True


def test_abandoning_ends_connections_at_once(device):
    ends = []
    for _ in range(5):
        mine, theirs = socket.socketpair()
        mine.settimeout(10)
        device.serve(theirs.detach())
        ends.append(mine)
    device.abandon()
    for end in ends:
        assert end.recv(1) == b""
        end.close()
