# SPDX-License-Identifier: Apache-2.0
"""What failed is told once, with its place and errno: requests on any thread, and prefetch."""

import errno
import os
import resource
import select
import signal
import socket

import pytest

from fvdcore import EngineFault
from fvdtest import nbd_client as nbd
from fvdtest.nbd_client import NbdClient

BLOCK = 4096
SIZE = 64 * BLOCK
BASE = os.urandom(SIZE)


def failures(device, count=1):
    """Wait for so many failures, and fetch them."""
    found = []
    while len(found) < count:
        assert select.select([device.event_fd], [], [], 20)[0], "no event comes"
        found += [value for kind, value in device.take_events() if kind == "failed"]
    return found


def connected(device):
    mine, theirs = socket.socketpair()
    mine.settimeout(20)
    device.serve(theirs.detach())
    return NbdClient(mine)


@pytest.fixture
def small_files():
    """A file that may not grow beyond a limit stands for a store that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("over", ["socket", "python"])
def test_a_base_that_cannot_be_read_is_named_with_the_place(clone, over):
    one = clone(BASE)
    device = one.open()
    os.truncate(one.base_path, 8 * BLOCK)
    if over == "socket":
        client = connected(device)
        client.send_request(nbd.CMD_READ, 20 * BLOCK, 100)
        assert client.read_answer().error
        client.close()
        assert failures(device) == [
            {"operation": "read", "errno": errno.EIO, "of_base": True, "offset": 20 * BLOCK,
             "length": 100}
        ]  # fmt: skip
    else:
        # Who calls is told by the exception.
        with pytest.raises(EngineFault):
            device.read(20 * BLOCK, 100)
        assert device.take_events() == []


@pytest.mark.parametrize("length", [BLOCK, 600000])
def test_a_full_store_is_told_for_writes_on_both_ways(clone, small_files, length):
    one = clone(BASE, size=4 << 20)
    device = one.open()
    client = connected(device)
    end = os.stat(one.path).st_size
    small_files(end - (4 << 20) + SIZE)
    client.send_request(nbd.CMD_WRITE, 1 << 20, length, b"w" * length)
    assert client.read_answer().error
    client.close()
    (failure,) = failures(device)
    assert (failure["operation"], failure["offset"]) == ("write", 1 << 20)
    assert failure["errno"] == errno.EFBIG
    assert not failure["of_base"]


def test_prefetch_tells_where_the_base_fails(clone):
    one = clone(BASE)
    device = one.open()
    os.truncate(one.base_path, 0)
    device.prefetch_start()
    failure = failures(device)[0]
    assert (failure["operation"], failure["errno"], failure["of_base"]) == (
        "prefetch", errno.EIO, True,
    )  # fmt: skip


def test_what_nobody_fetches_is_counted_and_nothing_is_told_twice(clone):
    one = clone(BASE)
    device = one.open()
    os.truncate(one.base_path, 0)
    client = connected(device)
    for number in range(40):
        client.send_request(nbd.CMD_READ, number * BLOCK, 1)
        assert client.read_answer().error
    client.close()
    events = [event for event in device.take_events() if event[0].startswith("fail")]
    assert [value["offset"] // BLOCK for kind, value in events if kind == "failed"] == [*range(32)]
    assert events[-1] == ("failures_lost", 8)
    assert not [event for event in device.take_events() if event[0].startswith("fail")]


def test_a_refused_request_is_no_failure_of_ours(clone):
    device = clone(BASE).open()
    client = connected(device)
    client.send_request(nbd.CMD_READ, SIZE, 1)
    assert client.read_answer().error
    client.close()
    assert not [event for event in device.take_events() if event[0] == "failed"]
