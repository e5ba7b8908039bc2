# SPDX-License-Identifier: Apache-2.0
"""Reads of what the page cache has of a base are answered without the crew, which copies later."""

import os
import random
import socket
import struct

import pytest

from fvdcore.device import Device
from fvdengine.stats import read_stats
from fvdtest import nbd_client as nbd
from fvdtest.nbd_client import NbdClient

BLOCK = 4096
BLOCKS = 1024
SIZE = BLOCKS * BLOCK
BASE = os.urandom(SIZE)


def connected(device, structured=False):
    mine, theirs = socket.socketpair()
    mine.settimeout(20)
    device.serve(theirs.detach(), structured=structured)
    client = NbdClient(mine)
    client.structured = structured
    return client


@pytest.fixture
def page():
    """A page of counters; page(name) is one of them."""
    fd = os.memfd_create("stats", os.MFD_CLOEXEC)
    os.ftruncate(fd, Device.stats_size())

    def counter(name):
        return read_stats(f"/proc/self/fd/{fd}").counters[name]

    counter.fd = fd
    yield counter
    os.close(fd)


def ask(client, requests):
    """Send (offset, length) of reads at once; {cookie: (offset, length)}."""
    wire, asked = b"", {}
    for cookie, (offset, length) in enumerate(requests):
        wire += struct.pack(">IHHQQI", nbd.REQUEST_MAGIC, 0, nbd.CMD_READ, cookie, offset, length)
        asked[cookie] = client._pending_reads[cookie] = (offset, length)
    client.send(wire)
    return asked


def take(client, asked):
    """All answers, which have to be what the base holds."""
    while asked:
        answer = client.read_answer()
        offset, length = asked.pop(answer.cookie)
        assert (answer.error, answer.data) == (0, BASE[offset : offset + length])


@pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
def test_whole_blocks_are_answered_at_once_and_copied(clone, page, wait_until, structured):
    device = clone(BASE, copy_on_read=True).open(stats_fd=page.fd)
    client = connected(device, structured)
    order = random.Random(1).sample(range(BLOCKS), BLOCKS)
    for first in range(0, BLOCKS, 64):
        take(client, ask(client, [(block * BLOCK, BLOCK) for block in order[first : first + 64]]))
        wait_until(lambda: device.status()["in_flight"] == 0, "them to be copied")
    assert device.status()["base_bytes_left"] == 0
    assert page("crew_requests") == 0
    asked = page("base_bytes_demand")
    assert client.read(0, SIZE // 2) == BASE[: SIZE // 2]
    assert page("base_bytes_demand") == asked
    assert page("cor_bytes") == SIZE
    client.close()


def test_more_at_once_than_may_wait(clone, wait_until):
    device = clone(BASE, copy_on_read=True).open(crew_threads=1)
    client = connected(device)
    take(client, ask(client, [(n % BLOCKS * BLOCK, BLOCK) for n in range(3 * BLOCKS)]))
    wait_until(lambda: device.status()["base_bytes_left"] == 0, "all to be local")
    assert device.status()["in_flight"] == 0
    client.close()


def test_what_does_not_fit_the_limit_is_read_by_the_crew(clone, page, wait_until):
    device = clone(BASE, copy_on_read=True).open(crew_threads=1, stats_fd=page.fd)
    device.update({"max_outstanding_copy_on_read_data": 8 * BLOCK})
    client = connected(device)
    take(client, ask(client, [(n * BLOCK, 16 * BLOCK) for n in range(0, BLOCKS, 16)]))
    wait_until(lambda: page("cor_skipped_bytes_backlog") == SIZE, "the last to be passed over")
    assert page("crew_requests") == BLOCKS // 16
    # Those that wait leave room for the crew's own.
    take(client, ask(client, [(n * BLOCK, BLOCK) for n in range(BLOCKS)]))
    wait_until(lambda: device.status()["base_bytes_left"] == 0, "all to be local")
    assert page("crew_requests") > BLOCKS // 16
    client.close()


def test_parts_of_blocks_are_widened_by_the_crew(clone, page, wait_until):
    device = clone(BASE, copy_on_read=True).open(stats_fd=page.fd)
    client = connected(device)
    for offset, length in ((100, BLOCK), (8 * BLOCK, 512), (20 * BLOCK - 512, 512)):
        assert client.read(offset, length) == BASE[offset : offset + length]
    assert page("crew_requests") == 3
    wait_until(lambda: device.status()["base_bytes_left"] == SIZE - 4 * BLOCK, "whole blocks")
    client.close()


def test_what_is_written_after_the_answer_is_newer_than_the_copy(clone):
    one = clone(BASE, copy_on_read=True)
    device = one.open(crew_threads=4)
    client = connected(device)
    model = bytearray(BASE)
    for first in range(0, BLOCKS, 64):
        wire = b""
        for block in range(first, first + 64):
            client._pending_reads[2 * block] = (block * BLOCK, BLOCK)
            data = bytes([block % 251 + 1]) * (BLOCK if block % 2 else 512)
            model[block * BLOCK : block * BLOCK + len(data)] = data
            wire += struct.pack(">IHHQQI", nbd.REQUEST_MAGIC, 0, nbd.CMD_READ, 2 * block,
                                block * BLOCK, BLOCK)  # fmt: skip
            wire += struct.pack(">IHHQQI", nbd.REQUEST_MAGIC, 0, nbd.CMD_WRITE, 2 * block + 1,
                                block * BLOCK, len(data)) + data  # fmt: skip
        client.send(wire)
        for _ in range(128):
            assert client.read_answer().error == 0
    assert client.read(0, SIZE) == model
    client.flush()
    client.close()
    one.close()
    assert one.open().read(0, SIZE) == model


def test_a_client_that_takes_no_answers_leaves_room_for_others(clone, wait_until):
    device = clone(BASE, copy_on_read=True).open(crew_threads=2)
    stalled, other = connected(device), connected(device)
    ask(stalled, [(n % 64 * 16 * BLOCK, 16 * BLOCK) for n in range(1500)])
    seen = []

    def settled():
        seen.append(device.status()["in_flight"])
        return len(seen) > 50 and len(set(seen[-50:])) == 1

    wait_until(settled, "the stalled client to hold what it can")
    for offset in range(0, SIZE, 64 * BLOCK):
        assert other.read(offset + 1, BLOCK) == BASE[offset + 1 : offset + 1 + BLOCK]
    other.flush()
    stalled.close()
    other.close()
