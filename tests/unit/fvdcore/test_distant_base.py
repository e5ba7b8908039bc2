# SPDX-License-Identifier: Apache-2.0
"""A device over a distant base: what a read takes along, and what a base that is away holds up."""

import os
import random
import socket
import struct

import pytest

from fvdcore import Device
from fvdtest.images import make_image
from fvdtest.nbd_client import CMD_FLUSH, CMD_READ, CMD_WRITE, FLAG_FUA, NbdClient
from fvdtest.remote import HAS_FLAGS, MULTI_CONN, READ_ONLY, Liar, simple_reply

BLOCK = 4096
KIB = 1024
SIZE = 4 << 20
READ = 0
EIO = 5


@pytest.fixture
def base(tmp_path):
    data = random.Random(1).randbytes(SIZE)
    (tmp_path / "base.raw").write_bytes(data)
    return data


@pytest.fixture
def liar(tmp_path, base):
    """Start a server: honest, but for the ranges that `bad` names, or silent."""
    made = []

    def start(bad=range(0), silent=False):
        def answer(sock, kind, cookie, offset, length):
            if silent:
                return True
            if offset < bad.stop and bad.start < offset + length:
                simple_reply(sock, cookie, error=EIO)
            else:
                simple_reply(sock, cookie, base[offset : offset + length])
            return True

        export = (SIZE, HAS_FLAGS | READ_ONLY | MULTI_CONN)
        made.append(Liar(tmp_path, answer, export=export))
        return made[-1]

    yield start
    for server in made:
        server.close()


@pytest.fixture
def opened(tmp_path, base):
    """Open a clone over a server."""
    made = []

    def start(server, *, shape=None, **options):
        path = make_image(tmp_path / "clone.fvd", base=str(tmp_path / "base.raw"), **(shape or {}))
        fd = os.open(path, os.O_RDWR)
        layers = [(fd, "fvd"), (server.uri, "nbd", {"length": SIZE})]
        try:
            made.append(Device.open(layers, **options))
        finally:
            os.close(fd)
        made[-1].start()
        return made[-1]

    yield start
    for device in made:
        device.abandon()


@pytest.fixture
def client():
    """A connection to a device."""
    made = []

    def connect(device):
        mine, theirs = socket.socketpair()
        mine.settimeout(15.0)
        device.serve(theirs.detach())
        made.append(NbdClient(mine))
        return made[-1]

    yield connect
    for one in made:
        one.close()


def request(client, kind, cookie, offset=0, length=0, data=b"", flags=0):
    client.send(struct.pack(">IHHQQI", 0x25609513, flags, kind, cookie, offset, length) + data)


def reply(client, length=0):
    """(cookie, error, data) of one simple reply."""
    _, error, cookie = struct.unpack(">IIQ", client.receive(16))
    return cookie, error, client.receive(0 if error else length)


def reads(server):
    return [(offset, length) for kind, offset, length in server.requests if kind == READ]


def test_a_read_takes_a_window_along_which_is_local_afterwards(liar, opened, base):
    server = liar()
    device = opened(server, copy_on_read=True)
    assert device.read(40 * KIB, BLOCK) == base[40 * KIB : 40 * KIB + BLOCK]
    assert reads(server) == [(0, 128 * KIB)]
    assert device.status()["local_bytes"] == 128 * KIB
    assert device.read(0, 128 * KIB) == base[: 128 * KIB]
    assert len(reads(server)) == 1


@pytest.mark.parametrize("options", [{"fetch_size": 0}, {"copy_on_read": False}])
def test_what_would_not_be_kept_is_not_fetched(liar, opened, options):
    server = liar()
    device = opened(server, **{"copy_on_read": True} | options)
    device.read(40 * KIB, BLOCK)
    assert reads(server) == [(40 * KIB, BLOCK)]


def test_a_reader_that_goes_on_needs_few_round_trips(liar, opened, base):
    server = liar()
    device = opened(server, copy_on_read=True, shape={"max_outstanding_copy_on_read": 16 << 20})
    found = b"".join(device.read(at, 16 * KIB) for at in range(0, SIZE, 16 * KIB))
    assert found == base
    starts = {offset for offset, _ in reads(server)}
    assert sum(length for _, length in reads(server)) == SIZE
    assert len(starts) <= 24  # 32 windows would be, that do not grow


def test_what_cannot_be_read_beside_it_does_no_harm(liar, opened, base):
    server = liar(bad=range(100 * KIB, 101 * KIB))
    device = opened(server, copy_on_read=True)
    assert device.read(0, BLOCK) == base[:BLOCK]
    assert reads(server)[-1] == (0, BLOCK)


@pytest.mark.parametrize("size", [-1, (2 << 20) + 1])
def test_a_size_out_of_range_is_refused(liar, opened, size):
    with pytest.raises((ValueError, OverflowError)):
        opened(liar(), fetch_size=size)


@pytest.mark.parametrize("shape", [{}, {"compact": True}], ids=["raw", "compact"])
def test_a_base_that_is_away_holds_up_nothing_that_is_local(liar, opened, client, base, shape):
    """As many reads as a kernel sends at once wait for the base, and changes that need it; flushes,
    writes of whole blocks and reads of what is local go on beside them."""
    device = opened(liar(silent=True), shape=shape)
    guest = client(device)
    for cookie in range(80):
        request(guest, CMD_READ, cookie, (256 + cookie) * BLOCK, BLOCK)
    for cookie in range(80, 110):  # each of them would have to fill its block
        request(guest, CMD_WRITE, cookie, SIZE // 2 + cookie * BLOCK + 7, 9, b"y" * 9)
    for turn in range(12):
        request(guest, CMD_WRITE, 1000, turn * BLOCK, BLOCK, b"x" * BLOCK, FLAG_FUA)
        assert reply(guest) == (1000, 0, b"")
        request(guest, CMD_FLUSH, 2000)
        assert reply(guest) == (2000, 0, b"")
        request(guest, CMD_READ, 3000, turn * BLOCK, BLOCK)
        assert reply(guest, BLOCK) == (3000, 0, b"x" * BLOCK)


def test_changes_that_overlap_one_that_waits_come_after_it(liar, opened, client, base):
    """A whole block over a part of it that waits for the base: in their order, or none."""
    server = liar()
    device = opened(server)
    guest = client(device)
    for turn in range(50):
        at = turn * BLOCK
        request(guest, CMD_WRITE, turn, at + 5, 2, b"yy")
        request(guest, CMD_WRITE, 100 + turn, at, BLOCK, b"x" * BLOCK, FLAG_FUA)
    answers = [reply(guest) for _ in range(100)]
    assert {error for _, error, _ in answers} == {0}
    assert device.read(0, 50 * BLOCK) == b"x" * 50 * BLOCK
