# SPDX-License-Identifier: Apache-2.0
"""class Device: arguments, life, events, faults; what happens in the engine is tested below it."""

import errno
import gc
import os
import select
import socket
import sys

import pytest

from fvdcore import Device, EngineFault
from fvdengine.header import Header

BLOCK = 4096
SIZE = 64 * BLOCK
BASE = bytes(range(256)) * (SIZE // 256)


@pytest.fixture
def device(clone):
    return clone(BASE).open(crew_threads=2)


@pytest.fixture
def descriptors(clone):
    """Open descriptors of an image and its base."""
    one = clone(BASE)
    fds = os.open(one.path, os.O_RDWR), os.open(one.base_path, os.O_RDONLY)
    yield fds
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize(
    ("layers", "options"),
    [
        ([], {}), ([("raw",)], {}), ([("fvd",), ("qcow2",)], {}),
        ([("raw",), ("fvd",)], {}), ([("fvd",), ("raw",), ("raw",)], {}),
        ([("fvd",), ("raw",)], {"boot_id": b"short"}),
        ([("fvd",), ("raw",)], {"crew_threads": 0}),
        ([("fvd",), ("raw",)], {"crew_threads": 33}),
        ([("fvd",)] * 66, {}),
    ],
    ids=["none", "raw top", "unknown", "raw above", "two raw", "boot_id", "0 threads",
         "33 threads", "66 layers"],
)  # fmt: skip
def test_bad_arguments_are_value_errors(descriptors, layers, options):
    with pytest.raises(ValueError, match="layer|images|boot_id|crew_threads"):
        Device.open([(descriptors[0], kind) for (kind,) in layers], **options)


def test_a_failed_open_says_why_and_writes_nothing(descriptors):
    before = os.pread(descriptors[0], 1 << 20, 0)
    with pytest.raises(EngineFault, match="needs a base") as caught:
        Device.open([(descriptors[0], "fvd")])
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(EngineFault) as caught:
        Device.open([(descriptors[1], "fvd"), (descriptors[1], "raw")])
    assert caught.value.reason == "not an FVD image"
    with pytest.raises(EngineFault) as caught:
        Device.open([(999, "fvd"), (descriptors[1], "raw")])
    assert caught.value.errno == errno.EBADF
    with pytest.raises(EngineFault) as caught:
        Device.open([(descriptors[0], "fvd"), (descriptors[1], "raw")], stats_fd=descriptors[1])
    assert caught.value.errno == errno.EINVAL
    assert os.pread(descriptors[0], 1 << 20, 0) == before


def test_descriptors_stay_the_caller_s(descriptors):
    device = Device.open([(descriptors[0], "fvd"), (descriptors[1], "raw")])
    device.close()
    assert all(os.fstat(fd) for fd in descriptors)


def test_what_the_device_says_of_itself(clone):
    one = clone(BASE, size=SIZE * 2, block_size=8192)
    device = one.open()
    header = Header.unpack(one.path.read_bytes()[:8192])
    assert (device.size, device.base_size, device.block_size) == (SIZE * 2, SIZE, 8192)
    assert device.image_uuid == header.extension.image_uuid
    assert device.open_session == header.extension.open_session
    assert device.read_only is False
    status = device.status()
    assert status["base_bytes_left"] == SIZE
    assert (status["prefetch_state"], status["connections"]) == ("disabled", 0)
    device.write(0, b"x")
    assert device.status()["base_bytes_left"] == SIZE - 8192
    assert device.status()["pending_blocks"] == 1
    device.flush()
    assert device.status()["pending_blocks"] == 0


@pytest.mark.parametrize(
    "call",
    [lambda d: d.read(-1, 1), lambda d: d.read(0, -1), lambda d: d.read(SIZE, 1),
     lambda d: d.read(2**64, 1), lambda d: d.read(1, 2**64), lambda d: d.write(SIZE - 1, b"xx"),
     lambda d: d.trim(1, SIZE), lambda d: d.write_zeroes(SIZE + 1, 0),
     lambda d: d.block_status(0, SIZE + 1), lambda d: d.write(-5, b"")],
)  # fmt: skip
def test_ranges_outside_the_disk_are_value_errors(device, call):
    with pytest.raises(ValueError, match="leave the disk"):
        call(device)
    assert device.status()["in_flight"] == 0


def test_data_come_from_any_buffer(device):
    device.write(0, bytearray(b"one"))
    device.write(3, memoryview(b"..two..")[2:5])
    with pytest.raises(TypeError):
        device.write(0, "text")
    assert device.read(0, 6) == b"onetwo"
    assert device.read(5, 0) == b""
    device.write(SIZE, b"")


def test_block_status_by_name(device):
    device.write(BLOCK, b"x" * BLOCK)
    device.write_zeroes(2 * BLOCK, BLOCK)
    assert device.block_status(0, SIZE) == [
        (BLOCK, "base"), (BLOCK, "data"), (BLOCK, "zero"), (SIZE - 3 * BLOCK, "base")]  # fmt: skip
    assert device.block_status(5, 0) == []


def test_a_read_only_device_refuses_changes(clone):
    one = clone(BASE)
    before = one.path.read_bytes()
    device = one.open(read_only=True)
    assert device.read_only is True
    for call in (lambda: device.write(0, b"x"), lambda: device.trim(0, BLOCK),
                 lambda: device.write_zeroes(0, BLOCK)):  # fmt: skip
        with pytest.raises(EngineFault) as caught:
            call()
        assert caught.value.errno == errno.EROFS
    with pytest.raises(ValueError, match="read-only"):
        device.prefetch_start()
    device.flush()
    one.close()
    assert one.path.read_bytes() == before


def test_a_fault_names_operation_and_place(clone):
    one = clone(BASE)
    device = one.open()
    os.truncate(one.base_path, 5 * BLOCK)
    with pytest.raises(EngineFault) as caught:
        device.read(6 * BLOCK, 100)
    assert (caught.value.errno, caught.value.where) == (errno.EIO, "read")
    assert caught.value.offset == 6 * BLOCK
    assert device.read(0, BLOCK) == BASE[:BLOCK]


CALLS = {
    "read": lambda d: d.read(0, 1), "write": lambda d: d.write(0, b"x"),
    "trim": lambda d: d.trim(0, 1), "write_zeroes": lambda d: d.write_zeroes(0, 1),
    "flush": lambda d: d.flush(), "block_status": lambda d: d.block_status(0, 1),
    "status": lambda d: d.status(), "start": lambda d: d.start(),
    "connections": lambda d: d.connections(), "take_events": lambda d: d.take_events(),
    "prefetch_start": lambda d: d.prefetch_start(), "size": lambda d: d.size,
    "prefetch_pause": lambda d: d.prefetch_pause(), "drain": lambda d: d.drain(1),
    "event_fd": lambda d: d.event_fd, "counter": lambda d: d.counter(0),
    "serve": lambda d: d.serve(-1), "image_uuid": lambda d: d.image_uuid,
}  # fmt: skip


@pytest.mark.parametrize("end", ["close", "abandon"])
def test_after_the_end_every_call_says_so(device, end):
    getattr(device, end)()
    for call in CALLS.values():
        with pytest.raises(ValueError, match="closed"):
            call(device)
    device.close()
    device.abandon()
    device.close()


def test_close_leaves_the_image_clean_and_abandon_does_not(clone):
    one = clone(BASE)
    one.open().write(0, b"kept")
    one.close()
    assert Header.unpack(one.path.read_bytes()[:8192]).is_clean
    device = one.open()
    device.write(BLOCK, b"lost")
    device.abandon()
    assert not Header.unpack(one.path.read_bytes()[:8192]).is_clean
    again = one.open()
    assert (again.read(0, 4), again.read(BLOCK, 4)) == (b"kept", BASE[:4])


def test_threads_hold_a_reference(descriptors):
    device = Device.open([(descriptors[0], "fvd"), (descriptors[1], "raw")])
    before = sys.getrefcount(device)
    device.start()
    assert sys.getrefcount(device) == before + 1
    device.close()
    assert sys.getrefcount(device) == before


def test_a_forgotten_device_that_never_started_is_released(descriptors):
    files = len(os.listdir("/proc/self/fd"))
    device = Device.open([(descriptors[0], "fvd"), (descriptors[1], "raw")])
    del device
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= files


def test_serving_needs_threads_and_a_socket(clone, descriptors):
    device = Device.open([(descriptors[0], "fvd"), (descriptors[1], "raw")])
    mine, theirs = socket.socketpair()
    with pytest.raises(ValueError, match="start"):
        device.serve(theirs.fileno())
    device.start()
    device.start()
    no_socket = os.open("/dev/null", os.O_RDWR)
    with pytest.raises(EngineFault) as caught:
        device.serve(no_socket)
    assert caught.value.errno == errno.ENOTSOCK
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(no_socket)
    assert device.connections() == []
    mine.close()
    theirs.close()
    device.close()


def test_connections_have_ids_and_their_end_is_an_event(device, wait_until):
    ends = []
    for expected in (1, 2, 3):
        mine, theirs = socket.socketpair()
        assert device.serve(theirs.detach()) == expected
        ends.append(mine)
    assert device.connections() == [1, 2, 3]
    assert device.status()["connections"] == 3
    assert select.select([device.event_fd], [], [], 0)[0] == []
    ends[1].close()
    assert select.select([device.event_fd], [], [], 10)[0] == [device.event_fd]
    assert device.take_events() == [("connection_closed", 2)]
    assert device.take_events() == []
    assert device.connections() == [1, 3]
    mine, theirs = socket.socketpair()
    assert device.serve(theirs.detach()) == 4, "an id is never used again"
    for end in (ends[0], ends[2], mine):
        end.close()
    wait_until(lambda: device.connections() == [], "all to end")


def test_all_places_taken_is_said_and_the_socket_closed(device):
    ends = []
    for _ in range(64):
        mine, theirs = socket.socketpair()
        device.serve(theirs.detach())
        ends.append(mine)
    mine, theirs = socket.socketpair()
    with pytest.raises(EngineFault) as caught:
        device.serve(theirs.detach())
    assert caught.value.errno == errno.EMFILE
    assert mine.recv(1) == b""
    for end in [*ends, mine]:
        end.close()


def test_prefetch_is_told_as_an_event(device, wait_until):
    device.prefetch_start()
    wait_until(lambda: device.status()["prefetch_state"] == "done", "prefetch")
    assert select.select([device.event_fd], [], [], 10)[0]
    assert ("prefetch", 4) in device.take_events()
    assert device.status()["base_bytes_left"] == 0
    assert device.read(0, SIZE) == BASE


def test_draining_answers_what_was_received_and_ends_connections(device):
    mine, theirs = socket.socketpair()
    device.serve(theirs.detach())
    assert device.drain(10) is True
    assert mine.recv(1) == b""
    mine.close()
    assert device.connections() == []
    assert device.read(0, 4) == BASE[:4], "the device itself goes on"
    again, theirs = socket.socketpair()
    device.serve(theirs.detach())
    again.close()


def test_many_threads_use_one_device(device, task):
    def work(number):
        for turn in range(20):
            data = bytes([number, turn]) * 1000
            device.write(number * 8 * BLOCK + turn * 1000, data)
            assert device.read(number * 8 * BLOCK + turn * 1000, 2000) == data
            device.flush()

    for worker in [task(work, number) for number in range(6)]:
        worker.result(30)
    assert device.status()["in_flight"] == 0
