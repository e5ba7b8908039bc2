# SPDX-License-Identifier: Apache-2.0
"""A copy of a disk whose image has no name to give up: made beside its requests.

The image is a file here, taken for a block device: kernel/test_life.py has a real one.
"""

import os
import random
import signal
import threading

import pytest

from fvdd.devices import backup
from fvdd.worker.client import WorkerProcess
from fvdtest.daemon import running_daemon, wait_until
from fvdtest.marks import in_proof
from fvdtest.model import FlatModel


@pytest.fixture(scope="module")
def one_daemon(tmp_path_factory):
    with running_daemon(tmp_path_factory.mktemp("fvdd")) as running:
        yield running


@pytest.fixture
def daemon(one_daemon):
    yield one_daemon
    one_daemon.detach_all()


@pytest.fixture(autouse=True)
def block_device(monkeypatch):
    monkeypatch.setattr(backup, "_is_file", lambda image: False)


@pytest.fixture
def at_step(monkeypatch):
    """Let something be done in this process before the worker is asked for a step."""
    exchange = WorkerProcess.exchange
    todo = {}

    async def told(self, op, fds=(), **arguments):
        action = todo.pop(arguments.get("step"), None) if op == "mirror" else None
        if action is not None:
            action(self)
        return await exchange(self, op, fds, **arguments)

    monkeypatch.setattr(WorkerProcess, "exchange", told)
    return todo


class Writer(threading.Thread):
    """Changes a disk in every way; `state` is what it holds, and what is under way."""

    def __init__(self, disk, model):
        super().__init__()
        self.disk, self.model = disk, model
        self.pending = (0, b"")
        self.count = 0
        self.ending = threading.Event()
        self.failure = None

    def run(self):
        source = random.Random(5)
        try:
            while not self.ending.wait(0.002):  # it shares this process with fvdd
                self.change(source)
                self.count += 1
        except BaseException as error:
            self.failure = error

    def change(self, source):
        length = 4096 * source.choice([1, 3, 40])
        offset = 4096 * source.randrange((self.model.size - length) // 4096)
        data = source.randbytes(length) if source.random() < 0.7 else bytes(length)
        self.pending = (offset, data)
        if any(data):
            self.disk.write(offset, data, fua=source.random() < 0.2)
        else:
            self.disk.write_zeroes(offset, length)
        self.model.write(offset, data)

    def state(self):
        """What the disk must hold, without and with the change that is under way."""
        while True:
            pending = self.pending
            kept = FlatModel(self.model.size, self.model.read(0, self.model.size))
            after = FlatModel(kept.size, kept.read(0, kept.size))
            after.write(*pending)
            if self.pending is pending:  # else it was noting a change that has been answered
                return kept, after

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, kind, error, trace):
        self.ending.set()
        self.join(60)
        assert self.failure is None


def leftovers(folder):
    return [name for name in os.listdir(folder) if "backup" in name or ".part" in name]


@pytest.mark.parametrize("connections", [in_proof(1), 2])
def test_copy_is_the_disk_at_the_end_of_the_copying(
    daemon, clone, tmp_path, at_step, connections
):
    image, model = clone()
    disk = daemon.attach(image, "--connections", connections)
    states = []

    def note(worker):
        states[:] = writer.state()
        at_step["end"] = note  # there is another end where too much was left at this one

    with Writer(disk, model) as writer:
        at_step["end"] = note
        begun = writer.count
        done = daemon.ctl("backup", "web", tmp_path / "copy.raw")
        assert writer.count > begun
    assert "paused" in done.stderr
    copy = (tmp_path / "copy.raw").read_bytes()
    assert None in [state.difference(copy) for state in states]
    assert model.difference(disk.read(0, model.size)) is None
    assert (disk.deaths, disk.resent) == (0, 0)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("step", [in_proof("begin"), "copy", in_proof("end")])
def test_worker_that_dies_costs_the_backup_alone(daemon, clone, tmp_path, at_step, step):
    image, model = clone()
    disk = daemon.attach(image)
    dead = daemon.device("web").worker_pid
    at_step[step] = lambda worker: os.kill(worker.pid, signal.SIGKILL)
    with Writer(disk, model):
        assert daemon.ctl("backup", "web", tmp_path / "copy.raw", check=False).returncode != 0
        wait_until(lambda: daemon.device("web").worker_pid not in (dead, None), "the successor")
        wait_until(lambda: daemon.device("web").state == "attached", "the end of the recovery")
    assert not (tmp_path / "copy.raw").exists()
    assert leftovers(tmp_path) == []
    assert model.difference(disk.read(0, model.size)) is None
    daemon.ctl("backup", "web", tmp_path / "copy.raw")
    assert model.difference((tmp_path / "copy.raw").read_bytes()) is None


def test_trace_that_is_taken_is_named_and_the_device_goes_on(daemon, clone, tmp_path):
    image, model = clone()
    disk = daemon.attach(image)
    with daemon.client() as client, client.trace("web", 30.0) as trace:
        next(iter(trace))
        refused = daemon.ctl("backup", "web", tmp_path / "copy.raw", check=False)
    assert refused.returncode != 0
    assert "a trace of this device is being taken" in refused.stderr
    assert leftovers(tmp_path) == []
    assert (disk.deaths, disk.resent) == (0, 0)
    assert model.difference(disk.read(0, model.size)) is None


def test_disk_that_grows_meanwhile_is_copied_with_its_new_size(
    daemon, clone, tmp_path, monkeypatch
):
    image, model = clone()
    disk = daemon.attach(image)
    size = model.size + (1 << 20)
    held, go_on = threading.Event(), threading.Event()
    exchange = WorkerProcess.exchange

    async def slow(self, op, fds=(), **arguments):
        answer = await exchange(self, op, fds, **arguments)
        if arguments.get("step") == "copy":
            held.set()
            while not go_on.is_set():
                await exchange(self, "ping", timeout=10)
        return answer

    monkeypatch.setattr(WorkerProcess, "exchange", slow)
    thread = threading.Thread(target=lambda: daemon.ctl("backup", "web", tmp_path / "copy.raw"))
    thread.start()
    assert held.wait(30)
    daemon.ctl("resize", "web", size)
    disk.write(size - 4096, b"n" * 4096)
    go_on.set()
    thread.join(60)
    copy = (tmp_path / "copy.raw").read_bytes()
    assert copy == disk.read(0, size)
    assert copy.endswith(b"n" * 4096)


def test_disk_that_changes_faster_than_it_is_copied_is_given_up(
    daemon, clone, tmp_path, monkeypatch
):
    image, model = clone()
    disk = daemon.attach(image)
    exchange = WorkerProcess.exchange
    steps = []

    async def never_done(self, op, fds=(), **arguments):
        steps.append(arguments.get("step"))
        if steps[-1] == "end":
            return {"written": 0, "done": False}, []
        return await exchange(self, op, fds, **arguments)

    monkeypatch.setattr(WorkerProcess, "exchange", never_done)
    refused = daemon.ctl("backup", "web", tmp_path / "copy.raw", check=False)
    monkeypatch.setattr(WorkerProcess, "exchange", exchange)
    assert "changes faster than it can be copied" in refused.stderr
    assert refused.returncode == 5
    assert steps.count("end") == backup.ENDS_MAX
    assert steps[-1] == "drop"
    assert leftovers(tmp_path) == []
    assert not (tmp_path / "copy.raw").exists()
    # The trace is free again.
    daemon.ctl("backup", "web", tmp_path / "copy.raw")
    assert model.difference((tmp_path / "copy.raw").read_bytes()) is None
    assert (disk.deaths, disk.resent) == (0, 0)
