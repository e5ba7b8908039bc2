# SPDX-License-Identifier: Apache-2.0
"""The order of steps of a device's life, with a worker and a kernel that only take notes.

What is proved here is order and undoing: that a failure at any step leaves nothing behind, that a
successor serves before the kernel gets its sockets, that a detach that is refused changes nothing.
"""

import asyncio
import dataclasses
import json
import os
import socket
import time

import pytest

from fvdapi.errors import ApiError
from fvdapi.models import AttachRequest, DeviceState
from fvdd.attach.attachment import AttachError
from fvdd.config import Config, Limits, Restarts
from fvdd.devices import recovery
from fvdd.devices.registry import Registry, StateDirectory
from fvdd.devices.session import Services, Session
from fvdd.worker.client import WorkerError, WorkerLost
from fvdengine.errors import ImageInUse
from fvdengine.opening import lock_owner

SIZE = 1 << 20


class World:
    """The notes, in order; what is to fail; the workers that were started."""

    def __init__(self):
        self.notes = []
        self.failures = {}
        self.failures_once = {}
        self.size = SIZE
        self.workers = []
        self.attachment = None
        self.sockets = []
        self.failed_requests = 0
        self.pings = 0

    def note(self, step):
        self.notes.append(step)
        failure = self.failures_once.pop(step, None) or self.failures.get(step)
        if failure is not None:
            raise failure


class FakeWorker:
    def __init__(self, world, pid):
        self.world, self.pid = world, pid
        self.events = asyncio.Queue()
        self.gone = asyncio.get_running_loop().create_future()
        self.count = 0

    @property
    def is_running(self):
        return not self.gone.done()

    async def request(self, op, fds=(), *, timeout=None, **arguments):
        if not self.is_running:
            raise WorkerLost("gone")
        step = f"open{' takeover' if arguments.get('takeover') else ''}" if op == "open" else op
        if op == "ping":
            self.world.pings += 1
            return {}
        if op == "status":
            return {
                "local_bytes": 4096, "prefetch_state": "running", "prefetch_rate": 7,
                "failed_requests": self.world.failed_requests,
            }  # fmt: skip
        try:
            self.world.note(step)
        except WorkerLost:
            self.die()
            raise
        if op == "open":
            return {"size": self.world.size, "block_size": 4096, "image_uuid": "ab", "flags": 0x16D}
        if op == "serve":
            self.count += len(fds)
            return {"connections": list(range(self.count - len(fds), self.count))}
        if op == "stop":
            self.gone.set_result(0)
        return {}

    def die(self):
        if self.is_running:
            self.gone.set_result(-9)
            self.events.put_nowait({"event": "channel_closed"})

    async def wait(self):
        return await asyncio.shield(self.gone)

    def kill(self):
        if self.is_running:
            self.world.notes.append("kill")
            self.die()

    async def close(self):
        pass


class FakeAttachment:
    def __init__(self, world, spec, sockets):
        self.world, self.spec = world, spec
        self.index, self.device = 3, "/dev/nbd3"
        self.is_there = True
        self.sockets = [sock.dup() for sock in sockets]

    def exists(self):
        return self.is_there

    async def ready(self, wait, timeout):
        self.world.note(f"ready {wait}")

    async def reconnect(self, sockets):
        self.world.note(f"reconnect {len(sockets)}")

    async def wait_dead(self, count, timeout):
        self.world.note("wait_dead")

    def size(self):
        return self.spec.size_bytes

    async def resize(self, size):
        self.world.note(f"resize {size}")
        self.spec = dataclasses.replace(self.spec, size_bytes=size)

    async def scan(self):
        self.world.note("scan")

    async def lock(self):
        self.world.note("lock")

    async def unlock(self):
        self.world.note("unlock")

    async def sync(self):
        self.world.note("sync")

    async def writeback_error(self):
        self.world.note("writeback_error")
        return "Input/output error"

    async def disconnect(self, timeout):
        self.world.note("disconnect")
        await self.abandon()

    async def abandon(self):
        for sock in self.sockets:
            sock.close()


class FakeTransport:
    name = "nbd"

    def __init__(self, world):
        self.world = world

    async def require(self):
        self.world.note("require")

    async def connect(self, spec, sockets):
        assert all(sock.family == socket.AF_UNIX for sock in sockets)
        self.world.note("connect")
        self.world.attachment = FakeAttachment(self.world, spec, sockets)
        return self.world.attachment

    def backends(self):
        return []

    async def adopt(self, spec, index):
        found = self.world.attachment
        self.world.note("adopt")
        return found if found is not None and found.is_there else None


ATTACHED = ["require", "spawn", "open", "serve", "connect", "ready partitions"]
DETACHED = ["lock", "sync", "flush", "disconnect", "stop"]


@pytest.fixture
def world():
    return World()


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "web.fvd"
    path.write_bytes(bytes(4096))
    return path


@pytest.fixture
def registry(world, tmp_path):
    """Builds a registry inside a running loop."""

    def build(restarts=5, hang_timeout=30.0):
        async def spawn(directory):
            world.note("spawn")
            world.workers.append(FakeWorker(world, 1000 + len(world.workers)))
            return world.workers[-1]

        limits = Limits(worker_timeout=5.0, hang_timeout=hang_timeout)
        config = Config(restarts=Restarts(count_max=restarts), limits=limits)
        state = StateDirectory(str(tmp_path / "run"))
        state.devices.mkdir(parents=True, exist_ok=True)
        return Registry(Services(config, FakeTransport(world), spawn), state)

    return build


async def _until(condition, limit=10.0):
    async with asyncio.timeout(limit):
        while not condition():
            await asyncio.sleep(0.002)


def _run(main):
    asyncio.run(asyncio.wait_for(main(), 30))


def test_attach_and_detach_do_their_steps_in_order(world, image, registry, tmp_path):
    async def main():
        devices = registry()
        status = await devices.attach(AttachRequest(image=str(image), connections=2))
        assert world.notes == ATTACHED
        assert (status.name, status.device, status.state) == ("web", "/dev/nbd3", "attached")
        assert (status.local_bytes, status.prefetch.rate_bytes_per_second) == (4096, 7)
        record = json.loads((tmp_path / "run/devices/web/device.json").read_text())
        assert (record["index"], record["size_bytes"], record["flags"]) == (3, SIZE, 0x16D)
        spec = world.attachment.spec
        assert spec.backend == f"fvd:web:{record['attachment']}"
        # Two connections: the timer may not fire before the base had its time.
        assert spec.kernel_timeout == spec.resend_timeout == 90
        world.notes.clear()
        await devices.detach("web")
        assert world.notes == DETACHED
        assert not list((tmp_path / "run/devices").iterdir())
        assert await devices.statuses() == []

    _run(main)


def test_image_is_locked_for_the_whole_attachment(image, registry):
    async def main():
        devices = registry()
        await devices.attach(AttachRequest(image=str(image)))
        with pytest.raises(ImageInUse):
            lock_owner(str(image))
        await devices.detach("web")
        os.close(lock_owner(str(image)))

    _run(main)


@pytest.mark.parametrize(
    ("step", "failure", "code"),
    [
        ("require", AttachError("nbd_module_missing", "no nbd"), "nbd_module_missing"),
        ("spawn", OSError(11, "no more processes"), "worker_failed"),
        ("open", WorkerError("base_missing", "no base", "put it back", {}), "base_missing"),
        ("serve", WorkerError("bad_request", "no", "", {}), "bad_request"),
        ("connect", AttachError("device_busy", "in use"), "device_busy"),
        ("ready partitions", AttachError("node_missing", "no node"), "node_missing"),
    ],
)
def test_failure_undoes_everything_before_it(world, image, registry, tmp_path, step, failure, code):
    async def main():
        devices = registry()
        world.failures[step] = failure
        with pytest.raises(ApiError) as caught:
            await devices.attach(AttachRequest(image=str(image)))
        assert caught.value.code == code
        assert not list((tmp_path / "run/devices").iterdir())
        assert all(not worker.is_running for worker in world.workers)
        assert "disconnect" in world.notes or not step.startswith("ready")
        assert await devices.statuses() == []
        # Nothing is in the way of the next try.
        world.failures.clear()
        assert (await devices.attach(AttachRequest(image=str(image)))).state == "attached"
        await devices.detach("web")

    _run(main)


@pytest.mark.parametrize("failure", [WorkerLost("gone"), TimeoutError()], ids=["dies", "hangs"])
@pytest.mark.parametrize("has_state", [True, False])
def test_worker_that_fails_to_open_leaves_no_session_behind(
    world, image, registry, tmp_path, monkeypatch, failure, has_state
):
    # With live state it may have begun a session: a successor takes over and closes it clean.
    monkeypatch.setattr(Session, "has_live_state", lambda self: has_state)

    async def main():
        devices = registry()
        world.failures["open"] = failure
        with pytest.raises(ApiError, match="the worker di"):
            await devices.attach(AttachRequest(image=str(image)))
        assert all(not worker.is_running for worker in world.workers)
        assert not has_state or world.notes[-3:] == ["spawn", "open takeover", "stop"]
        assert len(world.workers) == 1 + has_state
        assert await devices.statuses() == []
        assert not list((tmp_path / "run/devices").iterdir())

    _run(main)


def test_live_state_is_kept_when_the_image_cannot_be_closed(world, image, registry, tmp_path):
    async def main():
        devices = registry()
        world.failures["connect"] = AttachError("kernel_refused", "no")
        world.failures["stop"] = WorkerError("engine_failed", "disk full", "", {})
        with pytest.raises(ApiError) as caught:
            await devices.attach(AttachRequest(image=str(image)))
        assert caught.value.code == "kernel_refused"
        assert (tmp_path / "run/devices/web").is_dir()
        (status,) = await devices.statuses()
        assert status.state == "failed"
        # Once the cause is gone a detach finishes what was begun.
        world.failures.clear()
        await devices.detach("web")
        assert world.notes[-3:] == ["spawn", "open takeover", "stop"]
        assert not (tmp_path / "run/devices/web").exists()

    _run(main)


def test_size_must_fit_the_sector_size(world, image, registry):
    async def main():
        devices = registry()
        world.size = SIZE + 512
        with pytest.raises(ApiError) as caught:
            await devices.attach(AttachRequest(image=str(image), sector_size=4096))
        assert caught.value.code == "invalid_size"
        assert "--sector-size 512" in caught.value.hint
        assert "connect" not in world.notes
        assert world.notes[-1] == "stop"

    _run(main)


def test_dead_worker_is_replaced_and_serves_before_the_kernel_gets_sockets(world, image, registry):
    async def main():
        devices = registry()
        await devices.attach(AttachRequest(image=str(image)))
        device = devices.device("web")
        world.notes.clear()
        world.workers[0].die()
        await _until(lambda: device.counters.restarts == 1)
        assert world.notes == ["spawn", "open takeover", "serve", "wait_dead", "reconnect 1"]
        status = await devices.status("web")
        assert (status.state, status.restarts, status.worker_pid) == ("attached", 1, 1001)
        await devices.detach("web")

    _run(main)


def test_reader_is_opened_anew_instead_of_taken_over(world, image, registry):
    async def main():
        devices = registry()
        await devices.attach(AttachRequest(image=str(image), read_only=True))
        world.notes.clear()
        world.workers[0].die()
        await _until(lambda: "reconnect 1" in world.notes)
        assert "open" in world.notes
        await devices.detach("web")

    _run(main)


def test_worker_that_keeps_dying_fails_the_device_with_the_reason(world, image, registry, tmp_path):
    async def main():
        devices = registry(restarts=3)
        await devices.attach(AttachRequest(image=str(image)))
        device = devices.device("web")
        world.notes.clear()
        world.failures["open takeover"] = WorkerError("io_failed", "the disk is broken", "", {})
        world.workers[0].die()
        await _until(lambda: device.state is DeviceState.FAILED)
        assert world.notes.count("open takeover") == 3
        status = await devices.status("web")
        assert "the disk is broken" in (status.reason or "")
        assert (tmp_path / "run/devices/web").is_dir()
        # Detach tries once more and says why it cannot.
        with pytest.raises(ApiError) as caught:
            await devices.detach("web")
        assert caught.value.code == "device_failed"
        # The cause is removed: now it works, and the image is closed clean.
        world.failures.clear()
        world.notes.clear()
        await devices.detach("web")
        assert world.notes[-5:] == DETACHED

    _run(main)


def test_lost_connection_is_replaced_while_the_worker_lives(world, image, registry):
    async def main():
        devices = registry()
        await devices.attach(AttachRequest(image=str(image), connections=2))
        device = devices.device("web")
        world.notes.clear()
        world.workers[0].events.put_nowait({"event": "connection_closed", "connection": 1})
        await _until(lambda: device.counters.reconnects == 1)
        assert world.notes == ["serve", "wait_dead", "reconnect 1"]
        assert device.connections_alive == 2
        assert device.counters.restarts == 0
        await devices.detach("web")

    _run(main)


def test_connections_dropped_again_and_again_fail_the_device(world, image, registry):
    async def main():
        devices = registry(restarts=3)
        await devices.attach(AttachRequest(image=str(image)))
        device = devices.device("web")
        for number in range(4):
            world.workers[0].events.put_nowait({"event": "connection_closed", "connection": number})
        await _until(lambda: device.state is DeviceState.FAILED)
        assert device.counters.reconnects == 3

    _run(main)


def test_device_taken_away_by_others_is_closed_clean(world, image, registry, tmp_path):
    async def main():
        devices = registry()
        await devices.attach(AttachRequest(image=str(image)))
        device = devices.device("web")
        world.attachment.is_there = False
        world.failures["reconnect 1"] = AttachError("device_failed", "disconnected by others")
        world.workers[0].events.put_nowait({"event": "connection_closed", "connection": 0})
        await _until(lambda: device.state is DeviceState.FAILED)
        await devices.detach("web")
        assert world.notes[-1] == "stop"
        assert "disconnect" not in world.notes
        assert not (tmp_path / "run/devices/web").exists()

    _run(main)


def test_worker_whose_answer_waited_for_a_stopped_fvdd_is_asked_again(
    world, image, registry, monkeypatch
):
    monkeypatch.setattr(recovery, "LATE_SECONDS", 0.1)
    real, slept = FakeWorker.request, []

    async def request(self, op, fds=(), *, timeout=None, **arguments):
        if op != "ping" or slept:
            return await real(self, op, fds, timeout=timeout, **arguments)
        slept.append(op)
        async with asyncio.timeout(timeout):
            time.sleep(0.4)  # the whole process stands still
            await asyncio.sleep(10)  # and wakes up when the time is over
        return {}

    async def main():
        devices = registry(hang_timeout=0.1)
        await devices.attach(AttachRequest(image=str(image)))
        monkeypatch.setattr(FakeWorker, "request", request)
        await _until(lambda: slept and world.pings > 1)
        assert "kill" not in world.notes
        await devices.detach("web")

    _run(main)


@pytest.mark.parametrize(
    ("step", "failure", "code"),
    [
        ("lock", AttachError("device_held", "/dev/nbd3 is mounted on /mnt"), "device_held"),
        ("sync", AttachError("kernel_refused", "EIO"), "kernel_refused"),
        ("flush", WorkerError("engine_failed", "no space", "", {}), "engine_failed"),
    ],
)
def test_refused_detach_changes_nothing(world, image, registry, step, failure, code):
    async def main():
        devices = registry()
        await devices.attach(AttachRequest(image=str(image)))
        world.notes.clear()
        world.failures[step] = failure
        with pytest.raises(ApiError) as caught:
            await devices.detach("web")
        assert caught.value.code == code
        assert "disconnect" not in world.notes
        assert ("unlock" in world.notes) == (step != "lock")
        assert (await devices.status("web")).state == "attached"
        # And it is still watched.
        world.failures.clear()
        world.workers[0].die()
        await _until(lambda: devices.device("web").counters.restarts == 1)
        await devices.detach("web")

    _run(main)


def test_worker_that_dies_over_the_stop_is_succeeded_by_one_that_closes(
    world, image, registry, tmp_path
):
    async def main():
        devices = registry()
        await devices.attach(AttachRequest(image=str(image)))
        world.failures_once["stop"] = WorkerLost("gone")
        await devices.detach("web")
        assert world.notes[-3:] == ["spawn", "open takeover", "stop"]
        assert not (tmp_path / "run/devices/web").exists()

    _run(main)


def test_slow_release_is_reported_after_the_image_was_closed(world, image, registry, tmp_path):
    async def main():
        devices = registry()
        await devices.attach(AttachRequest(image=str(image)))
        world.failures["disconnect"] = AttachError("device_not_released", "dd has it open")
        with pytest.raises(ApiError) as caught:
            await devices.detach("web")
        assert (caught.value.code, caught.value.exit_status) == ("device_not_released", 8)
        assert world.notes[-1] == "stop"
        assert await devices.statuses() == []

    _run(main)


def test_second_attach_of_an_image_names_the_first(world, image, registry):
    async def main():
        devices = registry()
        await devices.attach(AttachRequest(image=str(image), name="one"))
        with pytest.raises(ApiError) as caught:
            await devices.attach(AttachRequest(image=str(image), name="two"))
        assert caught.value.code == "image_in_use"
        assert "one (/dev/nbd3)" in caught.value.message
        await devices.detach("one")

    _run(main)


def test_names_are_unique_and_found_when_not_given(world, tmp_path, registry):
    async def main():
        devices = registry()
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "web.fvd").touch()
            await devices.attach(AttachRequest(image=str(tmp_path / folder / "web.fvd")))
        assert [status.name for status in await devices.statuses()] == ["web", "web-2"]
        (tmp_path / "c.fvd").touch()
        with pytest.raises(ApiError) as caught:
            await devices.attach(AttachRequest(image=str(tmp_path / "c.fvd"), name="web"))
        assert caught.value.code == "device_exists"
        for name in ("web", "web-2"):
            await devices.detach(name)

    _run(main)


def test_writeback_errors_are_looked_for_after_a_request_failed(
    world, image, registry, monkeypatch
):
    monkeypatch.setattr(recovery, "PING_PERIOD_SECONDS", 0.01)

    async def main():
        devices = registry()
        await devices.attach(AttachRequest(image=str(image)))
        device = devices.device("web")
        asked = world.pings
        await _until(lambda: world.pings > asked + 3)
        assert "writeback_error" not in world.notes
        world.failed_requests = 2
        await _until(lambda: device.counters.writeback_errors == 1)
        asked = world.pings
        await _until(lambda: world.pings > asked + 3)
        # Asked once for one failure: the question makes the kernel write.
        assert world.notes.count("writeback_error") == 1
        assert (await devices.status("web")).writeback_errors == 1
        await devices.detach("web")

    _run(main)


def test_living_worker_that_cannot_serve_its_last_connection_is_replaced(world, image, registry):
    # An older write may be stuck in it, which nothing newer may overtake.
    async def main():
        devices = registry()
        await devices.attach(AttachRequest(image=str(image)))
        device = devices.device("web")
        world.notes.clear()
        world.failures["serve"] = WorkerError("engine_failed", "busy", "", {})
        world.workers[0].events.put_nowait({"event": "connection_closed", "connection": 0})
        await _until(lambda: "kill" in world.notes)
        world.failures.clear()
        await _until(lambda: device.counters.restarts == 1)
        assert device.state is DeviceState.ATTACHED
        await devices.detach("web")

    _run(main)
