# SPDX-License-Identifier: Apache-2.0
"""The warm worker: used once and replaced, never stale, gone with whoever kept it."""

import asyncio
import os
from pathlib import Path

import pytest

from fvdd.devices import spares
from fvdd.devices.spares import SPARE_PLACE, Spares, installed_stamp
from fvdd.worker.client import WorkerLost


class _Worker:
    pid = 1

    def __init__(self, directory):
        self.directory = directory
        self.asked = []
        self.is_running = True
        self.failure = None
        self.dying = None
        self.preparing = None

    async def request(self, op, fds=(), *, timeout=None, **arguments):
        self.asked.append(op)
        if self.failure == op:
            raise WorkerLost("gone")
        if op == "prepare" and self.preparing is not None:
            await self.preparing.wait()
        if op == "assign":
            self.directory = arguments["directory"]
        return {}

    def kill(self):
        self.is_running = False

    async def wait(self):
        if self.dying is not None:
            await self.dying
        return -9

    async def close(self):
        pass


class _Host:
    """Starts workers, and remembers them."""

    def __init__(self):
        self.workers = []
        self.stamp = frozenset({("program", 1, 1, 1)})
        self.wanted = True
        self.refuses = False
        # Where set, what a start waits for, and what the imports of a started one wait for.
        self.starting = self.preparing = None
        self.spares = Spares(self.launch, Path("/run/fvd/devices"), lambda: self.stamp)

    async def launch(self, directory):
        if self.refuses:
            raise OSError(11, "no more processes")
        worker = _Worker(directory)
        worker.preparing = self.preparing
        self.workers.append(worker)
        if self.starting is not None:
            await self.starting.wait()
        return worker


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(spares, "PERIOD_SECONDS", 0.001)
    monkeypatch.setattr(spares, "SETTLE_SECONDS", 0.001)
    monkeypatch.setattr(spares, "RETRY_SECONDS", 0.002)


async def _until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def _with_spare(scenario):
    """Run a scenario beside the task that keeps the spare; afterwards no spare may run."""
    host = _Host()

    async def main():
        keeping = asyncio.create_task(host.spares.keep(lambda: host.wanted))
        try:
            await _until(lambda: host.spares.is_warm or host.refuses)
            await scenario(host)
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
        left = [worker for worker in host.workers if worker.directory.endswith(SPARE_PLACE)]
        assert not any(worker.is_running for worker in left)

    asyncio.run(main())


def test_the_spare_is_taken_and_another_one_follows():
    async def scenario(host):
        (first,) = host.workers
        assert (first.directory, first.asked) == (f"/run/fvd/devices/{SPARE_PLACE}", ["prepare"])
        assert await host.spares.spawn("/run/fvd/devices/web") is first
        assert first.directory == "/run/fvd/devices/web"
        await _until(lambda: host.spares.is_warm)
        assert len(host.workers) == 2

    _with_spare(scenario)


def test_two_at_once_do_not_share_it():
    async def scenario(host):
        one, other = await asyncio.gather(host.spares.spawn("/a"), host.spares.spawn("/b"))
        assert one is not other
        assert {one.directory, other.directory} == {"/a", "/b"}

    _with_spare(scenario)


@pytest.mark.parametrize("step", ["starting", "preparing"])
def test_one_that_is_not_warm_yet_is_taken_before_another_is_started(step):
    async def scenario(host):
        setattr(host, step, asyncio.Event())
        first = await host.spares.spawn("/a")
        await _until(lambda: len(host.workers) == 2)
        taking = asyncio.create_task(host.spares.spawn("/b"))
        await asyncio.sleep(0)
        getattr(host, step).set()
        assert await taking is host.workers[1] is not first
        assert host.workers[1].directory == "/b"
        # And a spare follows.
        await _until(lambda: host.spares.is_warm)
        assert len(host.workers) == 3

    _with_spare(scenario)


def test_who_gives_up_waiting_for_one_that_starts_leaves_no_process():
    async def scenario(host):
        host.starting = asyncio.Event()
        await host.spares.spawn("/a")
        await _until(lambda: len(host.workers) == 2)
        taking = asyncio.create_task(host.spares.spawn("/b"))
        await asyncio.sleep(0)
        taking.cancel()
        host.starting.set()
        await asyncio.wait({taking})
        assert taking.cancelled()
        assert not host.workers[1].is_running

    _with_spare(scenario)


@pytest.mark.parametrize("fault", ["dead", "stale", "silent"])
def test_a_spare_that_is_not_good_is_ended_and_a_fresh_worker_started(fault):
    async def scenario(host):
        (spare,) = host.workers
        match fault:
            case "dead":
                spare.is_running = False
            case "stale":
                host.stamp = frozenset({("program", 2, 1, 1)})
            case "silent":
                spare.failure = "assign"
        worker = await host.spares.spawn("/a")
        assert worker is not spare
        assert worker.directory == "/a"
        assert not spare.is_running

    _with_spare(scenario)


def test_a_new_version_replaces_the_spare_before_anybody_needs_it():
    async def scenario(host):
        (spare,) = host.workers
        host.stamp = frozenset({("program", 2, 1, 1)})
        await _until(lambda: not spare.is_running and host.spares.is_warm)
        assert await host.spares.spawn("/a") is not spare

    _with_spare(scenario)


def test_without_devices_there_is_none():
    async def scenario(host):
        (spare,) = host.workers
        host.wanted = False
        await _until(lambda: not spare.is_running)
        assert not host.spares.is_warm
        assert (await host.spares.spawn("/a")).directory == "/a"

    _with_spare(scenario)


def test_end_comes_although_the_spare_ends_in_the_same_moment():
    async def main():
        host = _Host()
        keeping = asyncio.create_task(host.spares.keep(lambda: host.wanted))
        await _until(lambda: host.spares.is_warm)
        (spare,) = host.workers
        spare.dying = asyncio.get_running_loop().create_future()
        host.wanted = False
        await _until(lambda: not spare.is_running)
        await asyncio.sleep(0)  # one turn of the loop: it waits for the death of the spare
        spare.dying.set_result(None)
        keeping.cancel()
        async with asyncio.timeout(5):
            await asyncio.wait({keeping})
        assert keeping.cancelled()

    asyncio.run(main())


def test_no_spare_is_no_obstacle_and_tried_again():
    async def scenario(host):
        host.refuses = True
        host.workers[0].kill()
        await _until(lambda: not host.spares.is_warm)
        host.refuses = False
        await _until(lambda: host.spares.is_warm)

    _with_spare(scenario)


def test_stamp_is_that_of_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(spares, "_package_folders", lambda: [str(tmp_path)])
    program = tmp_path / "part.py"
    program.write_text("one")
    before = installed_stamp()
    assert installed_stamp() == before
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__/part.py").write_text("made by the interpreter")
    assert installed_stamp() == before
    # As packages are installed: another file under the same name, which may look the same.
    (tmp_path / "new").write_text("two")
    status = program.stat()
    os.utime(tmp_path / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
    (tmp_path / "new").rename(program)
    assert installed_stamp() != before


def test_stamp_covers_worker_and_engine():
    paths = {path for path, *_ in installed_stamp()}
    for ending in ("fvdd/worker/service.py", "fvdengine/opening.py"):
        assert any(path.endswith(ending) for path in paths)
    assert any("/fvdcore/" in path and path.endswith(".so") for path in paths)
