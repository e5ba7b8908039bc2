# SPDX-License-Identifier: Apache-2.0
"""A write that stands between its look at the connection and the disk must not overtake newer data.

The kernel gives a connection up, sends the write again on another one, and then a newer write of
the same place. The first one, stopped on its way all the while, has to come before both.
"""

import os
import socket

import pytest

from fvdtest.images import make_image
from fvdtest.nbd_client import CMD_READ, CMD_WRITE, NbdClient

BLOCK = 4096
OLD, NEW = b"o" * BLOCK, b"n" * BLOCK


@pytest.fixture
def served(probes, tmp_path):
    path = make_image(tmp_path / "disk.fvd", size=1 << 20)
    fd = os.open(path, os.O_RDWR)
    made = probes.connection.Served(fd)
    os.close(fd)
    yield made
    made.release()
    made.close()


@pytest.fixture
def connect(served):
    made = []

    def make():
        mine, theirs = socket.socketpair()
        mine.settimeout(10)
        number = served.serve(theirs.detach())
        assert number > 0, os.strerror(-number)
        made.append(NbdClient(mine))
        return made[-1]

    yield make
    for client in made:
        client.close()


@pytest.mark.parametrize("flags", [0, 1], ids=["on its thread", "in the crew"])
def test_late_duplicate_comes_before_what_is_newer(served, connect, wait_until, flags):
    first, second = connect(), connect()
    served.arm()
    first.send_request(CMD_WRITE, 0, BLOCK, OLD, flags=flags)
    wait_until(lambda: served.stopped, "the write to be on its way")
    first.sock.shutdown(socket.SHUT_RDWR)  # the kernel gives the connection up
    again = second.send_request(CMD_WRITE, 0, BLOCK, OLD)
    newer = second.send_request(CMD_WRITE, 0, BLOCK, NEW)
    # Elsewhere nothing has to wait.
    elsewhere = second.send_request(CMD_READ, 8 * BLOCK, 4)
    assert second.read_answer().cookie == elsewhere
    served.release()
    assert {second.read_answer().cookie, second.read_answer().cookie} == {again, newer}
    assert second.read(0, BLOCK) == NEW


@pytest.mark.parametrize("flags", [0, 1], ids=["on its thread", "in the crew"])
def test_what_a_connection_that_was_given_up_had_sent_is_dropped(
    served, connect, wait_until, flags
):
    """It waits behind another write; by its turn its connection is gone."""
    first, second = connect(), connect()
    served.arm()
    second.send_request(CMD_WRITE, 0, BLOCK, b"x" * BLOCK)
    wait_until(lambda: served.stopped, "the write to be on its way")
    first.send_request(CMD_WRITE, 0, BLOCK, OLD, flags=flags)
    first.sock.shutdown(socket.SHUT_RDWR)
    newer = second.send_request(CMD_WRITE, BLOCK, BLOCK, NEW)
    served.release()
    answers = [second.read_answer().cookie, second.read_answer().cookie]
    assert answers[-1] == newer
    assert second.read(0, 2 * BLOCK) in (b"x" * BLOCK + NEW, OLD + NEW)


def test_second_connection_waits_for_a_write_that_is_not_marked(served, connect, task, wait_until):
    """The only connection marks nothing; a reconnect in a living worker must not overtake it."""
    first = connect()
    served.arm()
    first.send_request(CMD_WRITE, 0, BLOCK, OLD)
    wait_until(lambda: served.stopped, "the write to be on its way")
    first.sock.shutdown(socket.SHUT_RDWR)
    coming = task(connect)
    coming.join(0.3)
    assert coming.is_alive(), "served although an older write stands"
    served.release()
    second = coming.result()
    second.write(0, NEW)
    assert second.read(0, BLOCK) == NEW
