# SPDX-License-Identifier: Apache-2.0
"""Inside User Mode Linux: a running fvdd with its command line, and programs that must succeed."""

import contextlib
import hashlib
import io
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fvdapi.client import Client
from fvdapi.errors import ApiError
from fvdctl.main import main as fvdctl

Done = subprocess.CompletedProcess[str]

START_SECONDS = 60
COMMAND_SECONDS = 90
DRIVERS = Path("/usr/lib/uml/modules") / os.uname().release / "kernel/drivers"


def wait_until(claim: Callable[[], Any], seconds: float, what: str) -> Any:
    """Wait for a condition and return what it gave; fail with its name when it never comes."""
    deadline = time.monotonic() + seconds
    while True:
        value = claim()
        if value:
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds} s in vain for {what}")
        time.sleep(0.05)  # the interval of polling, never the whole wait


def run(*words: object, check: bool = True, **options: Any) -> Done:
    """Run a program to its end; a failure shows everything it printed."""
    argv = [str(word) for word in words]
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False, **options
    )
    if check and done.returncode:
        pytest.fail(f"{' '.join(argv)}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def hanging(proc: Path = Path("/proc")) -> list[str]:
    """Programs with a thread that waits in the kernel where no signal reaches it (state D)."""
    found = []
    for folder in proc.glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes()
            states = [stat_state(path) for path in folder.glob("task/*/stat")] if words else []
            if "D" in states:
                found.append(f"{folder.name} {words.decode(errors='replace')}")
    return found


def stat_state(path: Path) -> str:
    """The state in a stat file of /proc: it follows the name, which may hold anything."""
    return path.read_text(errors="replace").rpartition(") ")[2][:1]


def load_driver(name: str, path: str) -> None:
    """Load a driver that the kernel has as a module; `path` is below its drivers."""
    module = DRIVERS / path
    if module.exists() and f"{name} " not in Path("/proc/modules").read_text():
        run("insmod", module)


class Fvd:
    """fvdd as a child of the test, and fvdctl that talks to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "fvdd.sock"
        self.log = folder / "fvdd.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.client = Client(str(self.socket))

    def start(self) -> None:
        """Start fvdd and wait until it answers; fvdctl finds it by the environment."""
        os.environ["FVDD_SOCKET"] = str(self.socket)
        # LVM's own folder is read-only in here, and there is no udev to make nodes.
        os.environ |= {"LVM_SYSTEM_DIR": str(self.folder / "lvm"), "DM_DISABLE_UDEV": "1"}
        # Campaigns kill workers more often than any accident: here no storm is suspected.
        config = self.folder / "fvdd.toml"
        config.write_text(
            '[restarts]\ncount_max = 1000\n[storage]\ngrow_program = "builtin:lvextend"\n'
        )
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    "fvdd", "--config", config, "--socket", self.socket,
                    "--state-dir", self.folder / "state", "--metrics", "127.0.0.1:9809",
                ],
                stdout=log, stderr=log,
            )  # fmt: skip
        wait_until(self.answers, START_SECONDS, "fvdd to answer")

    def answers(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            pytest.fail("fvdd ended early:\n" + self.log.read_text())
        try:
            self.client.health()
        except ApiError:
            return False
        return True

    def stop(self) -> None:
        """Stop fvdd as a service manager would."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(START_SECONDS)

    def kill(self) -> None:
        """Kill fvdd, as an accident would; workers and devices stay."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(START_SECONDS)

    def ctl(self, *words: object, check: bool = True) -> Done:
        """Run a command line of fvdctl in this process: a new one costs a second in here."""
        out, err = io.StringIO(), io.StringIO()
        argv = [str(word) for word in words]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = fvdctl([*argv])
        done = Done(["fvdctl", *argv], status, out.getvalue(), err.getvalue())
        if check and status:
            pytest.fail(
                f"fvdctl {' '.join(argv)}: exit status {status}\n{done.stdout}{done.stderr}"
            )
        return done

    def status(self, name: str) -> dict[str, Any]:
        """What fvdd says about a device; through the API, which costs no new process."""
        return self.client.device(name).model_dump(mode="json")

    def attach(self, *words: object) -> str:
        """Attach and return the device path, the only thing that fvdctl prints."""
        lines = self.ctl("attach", *words).stdout.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("/dev/nbd")
        return lines[0]

    def detach(self, name: object) -> None:
        self.ctl("detach", name)

    def names(self) -> list[str]:
        return [device.name for device in self.client.devices()]


def checksum(path: Path) -> str:
    """SHA-256 of a file or device."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
