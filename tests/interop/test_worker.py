# SPDX-License-Identifier: Apache-2.0
"""Worker processes as fvdd has them: spawned, asked, adopted, killed and succeeded.

Everything goes through fvdd's own client and the real worker and engine; the kernel's place is
taken by the raw client, which gets one end of a socket pair and no handshake, as the kernel does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from fvdd.worker.client import WorkerError, WorkerLost, WorkerProcess
from fvdengine.opening import lock_owner
from fvdtest.nbd_client import Closed, NbdClient
from fvdtest.serve import FVDCTL
from fvdtest.tools import run

from .conftest import World

LIMIT = 30.0


def drive(scenario: Callable[[], Awaitable[None]]) -> None:
    """Run an asynchronous test, never longer than a minute."""

    async def bounded() -> None:
        async with asyncio.timeout(60):
            await scenario()

    asyncio.run(bounded())


@asynccontextmanager
async def worker_in(directory: Path | None) -> AsyncIterator[WorkerProcess]:
    """A worker that does not outlive the test."""
    worker = await WorkerProcess.spawn(str(directory) if directory is not None else None)
    try:
        yield worker
    finally:
        worker.kill()
        await worker.wait()
        await worker.close()


async def attach(worker: WorkerProcess) -> NbdClient:
    """Hand the worker one end of a socket pair and keep the other."""
    ours, theirs = socket.socketpair()
    ours.settimeout(LIMIT)
    with theirs:
        answer = await worker.request("serve", [theirs.fileno()], timeout=LIMIT)
    connections = answer["connections"]
    assert isinstance(connections, list)
    assert len(connections) == 1
    return NbdClient(ours)


async def next_event(worker: WorkerProcess, name: str) -> dict[str, object]:
    """Wait for an event of that name; others may come before it."""
    while True:
        event = await asyncio.wait_for(worker.events.get(), LIMIT)
        if event["event"] == name:
            return event


def test_whole_life_of_a_worker(clone: World) -> None:
    async def scenario() -> None:
        async with worker_in(None) as worker:
            assert (await worker.request("ping", timeout=LIMIT))["pid"] == worker.pid
            opened = await worker.request("open", image=str(clone.image), timeout=LIMIT)
            assert opened["size"] == clone.model.size
            assert opened["block_size"] == 4096
            assert opened["flags"] == 1 | 4 | 8 | 32 | 64 | 256
            assert opened["pid"] == worker.pid
            assert opened["warnings"] == []
            client = await attach(worker)
            await asyncio.to_thread(client.write, 4000, b"hello")
            clone.model.write(4000, b"hello")
            found = await asyncio.to_thread(client.read, 0, 8192)
            assert clone.model.difference(found) is None
            await worker.request("flush", timeout=LIMIT)
            status = await worker.request("status", timeout=LIMIT)
            assert status["size_bytes"] == clone.model.size
            assert status["connections"] == 1
            assert status["pid"] == worker.pid
            client.close()
            await next_event(worker, "connection_closed")
            await worker.request("stop", timeout=LIMIT)
            assert await worker.wait() == 0

    drive(scenario)
    with clone.serve("-r") as server:
        clone.expect(server)


def test_worker_says_what_it_has_open_to_whoever_comes_later(clone: World) -> None:
    async def scenario() -> None:
        async with worker_in(None) as worker:
            before = await worker.request("ping", timeout=LIMIT)
            assert (before["open"], "size" in before) == (False, False)
            opened = await worker.request("open", image=str(clone.image), timeout=LIMIT)
            client = await attach(worker)
            # The sign for systemd: end this one last.
            assert Path(f"/proc/{worker.pid}/cmdline").read_bytes().startswith(b"@")
            ping = await worker.request("ping", timeout=LIMIT)
            for name in ("size", "block_size", "image_uuid", "flags", "warnings", "pid"):
                assert ping[name] == opened[name]
            assert ping["connections"] == [1]
            client.close()
            await next_event(worker, "connection_closed")
            assert (await worker.request("ping", timeout=LIMIT))["connections"] == []
            await worker.request("stop", timeout=LIMIT)

    drive(scenario)


def test_descriptors_that_are_no_sockets_are_refused_and_closed(clone: World) -> None:
    async def scenario() -> None:
        async with worker_in(None) as worker:
            await worker.request("open", image=str(clone.image), timeout=LIMIT)
            before = len(os.listdir(f"/proc/{worker.pid}/fd"))
            datagrams = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
            with open(os.devnull) as file, datagrams[0], datagrams[1]:
                for fd in (file.fileno(), datagrams[0].fileno()):
                    with pytest.raises(WorkerError) as caught:
                        await worker.request("serve", [fd, fd], timeout=LIMIT)
                    assert caught.value.code == "bad_request"
            assert len(os.listdir(f"/proc/{worker.pid}/fd")) == before
            await worker.request("stop", timeout=LIMIT)

    drive(scenario)


def test_several_sockets_in_one_packet(clone: World) -> None:
    async def scenario() -> None:
        async with worker_in(None) as worker:
            await worker.request("open", image=str(clone.image), timeout=LIMIT)
            pairs = [socket.socketpair() for _ in range(4)]
            fds = [theirs.fileno() for _, theirs in pairs]
            answer = await worker.request("serve", fds, timeout=LIMIT)
            connections = answer["connections"]
            assert isinstance(connections, list)
            assert len(set(connections)) == 4
            for ours, theirs in pairs:
                theirs.close()
                ours.settimeout(LIMIT)
                found = await asyncio.to_thread(NbdClient(ours).read, 0, 4096)
                assert clone.model.difference(found) is None
                ours.close()
            await worker.request("stop", timeout=LIMIT)

    drive(scenario)


@pytest.mark.parametrize(
    ("op", "arguments", "code"),
    [
        ("status", {}, "not_open"),
        ("flush", {}, "not_open"),
        ("serve", {}, "not_open"),
        ("open", {}, "bad_request"),
        ("open", {"image": "x", "read_only": "yes"}, "bad_request"),
        ("open", {"image": "x", "cache": "unsafe"}, "bad_request"),
        ("open", {"image": "x", "takeover": True}, "bad_request"),
        ("open", {"image": "/nowhere.fvd"}, "image_not_found"),
        ("fly", {}, "unknown_op"),
    ],
)
def test_bad_requests_are_answered_and_the_worker_goes_on(
    clone: World, op: str, arguments: dict[str, object], code: str
) -> None:
    async def scenario() -> None:
        async with worker_in(None) as worker:
            with pytest.raises(WorkerError) as caught:
                await worker.request(op, timeout=LIMIT, **arguments)
            assert caught.value.code == code
            assert caught.value.message
            await worker.request("open", image=str(clone.image), timeout=LIMIT)
            with pytest.raises(WorkerError) as caught:
                await worker.request("open", image=str(clone.image), timeout=LIMIT)
            assert caught.value.code == "already_open"
            with pytest.raises(WorkerError) as caught:
                await worker.request("serve", timeout=LIMIT)
            assert caught.value.code == "bad_request"
            await worker.request("stop", timeout=LIMIT)

    drive(scenario)


def test_descriptor_that_is_no_socket_is_refused(clone: World) -> None:
    async def scenario() -> None:
        async with worker_in(None) as worker:
            await worker.request("open", image=str(clone.image), timeout=LIMIT)
            with open(os.devnull, "rb") as nothing, pytest.raises(WorkerError):
                await worker.request("serve", [nothing.fileno()], timeout=LIMIT)
            await attach(worker)
            await worker.request("stop", timeout=LIMIT)

    drive(scenario)


def test_prefetch_is_reported_and_can_be_started(clone: World) -> None:
    async def scenario() -> None:
        async with worker_in(None) as worker:
            await worker.request("open", image=str(clone.image), prefetch_delay=3600, timeout=LIMIT)
            assert (await worker.request("status"))["prefetch_state"] == "waiting"
            await worker.request("prefetch", action="start", timeout=LIMIT)
            event = await next_event(worker, "prefetch")
            while event["state"] != "done":
                event = await next_event(worker, "prefetch")
            assert (await worker.request("status"))["base_bytes_left"] == 0
            await worker.request("stop", timeout=LIMIT)

    drive(scenario)


def test_worker_ignores_signals_until_it_is_asked_to_stop(clone: World) -> None:
    async def scenario() -> None:
        async with worker_in(None) as worker:
            await worker.request("open", image=str(clone.image), timeout=LIMIT)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                os.kill(worker.pid, number)
            assert (await worker.request("status", timeout=LIMIT))["pid"] == worker.pid
            await worker.request("stop", timeout=LIMIT)
            assert await worker.wait() == 0

    drive(scenario)


def test_worker_outlives_its_daemon_and_is_adopted(clone: World, tmp_path: Path) -> None:
    directory = tmp_path / "device"
    directory.mkdir()

    async def scenario() -> None:
        async with worker_in(directory) as first:
            await first.request(
                "open", image=str(clone.image), live_dir=str(directory), timeout=LIMIT
            )
            client = await attach(first)
            await first.close()
            # Nobody is connected to the control channel now; the device goes on.
            await asyncio.to_thread(client.write, 0, b"alone")
            clone.model.write(0, b"alone")
            adopted = await WorkerProcess.connect(str(directory / "control.sock"))
            assert adopted.pid == first.pid
            assert (await adopted.request("status", timeout=LIMIT))["connections"] == 1
            found = await asyncio.to_thread(client.read, 0, 5)
            assert found == b"alone"
            await adopted.request("stop", timeout=LIMIT)
            assert await adopted.wait() is None
            assert await first.wait() == 0

    drive(scenario)
    assert not (directory / "live").exists()
    with clone.serve("-r") as server:
        clone.expect(server)


def test_worker_that_nobody_can_reach_closes_its_image(clone: World) -> None:
    async def scenario() -> None:
        async with worker_in(None) as worker:
            await worker.request("open", image=str(clone.image), timeout=LIMIT)
            client = await attach(worker)
            await worker.close()
            await asyncio.to_thread(client.write, 0, b"served to the end")
            assert worker.is_running
            client.close()
            assert await worker.wait() == 0

    drive(scenario)
    clone.model.write(0, b"served to the end")
    run(*FVDCTL, "check", clone.image)
    with clone.serve("-r") as server:
        clone.expect(server)


def test_successor_of_a_killed_worker_takes_over(clone: World, tmp_path: Path) -> None:
    """fvdd holds the owner lock all along; the worker dies with writes that nobody flushed."""
    directory = tmp_path / "device"
    directory.mkdir()

    async def scenario() -> None:
        owner = lock_owner(clone.image)
        arguments: dict[str, object] = {
            "image": str(clone.image),
            "live_dir": str(directory),
            "owner_held": True,
        }
        takeover = False
        for generation in range(4):
            async with worker_in(directory) as worker:
                await worker.request("open", takeover=takeover, timeout=LIMIT, **arguments)
                client = await attach(worker)
                found = await asyncio.to_thread(client.read, 0, 1 << 20)
                assert clone.model.difference(found) is None
                for number in range(20):
                    offset = generation * 200_000 + number * 9_999
                    await asyncio.to_thread(client.write, offset, b"kept %d" % number)
                    clone.model.write(offset, b"kept %d" % number)
                worker.kill()
                with pytest.raises(WorkerLost):
                    await worker.request("status", timeout=LIMIT)
                assert await worker.wait() == -signal.SIGKILL
                with pytest.raises(Closed):
                    await asyncio.to_thread(client.read, 0, 1)
                takeover = True
        async with worker_in(directory) as worker:
            await worker.request("open", takeover=True, timeout=LIMIT, **arguments)
            await worker.request("stop", timeout=LIMIT)
        os.close(owner)

    drive(scenario)
    with clone.serve("-r") as server:
        clone.expect(server)


def test_connecting_where_no_worker_listens_fails(tmp_path: Path) -> None:
    async def scenario() -> None:
        with pytest.raises(OSError, match="No such file"):
            await WorkerProcess.connect(str(tmp_path / "control.sock"))

    drive(scenario)


def test_worker_imports_nothing_of_the_daemon() -> None:
    script = (
        "import sys, fvdd.worker.main, fvdengine.opening\n"
        "heavy = {'pyroute2', 'fastapi', 'uvicorn', 'pydantic', 'click', 'rich', 'httpx'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("is_stopped", [False, True], ids=["channel closed", "thread ended"])
def test_copier_ends_with_fvdd_in_the_middle_of_its_copy(tmp_path: Path, is_stopped: bool) -> None:
    """What it has locked must be free for the next fvdd, even if the copier is stopped."""
    base, image, target = (tmp_path / name for name in ("base.raw", "web.fvd", "copy.raw"))
    with base.open("wb") as file:
        file.truncate(64 << 30)  # minutes, though it is all zeros
    run(*FVDCTL, "create", image, "--base", base, "--base-format", "raw")

    async def begun() -> WorkerProcess:
        worker = await WorkerProcess.spawn(ends_with_us=True)
        await worker.request("open", image=str(image), copy_on_read=False, timeout=LIMIT)
        with target.open("wb") as file:
            copying = asyncio.create_task(worker.request("copy_out", [file.fileno()]))
            while not file.seek(0, os.SEEK_END):
                await worker.request("ping", timeout=LIMIT)
        assert not copying.done()
        copying.cancel()
        if is_stopped:
            os.kill(worker.pid, signal.SIGSTOP)
        return worker

    def in_a_thread(pids: list[int]) -> None:
        async def scenario() -> None:
            worker = await begun()
            pids.append(os.pidfd_open(worker.pid))
            if not is_stopped:
                await worker.close()
                await asyncio.wait_for(worker.wait(), LIMIT)

        drive(scenario)

    pids: list[int] = []
    thread = threading.Thread(target=in_a_thread, args=(pids,))
    thread.start()
    thread.join()
    try:
        assert select.select(pids, [], [], LIMIT)[0]
        os.close(lock_owner(str(image), LIMIT))
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pids[0], signal.SIGKILL)
        os.close(pids[0])


def test_copy_beside_requests_ends_when_fvdd_is_gone(tmp_path: Path) -> None:
    """The worker goes on, and the next fvdd can have a copy made."""
    base, image = tmp_path / "base.raw", tmp_path / "web.fvd"
    with base.open("wb") as file:
        file.truncate(64 << 30)
    run(*FVDCTL, "create", image, "--base", base, "--base-format", "raw")
    directory = tmp_path / "live"
    directory.mkdir()

    async def begin(worker: WorkerProcess) -> None:
        with (tmp_path / "copy.raw").open("wb") as file:
            await worker.request("mirror", [file.fileno()], step="begin", timeout=LIMIT)

    async def scenario() -> None:
        async with worker_in(directory) as worker:
            await worker.request(
                "open", image=str(image), live_dir=str(directory), copy_on_read=False, timeout=LIMIT
            )
            client = await attach(worker)
            await begin(worker)
            copying = asyncio.create_task(worker.request("mirror", step="copy"))
            await worker.request("ping", timeout=LIMIT)
            copying.cancel()
            await worker.close()
            after = await WorkerProcess.connect(str(directory / "control.sock"))
            with pytest.raises(WorkerError, match="no copy is being made"):
                await until_dropped(after)
            await begin(after)
            await after.request("mirror", step="drop", timeout=LIMIT)
            client.close()
            await after.request("stop", timeout=LIMIT)
            await after.close()

    async def until_dropped(worker: WorkerProcess) -> None:
        while True:  # the worker may learn of the one after it has heard the other
            await worker.request("mirror", step="none such", timeout=LIMIT)

    drive(scenario)
