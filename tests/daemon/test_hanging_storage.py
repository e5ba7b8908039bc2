# SPDX-License-Identifier: Apache-2.0
"""The storage below one device hangs: whatever fvdd asks of it waits, and nobody else does."""

import contextlib
import os
import signal
import threading
import time
from dataclasses import replace

import pytest

from fvdd.config import Limits
from fvdd.devices import adoption, session, snapshot, whereabouts
from fvdengine import patience
from fvdtest.daemon import Daemon, fvdctl, wait_until
from fvdtest.hanging import Hanging
from fvdtest.held import in_background
from fvdtest.model import FlatModel

SIZE = 1 << 20
LIMITS = Limits(ready_timeout=20.0, worker_timeout=3.0)
# The thread of fvdd's loop, as the tests run it.
LOOP = "fvdd"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    for place in (whereabouts, adoption):
        monkeypatch.setattr(place, "LOOK_LIMIT_SECONDS", 0.3)
    monkeypatch.setattr(session, "OWNER_WAIT_SECONDS", 0.3)


@pytest.fixture
def first(tmp_path):
    """An fvdd that others may follow."""
    made = Daemon(tmp_path, restarts=2, limits=LIMITS).start()
    yield made
    made.stop()
    made.kill_workers()


@pytest.fixture
def storage(first, tmp_path, monkeypatch):
    """A folder that can hang, and in it the image of the attached device `hung`."""
    folder = tmp_path / "storage"
    folder.mkdir()
    fvdctl("create", folder / "hung.fvd", "1M")
    fvdctl("create", tmp_path / "other.fvd", "1M")
    first.attach(folder / "hung.fvd")
    first.attach(tmp_path / "other.fvd")
    made = Hanging(monkeypatch, folder)
    yield made
    assert LOOP not in made.waiting, "the loop waited for storage"


@pytest.fixture
def daemon(first, storage):
    """For those whom one is enough."""
    yield first
    first.detach_all()


@contextlib.contextmanager
def following(daemon, **limits):
    """The fvdd after one that has stopped."""
    made = Daemon(daemon.socket.parent, after=daemon, restarts=2, limits=replace(LIMITS, **limits))
    try:
        yield made.start()
    finally:
        made.stop()


def quick(daemon, *words, status=0):
    begin = time.monotonic()
    done = daemon.ctl(*words, check=False)
    assert status in (None, done.returncode), done.stderr
    assert time.monotonic() - begin < 10
    return done


def test_others_are_attached_listed_and_detached(daemon, storage, tmp_path):
    fvdctl("create", tmp_path / "third.fvd", "1M")
    with storage:
        os.kill(daemon.device("hung").worker_pid, signal.SIGKILL)
        wait_until(lambda: storage.waiting, "fvdd to look for the image")
        quick(daemon, "attach", tmp_path / "third.fvd")
        quick(daemon, "detach", "third")
        quick(daemon, "list")
        quick(daemon, "status", "hung")
        quick(daemon, "doctor", status=None)
        refused = quick(daemon, "attach", tmp_path / "other.fvd", "--name", "again", status=5)
        assert "attached already as other" in refused.stderr
        quick(daemon, "detach", "other")


def test_attach_of_what_does_not_answer_is_refused_and_leaves_nothing(daemon, storage, tmp_path):
    fvdctl("create", tmp_path / "storage/new.fvd", "1M")
    with storage:
        refused = quick(daemon, "attach", tmp_path / "storage/new.fvd", status=8)
        assert f"the storage of {tmp_path}/storage/new.fvd does not answer" in refused.stderr
    assert sorted(os.listdir(daemon.state / "devices")) == ["hung", "other"]
    daemon.attach(tmp_path / "storage/new.fvd")


def test_operation_on_the_device_holds_up_nobody_else(daemon, storage, tmp_path):
    """Whatever becomes of it: the loop is not in it, and the device lives."""
    folder = tmp_path / "storage"
    for words in (
        ("snapshot", "hung", folder / "new.fvd"), ("backup", "hung", folder / "copy.raw"),
        ("update", "hung", "num_prefetch_slots=4"), ("upgrade", "hung"),
        ("recover", "hung", "--image", folder / "moved.fvd"), ("set-read-only", "hung", "on"),
    ):  # fmt: skip
        with storage:
            result = in_background(daemon, *words)
            quick(daemon, "list")
        result()
        assert daemon.device("hung").state == "attached", words
    disk = daemon.transport.disks[0]
    assert FlatModel(SIZE, bytes(SIZE)).difference(disk.read(0, SIZE)) is None
    with storage:
        result = in_background(daemon, "detach", "hung")
        quick(daemon, "detach", "other")
    assert result().returncode == 0


def test_adoption_goes_on_with_a_worker_that_serves(first, storage):
    worker = first.device("hung").worker_pid
    first.stop()
    with storage, following(first) as second:
        wait_until(second.settled, "the adoption to end")
        status = second.device("hung")
        assert (status.state, status.worker_pid) == ("attached", worker)
    with following(second) as third:
        wait_until(third.settled, "the adoption to end")
        third.detach_all()


def test_device_is_given_up_although_its_storage_hangs(first, storage, tmp_path):
    first.stop()
    os.kill(first.workers[0], signal.SIGKILL)
    with storage, following(first, worker_timeout=0.5) as second:
        wait_until(lambda: second.device("hung").state == "failed", "it to fail")
        assert "does not answer" in second.device("hung").reason
        quick(second, "detach", "hung", "--discard-unflushed")
        assert list(second.transport.disks) == [1]
    with following(second) as third:
        wait_until(third.settled, "the adoption to end")
        third.attach(tmp_path / "storage/hung.fvd").write(0, b"works")
        third.detach_all()


# The storage of a new file


@pytest.fixture
def frozen(tmp_path, monkeypatch):
    """No folder takes a change."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/rmdir"
    program.write_text("#!/bin/sh\nexec /bin/sleep 600\n")
    program.chmod(0o755)
    monkeypatch.setattr(patience, "PROGRAMS", (str(tmp_path / "bin"),))


@pytest.mark.parametrize("verb", ["snapshot", "backup"])
def test_new_file_on_a_frozen_file_system_is_refused_before_anything_waits(
    daemon, storage, tmp_path, frozen, verb
):
    folder = tmp_path / "frozen"
    folder.mkdir()
    caught = Hanging(pytest.MonkeyPatch(), folder)
    with caught:
        refused = quick(daemon, verb, "other", folder / "new", status=8)
    assert f"the storage of {folder}/new does not answer" in refused.stderr
    assert caught.waiting == set()
    assert os.listdir(folder) == []
    assert daemon.device("other").state == "attached"


def test_device_serves_while_its_new_image_waits_for_storage(
    daemon, storage, tmp_path, monkeypatch
):
    """The storage hangs as the image is made, and answers when nobody waits any more."""
    make, waits, goes_on = snapshot.create_over, threading.Event(), threading.Event()

    def slow(*arguments):
        waits.set()
        assert goes_on.wait(60)
        made.append(make(*arguments))
        return made[0]

    made = []
    monkeypatch.setattr(snapshot, "create_over", slow)
    monkeypatch.setattr(snapshot, "MAKE_LIMIT_SECONDS", 1.0)
    new, disk = tmp_path / "new.fvd", daemon.transport.disks[1]
    worker = daemon.device("other").worker_pid
    result = in_background(daemon, "snapshot", "other", new)
    assert waits.wait(30)
    disk.write(0, b"goes on")
    refused = result()
    assert f"the storage of {new} does not answer" in refused.stderr
    assert "other goes on as before" in refused.stderr
    goes_on.set()
    wait_until(lambda: made and not new.exists(), "what was made late to be removed")
    assert daemon.device("other").worker_pid == worker
    monkeypatch.setattr(snapshot, "create_over", make)
    monkeypatch.setattr(snapshot, "MAKE_LIMIT_SECONDS", 30.0)
    daemon.ctl("snapshot", "other", new)
    assert disk.read(0, 7) == b"goes on"


def test_pause_does_not_wait_for_ever_for_the_judgement_of_the_new_image(
    daemon, storage, tmp_path, monkeypatch
):
    """It looks at the bases, which may hang just then."""
    goes_on = threading.Event()
    monkeypatch.setattr(snapshot, "is_as_created", lambda *_: goes_on.wait(60))
    refused = quick(daemon, "snapshot", "other", tmp_path / "new.fvd", status=8)
    goes_on.set()
    assert "does not answer; other goes on as before" in refused.stderr
    assert not (tmp_path / "new.fvd").exists()
    disk = daemon.transport.disks[1]
    disk.write(0, b"goes on")
    assert disk.read(0, 7) == b"goes on"


# The worker


class Slow(Daemon):
    """Its workers begin to work only when they are told to."""

    is_slow = False

    async def _spawn(self, directory):
        worker = await super()._spawn(directory)
        if self.is_slow:
            os.kill(worker.pid, signal.SIGSTOP)
        return worker


def test_attach_whose_image_takes_too_long_to_open_leaves_nothing(tmp_path):
    image = tmp_path / "web.fvd"
    fvdctl("create", image, "1M")
    before = image.read_bytes()
    daemon = Slow(tmp_path, limits=Limits(worker_timeout=0.5)).start()
    try:
        daemon.is_slow = True
        refused = quick(daemon, "attach", image, status=1)
        assert "did not answer in time" in refused.stderr
        assert os.listdir(daemon.state / "devices") == []
        assert image.read_bytes() == before
        daemon.is_slow = False
    finally:
        daemon.stop()
        daemon.kill_workers()
