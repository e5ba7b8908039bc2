# SPDX-License-Identifier: Apache-2.0
"""Killed workers: the device pauses, a successor goes on, no acknowledged write is lost."""

import os
import random
import signal
import threading

import pytest

from fvdd.attach.attachment import AttachError
from fvdd.log import fields_of
from fvdtest.daemon import wait_until
from fvdtest.marks import in_proof
from fvdtest.standin import StandInAttachment

MIB = 1 << 20


def kill_worker(daemon, name="web"):
    """Kill the worker that serves now, and return its number."""
    pid = daemon.device(name).worker_pid
    os.kill(pid, signal.SIGKILL)
    return pid


def recovered(daemon, dead, name="web"):
    """Whether another worker serves now."""
    status = daemon.device(name)
    return status.state == "attached" and status.worker_pid not in (None, dead)


def test_killed_worker_is_succeeded_and_nothing_is_lost(daemon, clone):
    image, model = clone()
    disk = daemon.attach(image)
    for number in range(64):
        offset = number * 100_003
        disk.write(offset, bytes([number + 1]) * 777)
        model.write(offset, bytes([number + 1]) * 777)
    dead = kill_worker(daemon)
    # Never flushed, and the next read already waits for the successor.
    assert model.difference(disk.read(0, model.size)) is None
    wait_until(lambda: recovered(daemon, dead), "the successor")
    assert daemon.device("web").restarts == 1
    daemon.ctl("detach", "web")
    disk = daemon.attach(image)
    assert model.difference(disk.read(0, model.size)) is None


def test_a_death_is_a_warning_that_says_of_what_and_workers_name_their_device(
    daemon, clone, caplog, capfd
):
    daemon.attach(clone()[0])
    dead = kill_worker(daemon)
    wait_until(lambda: recovered(daemon, dead), "the successor")
    (told,) = (one for one in caplog.records if fields_of(one).get("state") == "recovering")
    assert told.levelname == "WARNING"
    assert fields_of(told)["reason"] == f"the worker process {dead} died of signal 9"
    lines = [line for line in capfd.readouterr().err.splitlines() if "logger=fvdd.worker" in line]
    assert lines
    assert all(" name=web" in line for line in lines if "control connection" in line)


def test_whatever_a_worker_dies_of_it_is_succeeded(daemon, clone, caplog):
    """A fault of its own, a failed assertion, memory that cannot be given."""
    image, model = clone()
    disk = daemon.attach(image)
    for number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS):
        disk.write(number, b"%d" % number)
        model.write(number, b"%d" % number)
        dead = daemon.device("web").worker_pid
        os.kill(dead, number)
        wait_until(lambda dead=dead: recovered(daemon, dead), "the successor")
        reasons = {str(fields_of(one).get("reason")) for one in caplog.records}
        assert f"the worker process {dead} died of signal {number.value}" in reasons
    assert model.difference(disk.read(0, model.size)) is None


def test_kills_under_load_lose_no_acknowledged_write(daemon, clone, rng: random.Random):
    image, model = clone()
    disk = daemon.attach(image, "--connections", "2")
    stop = threading.Event()
    failures: list[BaseException] = []

    def load() -> None:
        source = random.Random(rng.random())
        try:
            while not stop.is_set():
                offset = source.randrange(0, model.size - 70_000)
                data = source.randbytes(source.randrange(1, 70_000))
                disk.write(offset, data, fua=source.random() < 0.05)
                model.write(offset, data)
                if source.random() < 0.02:
                    disk.flush()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        for _ in range(4):
            dead = kill_worker(daemon)
            wait_until(lambda dead=dead: recovered(daemon, dead), "the successor")
    finally:
        stop.set()
        thread.join(60)
    assert not failures
    assert not thread.is_alive()
    assert model.difference(disk.read(0, model.size)) is None
    counted = daemon.metrics()
    device = (("device", "nbd0"),)
    assert counted[("fvd_device_reconnects_total", (*device, ("reason", "crash")))] == 4
    assert counted[("fvd_io_inflight", device)] == 0
    assert counted[("fvd_device_up", device)] == 1


def test_counters_survive_the_worker(daemon, clone):
    image, _ = clone()
    disk = daemon.attach(image)
    for number in range(10):
        disk.write(number * 4096, b"x" * 4096)
    key = ("fvd_io_requests_total", (("device", "nbd0"), ("op", "write")))
    assert daemon.metrics()[key] == 10
    dead = kill_worker(daemon)
    wait_until(lambda: recovered(daemon, dead), "the successor")
    disk.write(0, b"y")
    assert daemon.metrics()[key] == 11


def test_one_lost_connection_is_replaced_by_the_living_worker(daemon, clone):
    image, model = clone()
    disk = daemon.attach(image, "--connections", "2")
    worker = daemon.device("web").worker_pid
    disk.cut(1)
    wait_until(lambda: daemon.device("web").reconnects == 1, "the fresh connection")
    status = daemon.device("web")
    assert (status.worker_pid, status.restarts) == (worker, 0)
    assert status.connections_alive == 2
    assert model.difference(disk.read(0, model.size)) is None


@pytest.mark.parametrize("restarts", [2])
def test_worker_that_cannot_come_back_leaves_a_failed_device_with_the_reason(daemon, clone):
    image, model = clone()
    disk = daemon.attach(image)
    disk.write(12_345, b"acknowledged")
    model.write(12_345, b"acknowledged")
    base = image.parent / "base.raw"
    base.rename(image.parent / "elsewhere.raw")
    kill_worker(daemon)
    wait_until(lambda: daemon.device("web").state == "failed", "the device to fail")
    assert "base" in daemon.status("web")["reason"]
    assert (daemon.state / "devices/web/live").exists()
    refused = daemon.ctl("detach", "web", check=False)
    assert refused.returncode != 0
    assert "base" in refused.stderr
    # The cause is removed: detach brings it back and closes it; nothing was lost.
    (image.parent / "elsewhere.raw").rename(base)
    daemon.ctl("detach", "web")
    disk = daemon.attach(image)
    assert model.difference(disk.read(0, model.size)) is None


def test_device_that_cannot_be_looked_at_for_a_while_is_tried_again(daemon, clone, monkeypatch):
    daemon.attach(clone()[0])
    looked, exists, reconnect = [], StandInAttachment.exists, StandInAttachment.reconnect

    def no_descriptors():
        looked.append(None)
        return AttachError("kernel_refused", "it cannot be told (Too many open files)")

    def fake_exists(self):
        if len(looked) < 4:
            raise no_descriptors()
        return exists(self)

    async def fake_reconnect(self, sockets):
        if len(looked) < 4:
            raise no_descriptors()
        await reconnect(self, sockets)

    monkeypatch.setattr(StandInAttachment, "exists", fake_exists)
    monkeypatch.setattr(StandInAttachment, "reconnect", fake_reconnect)
    dead = kill_worker(daemon)
    wait_until(lambda: recovered(daemon, dead), "the successor")
    assert len(looked) == 4
    daemon.ctl("detach", "web")


@pytest.mark.parametrize("number", [signal.SIGTERM, in_proof(signal.SIGINT)])
def test_signals_that_ask_do_not_stop_a_worker(daemon, clone, number):
    image, _ = clone()
    disk = daemon.attach(image)
    worker = daemon.device("web").worker_pid
    os.kill(worker, number)
    disk.write(0, b"x")
    assert daemon.device("web").worker_pid == worker


def test_detach_works_while_the_worker_has_just_died(daemon, clone):
    image, model = clone()
    disk = daemon.attach(image)
    disk.write(0, b"last words")
    model.write(0, b"last words")
    kill_worker(daemon)
    daemon.ctl("detach", "web")
    disk = daemon.attach(image)
    assert model.difference(disk.read(0, model.size)) is None
