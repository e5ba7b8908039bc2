# SPDX-License-Identifier: Apache-2.0
"""Handling workers from the outside: budgets, sockets, and processes that must be gone."""

import asyncio
import os

import pytest

from fvdd.config import Restarts
from fvdd.devices import supervise
from fvdd.devices.supervise import RestartBudget
from fvdd.worker.client import WorkerError, WorkerLost


def test_budget_allows_so_many_in_a_window():
    now = [0.0]
    budget = RestartBudget(Restarts(count_max=3, window=60.0), clock=lambda: now[0])
    assert [budget.take() for _ in range(4)] == [True, True, True, False]
    now[0] = 59.9
    assert not budget.take()
    now[0] = 60.0
    assert budget.take()
    budget.reset()
    assert [budget.take() for _ in range(4)] == [True, True, True, False]


class _Worker:
    def __init__(self, failure=None):
        self.failure = failure
        self.fds = []
        self.killed = False
        self.pid = 1

    async def request(self, op, fds=(), *, timeout=None, **arguments):
        self.fds = [os.dup(fd) for fd in fds]
        if self.failure is not None:
            raise self.failure
        return {"connections": list(range(len(fds)))}

    def kill(self):
        self.killed = True

    async def wait(self):
        return -9

    async def close(self):
        pass


def test_worker_ends_live_in_the_worker_only():
    async def main():
        worker = _Worker()
        numbers, ends = await supervise.serve_sockets(worker, 2, 1.0)
        assert numbers == [0, 1]
        for fd in worker.fds:
            os.close(fd)
        # With the worker's copies gone the kernel's ends are dead at once.
        for end in ends:
            end.settimeout(5)
            assert end.recv(1) == b""
        supervise.close_sockets(ends)

    asyncio.run(main())


def test_no_descriptor_is_left_when_the_worker_refuses():
    async def main():
        before = os.listdir("/proc/self/fd")
        worker = _Worker(WorkerError("bad", "no", "", {}))
        with pytest.raises(WorkerError):
            await supervise.serve_sockets(worker, 3, 1.0)
        for fd in worker.fds:
            os.close(fd)
        assert len(os.listdir("/proc/self/fd")) <= len(before)

    asyncio.run(main())


def test_worker_that_fails_to_open_is_gone():
    async def main():
        worker = _Worker(WorkerError("base_missing", "no base", "", {}))

        async def spawn(directory):
            return worker

        with pytest.raises(WorkerError):
            await supervise.open_worker(spawn, "/x", {}, 1.0)
        assert worker.killed

    asyncio.run(main())


def test_worker_that_cannot_be_killed_is_reported(monkeypatch):
    async def main():
        worker = _Worker()
        worker.wait = asyncio.Event().wait
        monkeypatch.setattr(supervise, "GONE_LIMIT_SECONDS", 0.01)
        with pytest.raises(supervise.ApiError, match="does not end") as caught:
            await supervise.make_gone(worker)
        assert "dmesg" in caught.value.hint

    asyncio.run(main())


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (WorkerError("base_missing", "no base", "put it back", {}), "base_missing", "no base"),
        (WorkerLost("x"), "worker_failed", "died"),
        (TimeoutError(), "worker_failed", "in time"),
        (OSError(32, "Broken pipe"), "worker_failed", "Broken pipe"),
    ],
)
def test_faults_become_errors_of_the_api(error, code, words):
    made = supervise.as_api_error(error)
    assert made.code == code
    assert words in made.message


def test_scope_is_asked_for_only_under_systemd(monkeypatch):
    monkeypatch.delenv("INVOCATION_ID", raising=False)
    assert supervise.scope_launcher("web") == []
    monkeypatch.setenv("INVOCATION_ID", "1")
    monkeypatch.setattr(supervise.os.path, "isdir", lambda path: path == "/run/systemd/system")
    monkeypatch.setattr(supervise.os, "geteuid", lambda: 0)
    monkeypatch.setattr(supervise.shutil, "which", lambda name, path: f"/usr/bin/{name}")
    words = supervise.scope_launcher("a-b")
    assert words[0] == "/usr/bin/systemd-run"
    assert "--scope" in words
    assert words[-1] == "--"
    assert any(word.startswith("--unit=fvd-worker-a\\x2db-") for word in words)
    monkeypatch.setattr(supervise.os, "geteuid", lambda: 1000)
    assert supervise.scope_launcher("a-b") == []
