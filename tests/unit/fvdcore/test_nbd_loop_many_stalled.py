# SPDX-License-Identifier: Apache-2.0
"""Several clients that never read their replies together hold up nobody else either."""

import os
import socket
import struct

import pytest

from fvdtest import nbd_client as nbd
from fvdtest.nbd_client import NbdClient

MIB = 1 << 20
BASE = os.urandom(4 * MIB)


def connected(device, limit):
    mine, theirs = socket.socketpair()
    mine.settimeout(limit)
    device.serve(theirs.detach())
    return NbdClient(mine)


def stall(client, count, length):
    """Ask for more than any socket buffers and read nothing."""
    client.send(b"".join(
        struct.pack(">IHHQQI", nbd.REQUEST_MAGIC, 0, nbd.CMD_READ, n, 0, length)
        for n in range(count)))  # fmt: skip


@pytest.mark.parametrize(("clients", "crew"), [(4, 8), (2, 2)], ids=["requests", "crew"])
def test_stalled_clients_together_block_no_other(clone, wait_until, clients, crew):
    """Their shares must not add up to all requests, nor their sends take every crew thread."""
    device = clone(BASE).open(crew_threads=crew)
    stalled = [connected(device, 10) for _ in range(clients)]
    other = connected(device, 5)
    for client in stalled:
        stall(client, 300, 4 * MIB)
    seen = []

    def full():
        seen.append(device.status()["in_flight"])
        return len(seen) > 200 and len(set(seen[-200:])) == 1

    try:
        wait_until(full, "the stalled clients to hold what they can")
        other.flush()
    finally:
        for client in [*stalled, other]:
            client.close()
