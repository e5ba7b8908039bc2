# SPDX-License-Identifier: Apache-2.0
"""`fvdctl serve` as tests use it: started, watched, stopped or killed, and never left over."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import pytest

from fvdtest.nbd_client import NbdClient

START_SECONDS = 120.0 if "FVD_SANITIZER" in os.environ else 30.0
STOP_SECONDS = 60.0
FVDCTL = (sys.executable, "-P", "-m", "fvdctl")


class Server:
    """One server process. As a context manager it must end cleanly, and have logged no error."""

    def __init__(
        self,
        image: Path,
        *options: str,
        directory: Path,
        tcp: bool = False,
        ready: bool = True,
        tcp_host: str = "127.0.0.1",
    ) -> None:
        self.image = image
        self.socket_path = directory / "nbd.sock"
        tcp = tcp or tcp_host != "127.0.0.1"
        where = ("--tcp", f"{tcp_host}:0") if tcp else ("--socket", str(self.socket_path))
        self._log_path = directory / f"serve-{time.monotonic_ns()}.log"
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [*FVDCTL, "serve", str(image), *where, *options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self.uri = self._read_uri() if ready else ""

    @property
    def pid(self) -> int:
        """The process to kill."""
        return self._process.pid

    @property
    def log(self) -> str:
        """What the server has written to stderr so far."""
        return self._log_path.read_text()

    @property
    def status(self) -> int | None:
        """The exit status, None while it runs."""
        return self._process.poll()

    def connect(self, *, structured: bool = False, meta: bool = False) -> NbdClient:
        """A raw client in the transmission phase."""
        return NbdClient.attach(self.uri, structured=structured, meta=meta)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    def stop(self) -> None:
        """Stop cleanly; fails where that is not what happens."""
        if self.status is None:
            self.signal(signal.SIGTERM)
        status = self.wait()
        if status != 0:
            pytest.fail(f"the server ended with status {status}\n{self.log}")
        for word in ("Traceback", "level=error", "level=critical"):
            if word in self.log:
                pytest.fail(f"the server logged an error\n{self.log}")

    def kill(self) -> None:
        """Kill -9, and wait until it is gone."""
        self._process.kill()
        self.wait()

    def wait(self, limit: float = STOP_SECONDS) -> int:
        """Wait for the end; fails where it does not come."""
        try:
            status = self._process.wait(limit)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            pytest.fail(f"the server did not end within {limit:g} s\n{self.log}")
        if self._process.stdout is not None:
            self._process.stdout.close()
        return status

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None and self.status is None:
            self.stop()
            return
        if self.status is None:
            self.kill()
        if kind is not None:
            print(f"the server's log:\n{self.log}")

    def _read_uri(self) -> str:
        """Wait for the line that says that clients can connect."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        line = b""
        deadline = time.monotonic() + START_SECONDS
        while not line.endswith(b"\n"):
            remaining = deadline - time.monotonic()
            readable, _, _ = select.select([descriptor], [], [], max(remaining, 0))
            piece = os.read(descriptor, 4096) if readable else b""
            if not piece:
                self._process.kill()
                self.wait()
                pytest.fail(f"the server did not start\n{self.log}")
            line += piece
        return line.decode().strip()


def refused(image: Path, *options: str, time_limit: float = START_SECONDS) -> str:
    """Run a serve that must fail at once; returns what it says, without its log lines."""
    done = subprocess.run(
        [*FVDCTL, "serve", str(image), *options],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=time_limit,
        check=False,
    )
    if done.returncode == 0 or done.stdout or "Traceback" in done.stderr:
        pytest.fail(f"status {done.returncode}\n{done.stdout}{done.stderr}")
    lines = [line for line in done.stderr.splitlines() if " level=" not in f" {line}"]
    return "\n".join(lines)
