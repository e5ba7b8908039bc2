# SPDX-License-Identifier: Apache-2.0
"""Somebody else who may write the image of a device while no worker of the device has it open:
he does not get in, and where he did the device does not go on as if nothing had been."""

import asyncio
import os
import signal

import pytest

from fvdd.devices import backup, session, snapshot
from fvdd.devices.adoption import CONTROL_SOCKET
from fvdd.devices.recovery import Recovery
from fvdd.worker.client import WorkerProcess
from fvdengine import overlay
from fvdengine.errors import EngineError
from fvdengine.opening import open_device, open_plan
from fvdengine.overlay import SUFFIX, header_of
from fvdtest.daemon import Daemon, fvdctl, wait_until

FOREIGN = b"INTRUDER" * 1024


def intrude(path):
    """Write to the image as another program would; whether that was let in."""
    try:
        plan = open_plan(path)
    except EngineError:
        return False
    with plan:
        device = open_device(plan)
        device.start()
        device.write(0, FOREIGN)
        device.flush()
        device.close()
    return True


@pytest.fixture
def intruder(monkeypatch):
    """Tries to get in around every step between two workers; the places where he was let in."""
    paths, found = [], []

    def around(module, name):
        call = getattr(module, name)

        def attempt(when):
            found.extend((path, when, name) for path in paths if path.exists() and intrude(path))

        async def waited(*args, **kwargs):
            attempt("before")
            try:
                return await call(*args, **kwargs)
            finally:
                attempt("after")

        def plain(*args, **kwargs):
            attempt("before")
            try:
                return call(*args, **kwargs)
            finally:
                attempt("after")

        monkeypatch.setattr(module, name, waited if asyncio.iscoroutinefunction(call) else plain)

    around(snapshot.supervise, "stop_worker")
    around(snapshot.supervise, "open_in")
    around(snapshot, "_make")
    around(session, "store_record")
    around(backup.overlay, "put_over")
    around(backup.overlay, "put_back")
    around(backup, "_watched")
    return paths, found


def operations(daemon, verb, folder):
    if verb == "snapshot":
        daemon.ctl("snapshot", "web", folder / "new.fvd")
    elif verb == "backup":
        daemon.ctl("backup", "web", folder / "copy.raw")
    else:
        daemon.ctl("set-read-only", "web", "on")
        daemon.ctl("set-read-only", "web", "off")


@pytest.mark.parametrize("verb", ["snapshot", "backup", "set-read-only"])
def test_nobody_else_writes_between_two_workers(daemon, clone, intruder, verb):
    image, model = clone()
    disk = daemon.attach(image)
    disk.write(0, b"ours" * 2048)
    model.write(0, b"ours" * 2048)
    paths, found = intruder
    paths += [image, image.parent / (image.name + SUFFIX), image.parent / "new.fvd"]
    operations(daemon, verb, image.parent)
    paths.clear()
    assert found == []
    assert model.difference(disk.read(0, model.size)) is None
    assert (daemon.device("web").state, daemon.device("web").restarts) == ("attached", 0)
    disk.write(5000, b"more")
    daemon.ctl("detach", "web")
    assert fvdctl("check", image).returncode == 0


def test_nobody_else_writes_what_is_copied_when_all_who_have_it_open_die(
    daemon, clone, monkeypatch
):
    image, model = clone()
    disk = daemon.attach(image)
    base = image.parent / (image.name + SUFFIX)
    watched, found = backup._watched, []

    async def killed(worker, limit, op, fd, arguments):
        if op == "copy_out":
            for pid in (worker.pid, int(daemon._app.registry.devices[0].record.worker_pid)):
                os.kill(pid, signal.SIGKILL)
                wait_until(lambda pid=pid: has_died(pid), "its end")
            found.append(intrude(base))
        return await watched(worker, limit, op, fd, arguments)

    monkeypatch.setattr(backup, "_watched", killed)
    done = daemon.ctl("backup", "web", image.parent / "copy.raw", check=False)
    assert done.returncode == 1
    assert found == [False]
    wait_until(lambda: daemon.device("web").state == "attached", "a successor")
    assert model.difference(disk.read(0, model.size)) is None
    daemon.ctl("detach", "web")
    assert fvdctl("check", image).returncode == 0


def has_died(pid):
    """Whether a process is gone, or only waits for its parent to notice."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(") ")[2].startswith("Z")
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("how", ["attached so", "changed", "after a restart"])
def test_nobody_writes_what_a_device_reads_while_it_has_no_worker(
    relay, clone, monkeypatch, how
):
    image, model = clone()
    daemon = relay.running
    disk = daemon.attach(image, *(["-r"] if how == "attached so" else []))
    if how != "attached so":
        daemon.ctl("set-read-only", "web", "on")
    if how == "after a restart":
        relay.stop()
        daemon = relay.next()
    end_of, found = Recovery._end_of, []

    async def then(recovery, worker):
        found.append(intrude(image))
        return await end_of(recovery, worker)

    monkeypatch.setattr(Recovery, "_end_of", then)
    os.kill(daemon.device("web").worker_pid, signal.SIGKILL)
    wait_until(lambda: daemon.device("web").restarts == 1, "a successor")
    assert found == [False]
    assert model.difference(disk.read(0, model.size)) is None
    daemon.ctl("detach", "web")
    assert intrude(image), "nobody holds it any more"


@pytest.fixture
def closed(tmp_path, clone):
    """A device without fvdd, whose worker has closed the image clean: as between two workers."""
    image, model = clone()
    first = Daemon(tmp_path).start()
    disk = first.attach(image)
    disk.write(0, b"ours" * 2048)
    model.write(0, b"ours" * 2048)
    first.stop()

    async def close():
        place = str(first.state / "devices" / "web" / CONTROL_SOCKET)
        worker = await WorkerProcess.connect(place, 10.0)
        await worker.request("stop", timeout=10.0)
        await worker.close()

    asyncio.run(close())
    assert header_of(str(image)).is_clean
    wait_until(lambda: not in_use(image), "the worker to let go")

    def come_back(*, gone=False):
        if gone:
            first.transport.disks.clear()
        daemon = Daemon(tmp_path, after=first).start()
        wait_until(daemon.settled, "the adoption to end")
        return daemon

    yield image, model, disk, come_back
    first.kill_workers()


def in_use(image):
    try:
        open_plan(image).close()
    except EngineError:
        return True
    return False


def test_goes_on_where_nobody_else_had_the_image(closed):
    _, model, disk, come_back = closed
    daemon = come_back()
    try:
        assert daemon.device("web").state == "attached"
        assert model.difference(disk.read(0, model.size)) is None
        daemon.ctl("detach", "web")
    finally:
        daemon.stop()


def test_does_not_go_on_with_what_somebody_else_has_written(closed):
    image, model, disk, come_back = closed
    assert intrude(image)
    model.write(0, FOREIGN)
    daemon = come_back()
    try:
        status = daemon.device("web")
        assert status.state == "failed"
        assert status.reason == (
            f"{image} was opened for writing by somebody else since the device had it open; "
            "fvdctl recover web --discard-unflushed goes on with what it holds now"
        )
        done = daemon.ctl("recover", "web", check=False)
        assert done.returncode != 0
        assert "by somebody else" in done.stderr
        assert daemon.device("web").state == "failed"
        daemon.ctl("recover", "web", "--discard-unflushed")
        assert daemon.device("web").state == "attached"
        assert model.difference(disk.read(0, model.size)) is None
        daemon.ctl("detach", "web")
        assert header_of(str(image)).is_clean
    finally:
        daemon.stop()


def test_where_nobody_uses_the_device_any_more_what_somebody_else_did_is_his(closed):
    image, _, disk, come_back = closed
    assert intrude(image)
    session_after = overlay.session_of(str(image))
    disk.disconnect()
    daemon = come_back(gone=True)
    try:
        daemon.ctl("detach", "web")
        assert not (daemon.state / "devices" / "web").exists()
        assert overlay.session_of(str(image)) == session_after
    finally:
        daemon.stop()
