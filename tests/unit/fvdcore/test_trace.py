# SPDX-License-Identifier: Apache-2.0
"""A trace has exactly what was done, with its thread and place; off, it has nothing."""

import errno
import os
import re
import socket
import threading

import pytest

from fvdapi import tracing
from fvdapi.tracing import EVENT, OPERATIONS, TraceEvent, role_name
from fvdcore import EngineFault
from fvdtest import nbd_client as nbd
from fvdtest import tree
from fvdtest.nbd_client import NbdClient, NbdError

BLOCK = 4096
SIZE = 64 * BLOCK
BASE = os.urandom(SIZE)
RING = 65536


def taken(device):
    """All events that are there."""
    found = []
    while True:
        data, lost = device.trace_take()
        assert lost == 0
        if not data:
            return found
        found += map(TraceEvent._make, EVENT.iter_unpack(data))


def requests(events):
    return [
        (OPERATIONS[event.what], event.offset, event.length, event.result)
        for event in events
        if event.kind == tracing.REQUEST
    ]


def connected(device):
    mine, theirs = socket.socketpair()
    mine.settimeout(20)
    device.serve(theirs.detach())
    return NbdClient(mine)


def test_kinds_operations_and_roles_are_those_of_the_engine():
    text = (tree.ROOT / "cython/fvdcore/trace.pxd").read_text()
    numbers = {name: int(value) for name, value in re.findall(r"TRACE_(\w+) = (\d+)", text)}
    for name in ("REQUEST", "BASE", "COMMIT", "CHECKPOINT", "FLUSH", "PREFETCH", "COPY"):
        assert numbers[name] == getattr(tracing, name)
    assert numbers["EVENT_BYTES"] == EVENT.size
    assert numbers["EVENTS"] == RING
    counters = (tree.ROOT / "cython/fvdcore/counters.pxd").read_text()
    first = {name.lower(): int(value) for name, value in
             re.findall(r"BLOCK_(SHARED|KEEPER|PREFETCH|CREW|CONNECTION) = (\d+)", counters)}
    first["control"] = first.pop("shared")
    assert {name: number for number, name in tracing.ROLES} == first


def test_requests_of_a_connection_are_there_in_their_order(clone):
    device = clone(BASE).open()
    device.trace_start()
    with connected(device) as client:
        client.read(0, 1000)
        client.write(3 * BLOCK + 7, b"w" * 50)
        client.write(8 * BLOCK, b"w" * BLOCK, fua=True)
        client.flush()
        client.trim(8 * BLOCK, BLOCK)
        client.write_zeroes(0, BLOCK)
        with pytest.raises(NbdError):
            client.call(nbd.CMD_READ, SIZE, BLOCK)
        client.read(8 * BLOCK, 2 * BLOCK)
    device.trace_stop()
    events = taken(device)
    assert requests(events) == [
        ("read", 0, 1000, 0),
        ("write", 3 * BLOCK + 7, 50, 0),
        ("write", 8 * BLOCK, BLOCK, 0),
        ("flush", 0, 0, 0),
        ("discard", 8 * BLOCK, BLOCK, 0),
        ("write_zeroes", 0, BLOCK, 0),
        ("read", SIZE, BLOCK, -errno.EINVAL),
        ("read", 8 * BLOCK, 2 * BLOCK, 0),
    ]
    assert [event.sequence for event in events] == list(range(len(events)))
    assert all(event.begin <= event.end for event in events)
    first, last = (
        [event for event in events if event.kind == tracing.REQUEST][at] for at in (0, -1)
    )
    assert (first.source, last.source) == (2, 3)
    roles = {role_name(event.role) for event in events}
    assert "connection 0" in roles
    assert roles <= {"connection 0", "keeper", *(f"crew {number}" for number in range(160))}


def test_reads_of_the_base_and_commits_are_those_that_are_counted(clone):
    device = clone(BASE, copy_on_read=True).open()
    device.trace_start()
    device.read(0, 5 * BLOCK)
    device.write(10 * BLOCK + 1, b"w")
    device.flush()
    events = taken(device)
    by_kind = {kind: [e for e in events if e.kind == kind] for kind in range(7)}
    assert [(e.offset, e.length, e.what) for e in by_kind[tracing.BASE]][0] == (0, 5 * BLOCK, 0)
    assert {e.what for e in by_kind[tracing.BASE]} == {0, 1}
    assert [(e.offset, e.length) for e in by_kind[tracing.COPY]] == [(0, 5 * BLOCK)]
    (commit,) = by_kind[tracing.COMMIT]
    flushes = by_kind[tracing.FLUSH]
    assert flushes
    assert all(commit.begin <= e.begin and e.end <= commit.end for e in flushes)
    assert {e.thread for e in events} == {threading.get_native_id()}
    device.trace_stop()
    device.flush()
    assert taken(device) == []


def test_prefetch_tells_each_byte_once(clone, wait_until):
    device = clone(BASE).open()
    device.trace_start()
    device.prefetch_start()
    wait_until(lambda: device.status()["prefetch_state"] == "done", "prefetch to end")
    events = taken(device)
    stored = [event for event in events if event.kind == tracing.PREFETCH]
    assert sum(event.length for event in stored) == SIZE == device.status()["prefetch_bytes"]
    assert len({event.offset for event in stored}) == len(stored)
    read = [event for event in events if event.kind == tracing.BASE]
    assert sum(event.length for event in read) == SIZE
    assert {tracing.REASONS[event.what] for event in read} == {"prefetch"}
    assert any(event.kind == tracing.CHECKPOINT for event in events)


def test_a_base_that_fails_is_in_it(clone):
    one = clone(BASE)
    device = one.open()
    os.truncate(one.base_path, 8 * BLOCK)
    device.trace_start()
    with pytest.raises(EngineFault):
        device.read(20 * BLOCK, 100)
    events = taken(device)
    assert requests(events) == [("read", 20 * BLOCK, 100, -errno.EIO)]
    (base,) = (event for event in events if event.kind == tracing.BASE)
    assert base.result == -errno.EIO


def test_nothing_is_kept_of_a_trace_that_is_over(clone):
    device = clone(BASE).open()
    device.read(0, BLOCK)
    assert device.trace_take() == (b"", 0)
    device.trace_start()
    device.read(0, BLOCK)
    device.trace_stop()
    device.trace_start()
    assert taken(device) == []
    device.write(0, b"x")
    assert requests(taken(device)) == [("write", 0, 1, 0)]


def test_two_traces_at_once_are_refused(clone):
    device = clone(BASE).open()
    device.trace_start()
    with pytest.raises(EngineFault) as caught:
        device.trace_start()
    assert caught.value.errno == errno.EBUSY
    device.trace_stop()
    device.trace_start()


def test_what_the_ring_cannot_hold_is_counted(clone):
    """Several threads fill it; places and sequence are whole, and what is lost adds up."""
    device = clone(BASE).open()
    device.write(0, b"w" * BLOCK)
    device.flush()  # so that the keeper has nothing to do
    device.trace_start()
    each, threads = 20000, 4

    def work():
        for _ in range(each):
            device.read(0, 1)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    events = []
    while (chunk := device.trace_take())[0]:
        events += map(TraceEvent._make, EVENT.iter_unpack(chunk[0]))
    assert len(events) == RING
    assert [event.sequence for event in events] == list(range(RING))
    assert len(events) + chunk[1] == each * threads
    assert set(requests(events)) == {("read", 0, 1, 0)}
    assert len({event.thread for event in events}) == threads
    # Room again: nothing more is lost.
    device.read(0, 2)
    assert requests(map(TraceEvent._make, EVENT.iter_unpack(device.trace_take()[0]))) == [
        ("read", 0, 2, 0)
    ]


def test_a_reader_beside_the_writers_misses_nothing(clone):
    device = clone(BASE).open()
    device.write(0, b"w" * BLOCK)
    device.flush()  # so that the keeper has nothing to do
    device.trace_start()
    total = 2 * RING
    ended = threading.Event()

    def work():
        for length in range(total):
            device.read(0, 1 + length % 100)
        ended.set()

    worker = threading.Thread(target=work)
    worker.start()
    lengths, lost = [], 0
    while True:
        last = ended.wait(0.001)  # lets the interpreter go, which the other thread needs
        data, lost = device.trace_take()
        lengths += [event[4] for event in EVENT.iter_unpack(data)]
        if last and not data:
            break
    worker.join()
    assert len(lengths) + lost == total
    assert lost > 0 or lengths == [1 + number % 100 for number in range(total)]


def test_a_closed_device_has_no_trace(clone):
    one = clone(BASE)
    device = one.open()
    device.trace_start()
    one.close()
    for call in (device.trace_take, device.trace_stop, device.trace_start):
        with pytest.raises(ValueError, match="closed"):
            call()
