# SPDX-License-Identifier: Apache-2.0
"""The transmission phase over a socket pair: raw requests, every reply checked to the byte.

The client is fvdtest.nbd_client, written from the protocol text and not from the server.
"""

import os
import socket
import struct

import pytest

from fvdtest import nbd_client as nbd
from fvdtest.nbd_client import NbdClient, NbdError

MIB = 1 << 20
BLOCK = 4096
SIZE = 4 * MIB
BASE = os.urandom(SIZE)
CONTEXT = 77
HOLE_AND_ZERO = 3


@pytest.fixture
def device(clone):
    return clone(BASE, size=SIZE * 20).open(crew_threads=4)


@pytest.fixture
def connect(device):
    made = []

    def make(structured=False, read_only=False, status=True):
        mine, theirs = socket.socketpair()
        mine.settimeout(10)
        context = CONTEXT if structured and status else None
        device.serve(theirs.detach(), structured=structured, read_only=read_only,
                     block_status_id=context)  # fmt: skip
        client = NbdClient(mine)
        client.structured, client.context_id = structured, context
        made.append(client)
        return client

    yield make
    for client in made:
        client.close()


@pytest.fixture(params=[False, True], ids=["simple", "structured"])
def client(connect, request):
    return connect(structured=request.param)


def test_reads_and_writes_of_many_sizes(client):
    model = bytearray(BASE)
    for number, (offset, length) in enumerate(
        [(0, 1), (511, 2), (4095, 4097), (70_000, 70_000), (MIB, MIB), (3, 3 * MIB), (0, SIZE)]
    ):
        assert client.read(offset, length) == model[offset : offset + length]
        data = bytes([number + 1]) * (length // 2)
        client.write(offset, data)
        model[offset : offset + len(data)] = data
        assert client.read(offset, length) == model[offset : offset + length]


def test_a_write_larger_than_the_receive_buffer(client, device):
    data = os.urandom(3 * MIB + 17)
    client.write(SIZE + 5, data, fua=True)
    client.write(2 * SIZE, os.urandom(32 * MIB))
    assert client.read(SIZE + 5, len(data)) == data == device.read(SIZE + 5, len(data))


def test_a_write_that_arrives_byte_by_byte(client, device):
    payload = b"slow" * 5
    request = struct.pack(">IHHQQI", nbd.REQUEST_MAGIC, 0, nbd.CMD_WRITE, 9, 100, len(payload))
    for at in range(len(request + payload)):
        client.send((request + payload)[at : at + 1])
    answer = client.read_answer()
    assert (answer.cookie, answer.error) == (9, 0)
    assert device.read(100, 20) == payload


def test_flush_trim_and_zeroes(client, device):
    client.write(0, b"x" * 4 * BLOCK)
    client.flush()
    assert device.status()["pending_blocks"] == 0
    client.trim(0, BLOCK)
    client.write_zeroes(BLOCK, BLOCK)
    client.write_zeroes(SIZE - 100, 200, no_hole=True)
    assert client.read(0, 3 * BLOCK) == bytes(2 * BLOCK) + b"x" * BLOCK
    assert client.read(SIZE - 101, 202) == BASE[-101:-100] + bytes(201)
    client.call(nbd.CMD_WRITE_ZEROES, 0, BLOCK, flags=nbd.FLAG_FUA | nbd.FLAG_NO_HOLE)
    client.call(nbd.CMD_TRIM, 0, SIZE * 20, flags=nbd.FLAG_FUA)
    client.call(nbd.CMD_WRITE_ZEROES, 0, 0)


def test_a_pipelined_batch_is_answered_whole(client):
    """Reads, writes and flushes in one send; the answers may come in any order."""
    wire, expected = b"", {}
    client.write(0, BASE[: 64 * BLOCK])
    for cookie in range(200):
        offset = cookie % 64 * BLOCK
        command = (nbd.CMD_READ, nbd.CMD_WRITE, nbd.CMD_FLUSH)[cookie % 3]
        length = 0 if command == nbd.CMD_FLUSH else BLOCK
        wire += struct.pack(">IHHQQI", nbd.REQUEST_MAGIC, 0, command, cookie, offset, length)
        if command == nbd.CMD_WRITE:
            wire += BASE[offset : offset + BLOCK]
        if command == nbd.CMD_READ:
            client._pending_reads[cookie] = (offset, length)
        expected[cookie] = BASE[offset : offset + BLOCK] if command == nbd.CMD_READ else b""
    client.send(wire)
    for _ in range(200):
        answer = client.read_answer()
        assert answer.error == 0
        assert answer.data == expected.pop(answer.cookie)
    assert expected == {}


def test_cookies_come_back_as_they_were(client):
    for cookie in (0, 1, 2**63, 2**64 - 1, 0x0102030405060708):
        assert client.send_request(nbd.CMD_FLUSH, cookie=cookie) == cookie
        assert client.read_answer().cookie == cookie


ERRORS = {
    "read past the end": (nbd.CMD_READ, SIZE * 20 - 1, 2, 0, nbd.EINVAL),
    "read far past the end": (nbd.CMD_READ, 2**64 - 1, 2, 0, nbd.EINVAL),
    "read of too much": (nbd.CMD_READ, 0, 32 * MIB + 1, 0, None),
    "write past the end": (nbd.CMD_WRITE, SIZE * 20 - 1, 2, 0, nbd.ENOSPC),
    "zeroes past the end": (nbd.CMD_WRITE_ZEROES, SIZE * 20, 1, 0, nbd.ENOSPC),
    "trim past the end": (nbd.CMD_TRIM, SIZE * 20, 1, 0, None),
    "unknown flag": (nbd.CMD_FLUSH, 0, 0, 1 << 9, nbd.EINVAL),
    "no-hole on a write": (nbd.CMD_WRITE, 0, 1, nbd.FLAG_NO_HOLE, nbd.EINVAL),
    "unknown command": (99, 0, 0, 0, nbd.EINVAL),
    "cache": (nbd.CMD_CACHE, 0, BLOCK, 0, None),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_is_wrong_is_answered_and_the_stream_goes_on(client, name):
    command, offset, length, flags, wanted = ERRORS[name]
    payload = b"p" * length if command == nbd.CMD_WRITE else b""
    client.send_request(command, offset, length, payload, flags=flags)
    answer = client.read_answer()
    assert answer.error == wanted or (wanted is None and answer.error)
    assert answer.data == b""
    client.write(5, b"still here")
    assert client.read(5, 10) == b"still here"


def test_a_bad_large_write_is_read_to_its_end(client):
    client.send_request(nbd.CMD_WRITE, SIZE * 20 - 1, 2 * MIB, b"p" * 2 * MIB)
    assert client.read_answer().error == nbd.ENOSPC
    assert client.read(0, 10) == BASE[:10]


@pytest.mark.parametrize("structured", [False, True])
def test_a_read_only_connection_refuses_changes(connect, structured):
    reader = connect(structured=structured, read_only=True)
    for command in (nbd.CMD_WRITE, nbd.CMD_TRIM, nbd.CMD_WRITE_ZEROES):
        reader.send_request(command, 0, 512, b"x" * 512 if command == nbd.CMD_WRITE else b"")
        assert reader.read_answer().error == nbd.EPERM
    reader.flush()
    assert reader.read(0, 512) == BASE[:512]


def test_an_io_error_is_answered(clone):
    one = clone(BASE)
    device = one.open()
    os.truncate(one.base_path, MIB)
    mine, theirs = socket.socketpair()
    mine.settimeout(10)
    device.serve(theirs.detach())
    client = NbdClient(mine)
    for call in (lambda: client.read(2 * MIB, 100), lambda: client.write(2 * MIB + 1, b"x")):
        with pytest.raises(NbdError) as caught:
            call()
        assert caught.value.errno == nbd.EIO
    assert client.read(0, 100) == BASE[:100]
    client.close()


def test_block_status_is_described_in_order(connect):
    client = connect(structured=True)
    client.write(BLOCK, b"x" * BLOCK)
    client.write_zeroes(2 * BLOCK, BLOCK)
    extents = client.block_status(0, SIZE + MIB)
    assert sum(length for length, _ in extents) == SIZE + MIB
    # Data of the base and of the image are both "allocated" to a guest.
    flat = [state for length, state in extents for _ in range(length // BLOCK)]
    assert flat[0] == flat[1] == 0
    assert flat[2] == HOLE_AND_ZERO
    assert set(flat[SIZE // BLOCK :]) == {HOLE_AND_ZERO}, "behind the base nothing is stored"
    one = client.call(nbd.CMD_BLOCK_STATUS, 0, SIZE, flags=nbd.FLAG_REQ_ONE)
    assert len(one.extents) == 1


@pytest.mark.parametrize("structured", [False, True])
def test_block_status_needs_its_context_and_a_length(connect, structured):
    client = connect(structured=structured, status=False)
    with pytest.raises(NbdError) as caught:
        client.block_status(0, BLOCK)
    assert caught.value.errno == nbd.EINVAL
    if structured:
        with pytest.raises(NbdError) as caught:
            connect(structured=True).block_status(0, 0)
        assert caught.value.errno == nbd.EINVAL


def test_four_connections_at_once(connect, task):
    clients = [connect(structured=number % 2 == 1) for number in range(4)]

    def work(number):
        client, start = clients[number], number * MIB
        for turn in range(30):
            data = bytes([number * 30 + turn]) * 9000
            client.write(start + turn * 9000, data)
            assert client.read(start + turn * 9000, 9000) == data
            if turn % 10 == 0:
                client.flush()

    for worker in [task(work, number) for number in range(4)]:
        worker.result(30)
    for number, client in enumerate(clients):
        other = (number + 1) % 4
        assert client.read(other * MIB, 9000) == bytes([other * 30]) * 9000


@pytest.mark.parametrize(
    "wire",
    [b"\0" * 28, struct.pack(">IHHQQI", nbd.REQUEST_MAGIC, 0, nbd.CMD_DISC, 1, 0, 0),
     struct.pack(">IHHQQI", nbd.REQUEST_MAGIC, 0, nbd.CMD_WRITE, 1, 0, 2**32 - 1)],
    ids=["no request", "farewell", "a payload beyond belief"],
)  # fmt: skip
def test_what_ends_a_connection(connect, wire, device, wait_until):
    client = connect()
    client.send(wire)
    assert client.wait_closed() == b""
    wait_until(lambda: device.connections() == [], "the connection to end")


def test_requests_before_a_farewell_are_answered(connect):
    client = connect()
    wire = b""
    for cookie in range(5):
        wire += struct.pack(">IHHQQI", nbd.REQUEST_MAGIC, 0, nbd.CMD_FLUSH, cookie, 0, 0)
    client.send(wire + struct.pack(">IHHQQI", nbd.REQUEST_MAGIC, 0, nbd.CMD_DISC, 9, 0, 0))
    assert {client.read_answer().cookie for _ in range(5)} == set(range(5))
    assert client.wait_closed() == b""


def test_a_client_that_leaves_in_the_middle_disturbs_nobody(connect, device, wait_until):
    other = connect()
    for cut in (10, 28, 500):
        client = connect()
        wire = struct.pack(">IHHQQI", nbd.REQUEST_MAGIC, 0, nbd.CMD_WRITE, 1, 0, MIB)
        client.send((wire + b"x" * 1000)[:cut])
        client.close()
    wait_until(lambda: len(device.connections()) == 1, "the others to end")
    assert other.read(0, 10) == BASE[:10], "a write that was cut off wrote nothing"
    assert device.status()["in_flight"] == 0


def test_copy_on_read_settles_after_the_reply(clone, wait_until):
    one = clone(BASE, copy_on_read=True)
    device = one.open()
    mine, theirs = socket.socketpair()
    mine.settimeout(10)
    device.serve(theirs.detach(), structured=True)
    client = NbdClient(mine)
    client.structured = True
    assert client.read(100, 3 * BLOCK) == BASE[100 : 100 + 3 * BLOCK]
    wait_until(lambda: device.status()["base_bytes_left"] == SIZE - 4 * BLOCK, "whole blocks")
    client.close()


def test_draining_finishes_what_was_received(connect, device, task):
    client = connect()
    for cookie in range(50):
        client.send_request(nbd.CMD_FLUSH, cookie=cookie)
    drain = task(device.drain, 10)
    seen = {client.read_answer().cookie for _ in range(50)}
    assert drain.result() is True
    assert client.wait_closed() == b""
    assert seen == set(range(50)), "all were in the socket when it was shut"


def test_a_read_of_nothing_is_not_answered_with_an_empty_data_chunk(client):
    """A data chunk has at least one byte of data in the protocol."""
    assert client.read(4096, 0) == b""
    assert client.read(4096, 4) == BASE[4096:4100]
