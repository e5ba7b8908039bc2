# SPDX-License-Identifier: Apache-2.0
"""Connections are given away between two messages: their clients notice nothing but a pause."""

import os
import random
import socket
import struct
import threading

import pytest

from fvdcore import EngineFault
from fvdtest.nbd_client import REQUEST_MAGIC, NbdClient

MIB = 1 << 20
SIZE = 8 * MIB
BASE = os.urandom(SIZE)


@pytest.fixture
def device(clone):
    return clone(BASE).open(crew_threads=4)


@pytest.fixture
def connect(device):
    made = []

    def make(**options):
        mine, theirs = socket.socketpair()
        mine.settimeout(10)
        device.serve(theirs.detach(), **options)
        made.append(NbdClient(mine))
        return made[-1]

    yield make
    for client in made:
        client.close()


def write_message(offset, data, cookie=7):
    return struct.pack(">IHHQQI", REQUEST_MAGIC, 0, 1, cookie, offset, len(data)) + data


def go_on(device, given):
    """What a successor does with what it got."""
    return [device.serve(fd, received=rest) for _, fd, rest in given]


def test_idle_connection_is_given_away_and_served_on(device, connect):
    client = connect()
    assert client.read(0, 4096) == BASE[:4096]
    ((number, fd, rest),) = device.hand_over(5)
    assert (number, rest) == (1, b"")
    assert device.connections() == []
    assert device.take_events() == []
    device.serve(fd)
    assert client.read(4096, 4096) == BASE[4096:8192]
    client.write(0, b"after")
    assert client.read(0, 5) == b"after"


def test_device_without_connections_gives_none(device):
    assert device.hand_over(5) == []


@pytest.mark.parametrize("sent", [1, 27, 28, 29, 5000, 70_000])
def test_beginning_of_a_message_goes_along(device, connect, sent, wait_until):
    client = connect()
    data = os.urandom(70_000)
    message = write_message(12_345, data)
    client.sock.sendall(message[:sent])
    ((_, fd, rest),) = device.hand_over(5)
    assert message.startswith(rest)
    assert len(rest) <= sent
    device.serve(fd, received=rest)
    client.sock.sendall(message[sent:])
    assert client.sock.recv(16, socket.MSG_WAITALL)[4:8] == bytes(4)
    assert client.read(12_345, len(data)) == data


def test_requests_that_were_received_are_answered_before(device, connect):
    client = connect()
    cookies = [client.send_request(0, number * 4096, 4096) for number in range(100)]
    ((_, fd, rest),) = device.hand_over(5)
    device.serve(fd, received=rest)
    answers = {}
    for _ in cookies:
        answer = client.read_answer()
        answers[answer.cookie] = answer.data
    assert answers == {
        cookie: BASE[number * 4096 : (number + 1) * 4096] for number, cookie in enumerate(cookies)
    }


def test_nothing_is_lost_over_many_hand_overs_under_load(device, connect, rng: random.Random):
    clients = [connect() for _ in range(3)]
    stop = threading.Event()
    failures = []
    models = [bytearray(MIB) for _ in clients]

    def load(lane):
        source = random.Random(lane)
        client, model = clients[lane], models[lane]
        client.write(lane * MIB, bytes(MIB))
        try:
            while not stop.is_set():
                offset = source.randrange(MIB - 600_000)
                data = source.randbytes(source.choice([10, 5000, 600_000]))
                client.write(lane * MIB + offset, data)
                model[offset : offset + len(data)] = data
                if client.read(lane * MIB + offset, len(data)) != data:
                    raise AssertionError("read something else than was written")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=load, args=(lane,)) for lane in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(60):
            given = device.hand_over(10)
            assert given is not None
            assert len(given) == 3
            go_on(device, given)
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert not failures
    for lane, client in enumerate(clients):
        assert client.read(lane * MIB, MIB) == models[lane]


def test_client_that_takes_no_answers_keeps_its_connection(device, connect):
    quick, slow = connect(), connect()
    slow.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    # In one piece: one batch, whose answers no socket holds.
    slow.sock.sendall(struct.pack(">IHHQQI", REQUEST_MAGIC, 0, 0, 9, 0, MIB) * 40)
    assert slow.sock.recv(1, socket.MSG_PEEK)  # answers are on their way, and get stuck
    assert device.hand_over(0.05) is None
    assert len(device.connections()) == 2
    assert quick.read(0, 100) == BASE[:100]
    for _ in range(40):
        assert slow.receive(16 + MIB)[16:] == BASE[:MIB]
    assert len(go_on(device, device.hand_over(5))) == 2
    assert slow.read(5, 5) == BASE[5:10]


def test_large_write_is_received_to_its_end(device, connect):
    client = connect()
    data = os.urandom(3 * MIB)
    message = write_message(MIB, data)
    client.sock.sendall(message[:MIB])
    assert device.hand_over(0.05) is None
    client.sock.sendall(message[MIB:])
    assert client.sock.recv(16, socket.MSG_WAITALL)[4:8] == bytes(4)
    assert client.read(MIB, len(data)) == data


def test_client_that_left_is_told_as_an_end_and_not_given(device, connect, wait_until):
    stays, leaves = connect(), connect()
    leaves.close()
    wait_until(lambda: len(device.connections()) == 1, "its end")
    given = device.hand_over(5)
    assert [number for number, _, _ in given] == [1]
    assert device.take_events() == [("connection_closed", 2)]
    go_on(device, given)
    assert stays.read(0, 1) == BASE[:1]


def test_bytes_that_no_predecessor_can_have_received_are_refused(device):
    mine, theirs = socket.socketpair()
    with mine, pytest.raises(EngineFault, match="serve a connection"):
        device.serve(theirs.detach(), received=bytes(MIB))


def test_closing_while_connections_are_given_away_is_safe(device, connect, task):
    connect()
    given = task(device.hand_over, 5).result()
    device.close()
    for _, fd, _ in given:
        os.close(fd)
