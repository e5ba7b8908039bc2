# SPDX-License-Identifier: Apache-2.0
"""Changes that find no space: refused, or kept until there is some, while all else goes on."""

import errno
import os
import socket
import threading

import pytest

from fvdtest.images import make_image
from fvdtest.nbd_client import (
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    NbdClient,
    NbdError,
)

BLOCK = 4096
MIB = 1 << 20
SIZE = 8 * MIB
OLD, NEW = b"o" * BLOCK, b"n" * BLOCK


@pytest.fixture
def serving(probes, tmp_path):
    made = []

    def serve(**options):
        path = make_image(tmp_path / "disk.fvd", size=SIZE, **options)
        fd = os.open(path, os.O_RDWR)
        made.append(probes.connection.Served(fd))
        os.close(fd)
        return made[-1]

    yield serve
    for one in made:
        one.full(0)
        one.close()


@pytest.fixture
def connect():
    made = []

    def make(served):
        mine, theirs = socket.socketpair()
        mine.settimeout(20)
        assert served.serve(theirs.detach()) > 0
        made.append(NbdClient(mine))
        return made[-1]

    yield make
    for client in made:
        client.close()


@pytest.fixture
def slots(probes):
    """Where the stats page keeps what."""
    return probes.plain.slots()


@pytest.fixture
def growths(slots):
    """Growths that were counted: good ones, bad ones, bytes."""

    def counted(served):
        names = ("growths", "growth_errors", "growth_bytes")
        return tuple(served.counter(slots[name]) for name in names)

    return counted


def answers(client, count):
    """The errors of the next answers, by cookie."""
    found = [client.read_answer() for _ in range(count)]
    return {answer.cookie: answer.error for answer in found}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_without_the_wish_to_wait_a_change_is_refused_at_once(serving, connect, number):
    served = serving()
    client = connect(served)
    served.full(number)
    with pytest.raises(NbdError) as refused:
        client.write(0, OLD)
    assert refused.value.errno in (errno.ENOSPC, number)
    served.full(0)
    client.write(0, OLD)
    assert client.read(0, BLOCK) == OLD


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_change_waits_until_there_is_space(serving, connect, wait_until, slots, number):
    served = serving()
    served.policy(True)
    client = connect(served)
    served.full(number)
    write = client.send_request(CMD_WRITE, 0, BLOCK, NEW)
    zeroes = client.send_request(CMD_WRITE_ZEROES, 8 * BLOCK, BLOCK)
    wait_until(lambda: served.waiting == 2, "two changes to wait")
    assert client.call(CMD_READ, 16 * BLOCK, BLOCK).data == bytes(BLOCK)
    assert client.call(CMD_FLUSH).error == 0
    served.full(0)
    assert answers(client, 2) == {write: 0, zeroes: 0}
    assert served.waiting == 0
    assert served.counter(slots["parkings"]) == 2
    assert client.read(0, BLOCK) == NEW


def test_other_errors_do_not_wait(serving, connect):
    served = serving()
    served.policy(True)
    client = connect(served)
    served.full(errno.EIO)
    with pytest.raises(NbdError) as refused:
        client.write(0, OLD)
    assert refused.value.errno == errno.EIO


def test_later_changes_of_the_range_come_after_what_waits(serving, connect, wait_until):
    served = serving()
    served.policy(True)
    client = connect(served)
    served.full(errno.ENOSPC)
    sent = [client.send_request(CMD_WRITE, 0, BLOCK, OLD)]
    wait_until(lambda: served.waiting == 1, "the first write to wait")
    served.full(0)
    # At once, though there is space now: the first one comes first.
    sent.append(client.send_request(CMD_WRITE, 100, BLOCK, NEW))
    sent.append(client.send_request(CMD_TRIM, 64 * BLOCK, BLOCK))
    assert answers(client, 3) == dict.fromkeys(sent, 0)
    assert client.read(0, BLOCK) == OLD[:100] + NEW[:-100]


def test_more_changes_than_threads_wait_in_their_order_and_hold_nobody(
    serving, connect, wait_until
):
    served = serving()
    served.policy(True)
    client = connect(served)
    served.full(errno.ENOSPC)
    # Each covers half of the one before: a chain in which every change waits for its neighbour.
    sent = [
        client.send_request(CMD_WRITE, at * BLOCK // 2, BLOCK, bytes([at]) * BLOCK)
        for at in range(40)
    ]
    wait_until(lambda: served.waiting == 40, "all to wait")
    for at in range(10):
        assert client.call(CMD_TRIM, (100 + at) * BLOCK, BLOCK).error == 0
        assert client.read((200 + at) * BLOCK, BLOCK) == bytes(BLOCK)
    served.full(0)
    assert answers(client, 40) == dict.fromkeys(sent, 0)
    expected = bytearray(41 * BLOCK // 2)
    for at in range(40):
        expected[at * BLOCK // 2 : at * BLOCK // 2 + BLOCK] = bytes([at]) * BLOCK
    assert client.read(0, len(expected)) == expected


def test_more_changes_than_the_pool_holds_leave_it_to_others(serving, connect, wait_until):
    served = serving()
    served.policy(True)
    client = connect(served)
    served.full(errno.ENOSPC)
    content = {at: bytes([at % 251 + 1]) * BLOCK for at in range(400)}
    sent = [client.send_request(CMD_WRITE, at * BLOCK, BLOCK, content[at]) for at in content]
    wait_until(lambda: served.waiting == 400, "all to wait")
    # Flushes need a request of the pool.
    for _ in range(3):
        assert client.call(CMD_FLUSH).error == 0
    assert client.read(1000 * BLOCK, BLOCK) == bytes(BLOCK)
    served.full(0)
    assert answers(client, 400) == dict.fromkeys(sent, 0)
    assert client.read(0, 400 * BLOCK) == b"".join(content.values())


def test_memory_of_what_waits_has_a_limit_and_all_of_it_ends(serving, connect, wait_until):
    served = serving()
    served.policy(True)
    client = connect(served)
    served.full(errno.ENOSPC)
    large = 5 * MIB

    def send():
        for _ in range(120):
            client.send_request(CMD_WRITE, 0, large, bytes(large))

    # 256 MiB apart, then what the pool gives to one connection; the rest is not received.
    sending = threading.Thread(target=send)
    sending.start()
    wait_until(lambda: served.waiting >= 51 + 50, "the pool to be used as well", 60)
    served.full(0)
    assert set(answers(client, 120).values()) == {0}
    sending.join()
    assert served.waiting == 0
    wait_until(lambda: served.apart == (0, 0), "its memory to be given back")


def test_at_the_end_of_its_connection_nothing_waits(serving, connect, wait_until):
    served = serving()
    served.policy(True)
    client, other = connect(served), connect(served)
    served.full(errno.ENOSPC)
    client.send_request(CMD_WRITE, 0, BLOCK, OLD)
    kept = other.send_request(CMD_WRITE, 8 * BLOCK, BLOCK, NEW)
    wait_until(lambda: served.waiting == 2, "both to wait")
    client.sock.shutdown(socket.SHUT_RDWR)
    wait_until(lambda: served.live == 1, "the connection to end")
    wait_until(lambda: served.waiting == 1, "the other's to go on waiting")
    served.full(0)
    assert answers(other, 1) == {kept: 0}
    assert other.read(0, BLOCK) == bytes(BLOCK)


def test_when_the_device_closes_what_waits_fails(serving, connect, wait_until, task):
    served = serving()
    served.policy(True)
    client = connect(served)
    served.full(errno.ENOSPC)
    sent = [client.send_request(CMD_WRITE, 0, BLOCK, OLD) for _ in range(3)]
    wait_until(lambda: served.waiting == 3, "all to wait")
    ending = task(served.shut)
    assert answers(client, 3) == dict.fromkeys(sent, errno.ENOSPC)
    ending.result()
    assert served.waiting == 0
    assert client.wait_closed() == b""


def test_a_client_that_fills_every_request_can_be_closed(serving, connect, wait_until, task):
    """Its thread waits for a free request, and must not wait for ever."""
    served = serving()
    served.policy(True)
    client = connect(served)
    served.full(errno.ENOSPC)
    for at in range(100):
        client.send_request(CMD_WRITE, at * BLOCK, 100, OLD[:100])
    wait_until(lambda: served.waiting >= 50, "requests to wait")
    task(served.shut).result()
    assert served.waiting == 0


def test_connections_that_cannot_part_go_on_reading(serving, connect, wait_until):
    served = serving()
    served.policy(True)
    client = connect(served)
    served.full(errno.ENOSPC)
    kept = client.send_request(CMD_WRITE, 0, BLOCK, NEW)
    wait_until(lambda: served.waiting == 1, "it to wait")
    assert served.part(50) is False
    assert client.read(8 * BLOCK, BLOCK) == bytes(BLOCK)
    served.full(0)
    assert answers(client, 1) == {kept: 0}


def test_longer_storage_is_asked_for_and_then_used(serving, connect, wait_until, growths):
    served = serving(compact=True, chunk_size=MIB, storage_grow_unit=4 * MIB)
    begin = served.data_offset
    served.device(begin + MIB)
    served.policy(False, True)
    client = connect(served)
    client.write(0, OLD)
    sent = client.send_request(CMD_WRITE, MIB, BLOCK, NEW)
    wait_until(lambda: served.waiting == 1, "the write to wait")
    assert served.asked == 4 * MIB
    assert client.read(0, BLOCK) == OLD
    client.write(BLOCK, NEW)
    served.lengthen(begin + 5 * MIB)
    served.grown(True)
    assert answers(client, 1) == {sent: 0}
    assert client.read(MIB, BLOCK) == NEW
    assert served.asked == 0
    assert growths(served) == (1, 0, 4 * MIB)


@pytest.mark.parametrize("ok", [False, True], ids=["failed", "no longer than before"])
def test_a_growth_that_came_to_nothing_is_not_repeated_at_once(
    serving, connect, wait_until, growths, ok
):
    served = serving(compact=True, chunk_size=MIB, storage_grow_unit=4 * MIB)
    served.device(served.data_offset)
    served.policy(False, True)
    client = connect(served)
    sent = client.send_request(CMD_WRITE, 0, BLOCK, NEW)
    wait_until(lambda: served.asked, "more to be asked for")
    served.grown(ok)
    assert answers(client, 1) == {sent: errno.ENOSPC}
    with pytest.raises(NbdError) as refused:
        client.write(0, NEW)
    assert refused.value.errno == errno.ENOSPC
    assert served.asked == 0
    assert growths(served) == (0, 1, 0)
    # Whoever made it longer all the same is believed.
    served.lengthen(served.data_offset + MIB)
    client.write(0, NEW)


def test_space_used_up_before_the_growth_is_told_is_asked_for_again(
    serving, connect, wait_until, growths
):
    served = serving(compact=True, chunk_size=MIB, storage_grow_unit=MIB)
    begin = served.data_offset
    served.device(begin)
    served.policy(False, True)
    client = connect(served)
    sent = [client.send_request(CMD_WRITE, 0, BLOCK, NEW)]
    wait_until(lambda: served.asked, "more to be asked for")
    served.lengthen(begin + MIB)
    # One that comes after the program and before its news takes what there is; the next waits.
    client.write(MIB, NEW)
    sent.append(client.send_request(CMD_WRITE, 2 * MIB, BLOCK, NEW))
    wait_until(lambda: served.waiting == 2, "both to wait")
    served.grown(True)
    wait_until(lambda: served.asked, "more to be asked for again")
    served.lengthen(begin + 3 * MIB)
    served.grown(True)
    assert answers(client, 2) == dict.fromkeys(sent, 0)
    assert growths(served) == (2, 0, 3 * MIB)


def test_who_waits_goes_on_waiting_when_a_growth_failed(serving, connect, wait_until):
    served = serving(compact=True, chunk_size=MIB, storage_grow_unit=4 * MIB)
    served.device(served.data_offset)
    served.policy(True, True)
    client = connect(served)
    sent = client.send_request(CMD_WRITE, 0, BLOCK, NEW)
    wait_until(lambda: served.asked, "more to be asked for")
    served.grown(False)
    assert client.read(MIB, BLOCK) == bytes(BLOCK)
    assert served.waiting == 1
    served.lengthen(served.data_offset + MIB)
    assert answers(client, 1) == {sent: 0}
