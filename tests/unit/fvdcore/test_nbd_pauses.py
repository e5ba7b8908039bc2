# SPDX-License-Identifier: Apache-2.0
"""Where the kernel holds writes back, reads of the same connection do not wait behind them."""

import os
import socket
import time

import pytest

from fvdtest.images import make_image
from fvdtest.nbd_client import CMD_READ, CMD_WRITE, NbdClient

BLOCK = 4096
LONG_SECONDS = 0.02
CREW_SECONDS = 2.05
CREW = 32


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
def client(served):
    mine, theirs = socket.socketpair()
    mine.settimeout(10)
    assert served.serve(theirs.detach()) > 0
    made = NbdClient(mine)
    yield made
    made.close()


@pytest.fixture
def hold(served, client, wait_until):
    """Send a write that is held back from now on."""

    def held():
        served.arm()
        sent = client.send_request(CMD_WRITE, 0, BLOCK, b"w" * BLOCK)
        wait_until(lambda: served.stopped, "the write to be on its way")
        return sent

    return held


@pytest.fixture
def pause(served, client, hold, wait_until):
    """A write that is held back for a while."""

    def paused(seconds=LONG_SECONDS):
        sent = hold()
        begin = time.monotonic()
        wait_until(lambda: time.monotonic() - begin > seconds, "a while")
        served.release()
        assert client.read_answer().cookie == sent

    return paused


def overtakes(served, client, hold, *, release):
    """Is a read answered while a write sent before it is held back?"""
    sent = hold()
    read = client.send_request(CMD_READ, 8 * BLOCK, BLOCK)
    if release:
        served.release()
    first = client.read_answer().cookie
    served.release()
    assert {first, client.read_answer().cookie} == {sent, read}
    return first == read


def test_reads_pass_by_writes_that_the_kernel_holds_back(served, client, hold, pause, wait_until):
    pause()
    few = served.crew
    pause()
    assert overtakes(served, client, hold, release=False)
    assert few < served.crew == CREW
    # What overlaps such a write still waits for it.
    sent = hold()
    behind = client.send_request(CMD_WRITE, 0, BLOCK, b"n" * BLOCK)
    served.release()
    assert [client.read_answer().cookie, client.read_answer().cookie] == [sent, behind]
    assert client.read(0, BLOCK) == b"n" * BLOCK
    # A while later it is tried anew, and one more pause is enough.
    begin = time.monotonic()
    wait_until(lambda: time.monotonic() - begin > CREW_SECONDS, "the end of that")
    assert not overtakes(served, client, hold, release=True)


def test_one_long_write_changes_nothing(served, client, hold, pause):
    pause()
    assert not overtakes(served, client, hold, release=True)


def test_short_writes_change_nothing(served, client, hold, pause):
    for _ in range(5):
        client.write(0, b"s" * BLOCK)
    assert not overtakes(served, client, hold, release=True)
