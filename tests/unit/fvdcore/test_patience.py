# SPDX-License-Identifier: Apache-2.0
"""Reads of a base that hangs: waited for so long, and harmless when they come back."""

import errno
import os
import time

import pytest

NOWAIT = 1
DATA, ZERO = 0, 1
SIZE = 1 << 20
PIECE = 262144
READERS = 32
SHORT = 0.05


@pytest.fixture
def content():
    return os.urandom(SIZE)


@pytest.fixture
def store(probes, content):
    return probes.storage.Storage(content)


@pytest.fixture
def patient(probes, store):
    """Make one: patient(timeout). What still hangs in it at the end is let go."""
    made = []

    def make(timeout=10.0):
        made.append(probes.patience.Patient(store, timeout))
        return made[-1]

    yield make
    for kind in ("read", "status"):
        store.release(kind)
    for one in made:
        one.close()


@pytest.fixture
def hung(store, wait_until):
    """Hold the store's reads; wait for so many to hang: hung(3)."""
    store.hold("read")
    return lambda count: wait_until(lambda: store.waiting("read") == count, f"{count} reads")


def read(patient, length, offset, flags=0):
    buffer = bytearray(length)
    rc = patient.read_into(buffer, offset, flags)
    return rc if rc < 0 else bytes(buffer)


@pytest.mark.parametrize("length", [1, 4096, PIECE, PIECE + 1, SIZE - 7])
def test_reads_what_is_there(patient, content, length):
    assert read(patient(), length, 7) == content[7 : 7 + length]


def test_more_callers_than_readers_are_all_served(patient, content, task):
    one = patient()
    tasks = [task(read, one, 4096, at * 4096) for at in range(2 * READERS)]
    for at, reading in enumerate(tasks):
        assert reading.result() == content[at * 4096 : (at + 1) * 4096]
    assert one.readers <= READERS


def test_one_caller_needs_one_reader(patient):
    one = patient()
    for at in range(20):
        read(one, 512, at * 512)
        assert one.readers <= 1


def test_readers_without_work_end_and_others_begin(patient, content, task, wait_until):
    one = patient()
    for at in range(2):
        tasks = [task(read, one, 512, at * 512) for _ in range(READERS)]
        assert {reading.result() for reading in tasks} == {content[at * 512 : at * 512 + 512]}
        wait_until(lambda: one.readers == 0, "the readers to end")


def test_what_is_in_memory_needs_none(patient, content):
    one = patient()
    assert read(one, 512, 0, NOWAIT) == -errno.EAGAIN
    one.cached = True
    assert read(one, 512, 0, NOWAIT) == content[:512]
    assert read(one, 512, 0) == content[:512]
    assert one.readers == 0


def test_errors_are_passed_on(patient, store):
    store.fail("read", errno.EREMOTEIO)
    assert read(patient(), 512, 0) == -errno.EREMOTEIO


def test_holes_are_told(probes):
    one = probes.patience.Patient(probes.storage.Storage(bytes(8192) + b"x" * 8192))
    assert one.status(16384, 0) == (ZERO, 8192)
    assert one.status(4096, 8192) == (DATA, 4096)
    one.close()


def test_nothing_is_ever_changed(patient, store, content):
    assert patient().changes() == [-errno.EROFS] * 3 + [0]
    assert store.content() == content


def test_a_read_that_hangs_is_an_error_and_its_answer_goes_nowhere(
    patient, store, hung, wait_until
):
    one = patient(SHORT)
    buffer = bytearray(b"-" * 4096)
    begin = time.monotonic()
    assert one.read_into(buffer, 0) == -errno.EIO
    assert time.monotonic() - begin >= SHORT
    hung(1)
    store.release("read")
    one.close()
    wait_until(lambda: one.closed == 1, "the late answer")
    assert buffer == b"-" * 4096


def test_when_all_readers_hang_the_next_waits_its_time_and_all_comes_back(
    patient, store, content, task, wait_until
):
    one = patient(SHORT)
    store.hold("read")
    while store.waiting("read") < READERS:
        tasks = [task(read, one, 512, 0) for _ in range(READERS)]
        assert {reading.result() for reading in tasks} == {-errno.EIO}
    assert read(one, 512, 0) == -errno.EIO
    assert one.readers == READERS
    store.release("read")
    wait_until(lambda: read(one, 512, 512) == content[512:1024], "a reader to be back")


def test_a_status_that_hangs_says_data(patient, store):
    store.hold("status")
    assert patient(SHORT).status(4096, 0) == (DATA, 4096)


def test_an_interrupt_ends_all_waiting(patient, hung, task, wait_until, store):
    one = patient(600.0)
    tasks = [task(read, one, 512, 0) for _ in range(READERS + 5)]
    hung(READERS)
    one.interrupt()
    assert {reading.result() for reading in tasks} == {-errno.EIO}
    assert read(one, 512, 0) == -errno.EIO


def test_the_end_does_not_wait_for_what_hangs_which_closes_the_store_later(
    patient, store, hung, wait_until
):
    one = patient(SHORT)
    assert read(one, 512, 0) == -errno.EIO
    hung(1)
    one.close()
    assert one.closed == 0
    store.release("read")
    wait_until(lambda: one.closed == 1, "the reader to close what it read from")
    one.close()
    assert one.closed == 1
