# SPDX-License-Identifier: Apache-2.0
"""Requests through the crew: what is counted, widened reads, order of overlapping changes."""

import os
import socket
import struct

import pytest

from fvdcore import EngineFault
from fvdtest import nbd_client as nbd
from fvdtest.nbd_client import NbdClient

BLOCK = 4096
SIZE = 256 * BLOCK
BASE = os.urandom(SIZE)


@pytest.fixture
def count(probes):
    slots = probes.plain.slots()
    return lambda device, name: device.counter(slots[name])


@pytest.fixture
def buckets(probes):
    slots, width = probes.plain.slots(), probes.plain.page_shape()[2]
    return lambda device, name: sum(
        device.counter(slots[name] + bucket) for bucket in range(width))  # fmt: skip


def connected(device):
    mine, theirs = socket.socketpair()
    mine.settimeout(20)
    device.serve(theirs.detach())
    return NbdClient(mine)


def test_each_request_is_counted_once(clone, count, buckets):
    device = clone(BASE).open()
    device.read(0, 5000)
    device.write(0, b"x" * 300)
    device.flush()
    device.trim(0, 8192)
    device.write_zeroes(100, 700)
    device.block_status(0, SIZE)
    for op in ("read", "write", "flush", "discard", "write_zeroes"):
        assert count(device, f"io_requests_{op}") == 1
        assert buckets(device, "read_duration_base" if op == "read" else f"io_duration_{op}") == 1
    moved = {"read": 5000, "write": 300, "discard": 8192, "write_zeroes": 700}
    for op, length in moved.items():
        assert count(device, f"io_bytes_{op}") == length


def test_errors_are_counted_by_kind(clone, count):
    one = clone(BASE)
    device = one.open()
    os.truncate(one.base_path, 0)
    with pytest.raises(EngineFault):
        device.read(0, 1)
    client = connected(device)
    for command, offset in ((nbd.CMD_READ, SIZE), (nbd.CMD_WRITE_ZEROES, SIZE)):
        client.send_request(command, offset, 1)
        assert client.read_answer().error
    client.close()
    assert count(device, "io_errors_read_base") == 1
    assert count(device, "io_errors_read_einval") == 1
    assert count(device, "io_errors_write_zeroes_enospc") == 1
    assert count(device, "io_bytes_read") == 0


@pytest.mark.parametrize("inline", [False, True])
def test_a_read_is_timed_under_where_its_data_came_from(clone, buckets, inline):
    device = clone(BASE).open()
    client = connected(device)
    read = client.read if inline else device.read
    device.write(0, bytes(BLOCK))
    read(0, BLOCK)
    read(BLOCK, BLOCK)
    read(0, 2 * BLOCK)
    client.close()
    assert buckets(device, "read_duration_image") == 1
    assert buckets(device, "read_duration_base") == 2
    assert buckets(device, "read_duration_zero") == 0


def test_with_copy_on_read_a_read_is_widened_to_whole_blocks(clone):
    device = clone(BASE, copy_on_read=True).open()
    assert device.read(BLOCK + 10, 20) == BASE[BLOCK + 10 : BLOCK + 30]
    assert device.read(5 * BLOCK - 1, 2) == BASE[5 * BLOCK - 1 : 5 * BLOCK + 1]
    local = [kind for length, kind in device.block_status(0, SIZE) for _ in range(length // BLOCK)]
    assert [n for n, kind in enumerate(local) if kind == "data"] == [1, 4, 5]


def test_a_read_succeeds_though_its_neighbourhood_does_not(clone):
    one = clone(BASE, copy_on_read=True)
    device = one.open()
    os.truncate(one.base_path, 8 * BLOCK + 100)
    assert device.read(8 * BLOCK + 50, 50) == BASE[8 * BLOCK + 50 : 8 * BLOCK + 100]
    with pytest.raises(EngineFault):
        device.read(8 * BLOCK + 50, 51)


def test_copy_on_read_can_be_set_at_open(clone):
    one = clone(BASE, copy_on_read=True)
    device = one.open(copy_on_read=False)
    device.read(0, SIZE)
    assert device.status()["base_bytes_left"] == SIZE
    one.close()
    again = one.open(copy_on_read=True)
    again.read(0, SIZE)
    assert again.status()["base_bytes_left"] == 0


def test_overlapping_changes_of_a_connection_are_made_in_their_order(clone, wait_until):
    """A kernel may re-send what it gave up: an older write must not come after a newer one."""
    device = clone(BASE).open(crew_threads=8)
    client = connected(device)
    for turn in range(60):
        wire = b""
        for cookie in range(4):
            payload = bytes([turn * 4 + cookie]) * 3000
            flags = nbd.FLAG_FUA if cookie % 2 == 0 else 0
            wire += struct.pack(">IHHQQI", nbd.REQUEST_MAGIC, flags, nbd.CMD_WRITE, cookie,
                                turn * 4000 + cookie * 10, 3000) + payload  # fmt: skip
        client.send(wire)
        assert all(client.read_answer().error == 0 for _ in range(4))
        seen = client.read(turn * 4000, 3030)
        assert seen == b"".join(
            bytes([turn * 4 + cookie]) * (3000 if cookie == 3 else 10) for cookie in range(4))
    client.close()


def test_a_device_ends_with_no_request_in_flight(clone, task):
    device = clone(BASE).open(crew_threads=1)
    readers = [task(device.read, 0, SIZE) for _ in range(12)]
    assert all(reader.result() == BASE for reader in readers)
    assert device.status()["in_flight"] == 0
