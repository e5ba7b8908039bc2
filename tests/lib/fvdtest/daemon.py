# SPDX-License-Identifier: Apache-2.0
"""fvdd as tests use it: the program itself, or the same app in a thread with a stand-in kernel.

`Program` is the real thing, for what needs no device: starting, refusing, stopping. `Daemon` runs
fvdd's App, its API and real worker processes, with StandInTransport in place of the kernel's
driver; it is reached over its real socket, by the real fvdctl.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fvdapi.client import Client
from fvdapi.errors import ApiError
from fvdapi.models import DeviceStatus
from fvdd.app import App, Parts
from fvdd.config import Config, Limits, Restarts, Storage, Timeouts
from fvdd.config import Daemon as DaemonSection
from fvdd.devices.supervise import spawn_worker
from fvdtest.preloaded import run_fvdctl
from fvdtest.standin import Disk, StandInTransport
from fvdtest.tools import wait_until as wait_until  # for those who use a daemon

START_SECONDS = 30.0
COMMAND_SECONDS = 90.0
FVDCTL = (sys.executable, "-P", "-m", "fvdctl")
FVDD = (sys.executable, "-P", "-m", "fvdd")

IMPATIENT = Limits(ready_timeout=20.0, worker_timeout=30.0, hang_timeout=2.0)

Done = subprocess.CompletedProcess[str]


def fvdctl(*words: object, socket: Path | str | None = None, check: bool = True) -> Done:
    """Run fvdctl to its end."""
    environment = dict(os.environ)
    if socket is not None:
        environment["FVDD_SOCKET"] = str(socket)
    done = run_fvdctl([str(word) for word in words], environment, COMMAND_SECONDS)
    if check and done.returncode:
        pytest.fail(f"fvdctl {words}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Parse an exposition with the reference parser: (name, sorted labels) -> value."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, f"{key} appears twice"
            found[key] = sample.value
    return found


class Program:
    """The program fvdd as a child process."""

    def __init__(self, folder: Path, *options: str, expect_ready: bool = True) -> None:
        self.socket = folder / "fvdd.sock"
        self.state = folder / "state"
        self.log_path = folder / f"fvdd-{time.monotonic_ns()}.log"
        argv = [*FVDD, "--metrics", "off", "--socket", str(self.socket)]
        argv += ["--state-dir", str(self.state), *options]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=log, stdout=log)
        if expect_ready:
            wait_until(self._is_ready, "fvdd to answer")

    def _is_ready(self) -> bool:
        if self.process.poll() is not None:
            pytest.fail(f"fvdd ended early:\n{self.log}")
        try:
            with Client(str(self.socket)) as client:
                return client.health().status == "ok"
        except ApiError:
            return False

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def ctl(self, *words: object, check: bool = True) -> Done:
        return fvdctl(*words, socket=self.socket, check=check)

    def wait(self) -> int:
        return self.process.wait(START_SECONDS)

    def stop(self) -> int:
        """Stop as a service manager does; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if error is None and "Traceback" in self.log:
            pytest.fail(f"fvdd logged a traceback\n{self.log}")


@contextlib.contextmanager
def running_daemon(folder: Path, **options: Any) -> Iterator[Daemon]:
    """A running fvdd with a stand-in kernel; everything is detached at the end."""
    running = Daemon(folder, **options).start()
    try:
        yield running
        running.detach_all()
    finally:
        running.stop()
        running.kill_workers()


class Daemon:
    """fvdd's App in a thread of this process, over a stand-in for the kernel's driver."""

    def __init__(
        self,
        folder: Path,
        *,
        restarts: int = 5,
        metrics: str = "off",
        after: Daemon | None = None,
        limits: Limits | None = None,
        timeouts: Timeouts | None = None,
        storage: Storage | None = None,
        state: str = "state",
    ) -> None:
        """`after`: the stopped daemon whose kernel, and workers, this one is to find."""
        self.socket = folder / "fvdd.sock"
        self.state: Path = folder / state if after is None else after.state
        self.transport: StandInTransport = StandInTransport() if after is None else after.transport
        config = Config(
            daemon=DaemonSection(
                socket=str(self.socket), state_dir=str(self.state), metrics=metrics
            ),
            timeouts=timeouts or Timeouts(),
            storage=storage or Storage(),
            restarts=Restarts(count_max=restarts),
            limits=limits or Limits(ready_timeout=20.0, worker_timeout=30.0),
        )
        self.workers: list[int] = [] if after is None else after.workers
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failure: BaseException | None = None
        self._app = App(config, Parts(self.transport, self._spawn))
        self._thread = threading.Thread(target=self._run, name="fvdd")

    def start(self) -> Daemon:
        self._thread.start()
        wait_until(self._answers, "fvdd to answer")
        return self

    def stop(self) -> None:
        """End fvdd; workers and devices go on, as they do when the program ends."""
        if self._loop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._app.stop)
        self._thread.join(START_SECONDS)
        assert not self._thread.is_alive(), "fvdd does not stop"
        if self._failure is not None:
            raise self._failure

    def detach_all(self) -> None:
        with self.client() as client:
            for status in client.devices():
                if status.state.value != "orphaned":
                    client.detach(status.name)

    def has_spare(self) -> bool:
        """Whether a warm worker waits for the next device that needs one."""
        return self._app.spares.is_warm

    def has_listener(self) -> bool:
        """Whether somebody waits for events."""
        return self._app.has_listener

    def settled(self) -> bool:
        """Whether no adoption is under way."""
        with self.client() as client:
            return all(status.state.value != "recovering" for status in client.devices())

    def kill_workers(self) -> None:
        """Leave no process behind, whatever a test did."""
        for pid in self.workers:
            try:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            except (ProcessLookupError, ChildProcessError):
                continue

    def client(self) -> Client:
        return Client(str(self.socket))

    def ctl(self, *words: object, check: bool = True) -> Done:
        return fvdctl(*words, socket=self.socket, check=check)

    def attach(self, image: Path, *options: object) -> Disk:
        """Attach by fvdctl and return the device's other side."""
        device = self.ctl("attach", image, *options).stdout.strip()
        return self.transport.disks[int(device.removeprefix("/dev/nbd"))]

    def status(self, name: str) -> dict[str, Any]:
        return dict(json.loads(self.ctl("status", name, "--json").stdout))

    def device(self, name: str) -> DeviceStatus:
        """The status without a program in between, for waiting on it."""
        with self.client() as client:
            return client.device(name)

    def metrics(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        return samples(self.ctl("metrics").stdout)

    def _answers(self) -> bool:
        if self._failure is not None:
            raise self._failure
        try:
            with self.client() as client:
                return client.health().status == "ok"
        except ApiError:
            return False

    async def _spawn(self, directory: str) -> Any:
        worker = await spawn_worker(directory)
        self.workers.append(worker.pid)
        return worker

    def _run(self) -> None:
        async def main() -> None:
            self._loop = asyncio.get_running_loop()
            await self._app.run()

        try:
            asyncio.run(main())
        except BaseException as error:  # told to the test by start or stop
            self._failure = error


class Relay:
    """One fvdd after the other over the same kernel and state directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running = Daemon(folder, limits=IMPATIENT).start()

    def stop(self) -> None:
        self.running.stop()

    def next(self, *, settle: bool = True) -> Daemon:
        self.running = Daemon(self.folder, after=self.running, limits=IMPATIENT).start()
        if settle:
            wait_until(self.running.settled, "the adoption to end")
        return self.running


def record_of(daemon: Daemon, name: str = "web") -> Path:
    return daemon.state / "devices" / name / "device.json"


def change_record(daemon: Daemon, **changes: object) -> None:
    path = record_of(daemon)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
