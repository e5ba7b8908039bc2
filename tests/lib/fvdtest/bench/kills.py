# SPDX-License-Identifier: Apache-2.0
"""How long a device is silent when its worker is killed under writes: a stand-in for the kernel
queues what is in flight and sends it again over a fresh socket, as the kernel does."""

from __future__ import annotations

import os
import random
import signal
import statistics
import tempfile
import threading
import time
from pathlib import Path

import pytest

from fvdtest.bench.figures import Row
from fvdtest.bench.limits import against_limit
from fvdtest.bench.stand import Stand, StandError
from fvdtest.daemon import Daemon, running_daemon, wait_until
from fvdtest.images import make_image
from fvdtest.standin import Disk

MIB = 1 << 20
SIZE = 64 * MIB
LONGEST_SECONDS, MEDIAN_SECONDS = 0.5, 0.2
KILLS, QUICK_KILLS = 20, 3


class Writer:
    """Writes 4 KiB here and there, one after the other, and knows its longest wait."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="writer")
        self.written = 0
        self.longest = 0.0

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        rng = random.Random(5)
        while not self._ended.is_set():
            begin = time.monotonic()
            self._disk.write(rng.randrange(SIZE // 4096) * 4096, rng.randbytes(4096))
            self.longest = max(self.longest, time.monotonic() - begin)
            self.written += 1


def kill_once(daemon: Daemon, name: str, writer: Writer) -> float:
    """Kill the worker; seconds of the longest wait of a write since."""
    wait_until(daemon.has_spare, "the spare worker")
    writer.longest = 0.0
    dead = daemon.device(name).worker_pid
    assert dead is not None
    os.kill(dead, signal.SIGKILL)
    wait_until(
        lambda: daemon.device(name).worker_pid != dead
        and daemon.device(name).state.value == "attached",
        "the successor",
    )
    before = writer.written
    wait_until(lambda: writer.written > before + 1, "writes")
    return writer.longest


def waits_of(stand: Stand, kills: int) -> list[float]:
    """The longest wait of a write after each kill."""
    with tempfile.TemporaryDirectory(dir=stand.memory) as name:
        folder = Path(name)
        image = make_image(folder / "disk.fvd", size=SIZE, compact=True)
        with running_daemon(folder, restarts=10 * kills) as daemon:
            disk = daemon.attach(image)
            with Writer(disk) as writer:
                return [kill_once(daemon, "disk", writer) for _ in range(kills)]


def kill_9(stand: Stand, quick: bool) -> list[Row]:
    """The longest and the median of many."""
    try:
        waits = waits_of(stand, QUICK_KILLS if quick else KILLS)
    except pytest.fail.Exception as error:
        raise StandError(str(error)) from error
    return [
        against_limit("kill-9", max(waits), LONGEST_SECONDS, "s"),
        against_limit("kill-9-median", statistics.median(waits), MEDIAN_SECONDS, "s"),
    ]
