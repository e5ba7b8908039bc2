# SPDX-License-Identifier: Apache-2.0
"""A client that never reads its replies holds up itself and nobody else."""

import os
import socket
import struct

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


def test_a_stalled_client_with_a_few_requests_blocks_no_other(clone, wait_until):
    device = clone(BASE).open(crew_threads=2)
    stalled = connected(device, 10)
    other = connected(device, 10)
    stall(stalled, 20, 4 * MIB)
    wait_until(lambda: device.status()["in_flight"] >= 15, "requests to pile up")
    other.flush()
    other.write(0, b"x" * 100, fua=True)
    assert other.read(0, 100) == b"x" * 100
    stalled.close()
    other.close()


def test_a_stalled_client_cannot_take_all_requests(clone, wait_until):
    """128 requests are all that a device has: one connection must not hold them all."""
    device = clone(BASE).open(crew_threads=2)
    stalled = connected(device, 10)
    other = connected(device, 5)
    stall(stalled, 300, 4 * MIB)
    settled = []

    def full():
        settled.append(device.status()["in_flight"])
        return len(settled) > 50 and len(set(settled[-50:])) == 1

    try:
        wait_until(full, "the stalled client to hold what it can")
        other.flush()
    finally:
        stalled.close()
        other.close()
