# SPDX-License-Identifier: Apache-2.0
"""A fvdd with devices under load, scraped by a real Prometheus, for all tests of this folder."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fvdtest import tree
from fvdtest.daemon import Daemon, fvdctl, wait_until
from fvdtest.prometheus import NodeExporter, Prometheus, free_port
from fvdtest.standin import Disk

BASE_SIZE = 64 << 20
MIB = 1 << 20
RULES = tree.ROOT / "packaging/prometheus/fvd.rules.yml"


@dataclass(frozen=True)
class Observed:
    """What the tests look at."""

    daemon: Daemon
    prometheus: Prometheus
    node: NodeExporter
    metrics: str


class Load(threading.Thread):
    """Reads, writes, flushes and trims until it is told to end."""

    def __init__(self, disk: Disk, seed: int) -> None:
        super().__init__(name=f"load {disk.index}", daemon=True)
        self.disk, self.rng = disk, random.Random(seed)
        self.ending = threading.Event()
        self.failure: Exception | None = None

    def run(self) -> None:
        try:
            while not self.ending.is_set():
                self.turn()
        except Exception as error:  # told by end()
            self.failure = error

    def turn(self) -> None:
        offset = self.rng.randrange(BASE_SIZE // 4096) * 4096
        self.disk.read(offset, 4096)
        self.disk.write(offset, b"w" * 1024)
        self.disk.write_zeroes(offset, 4096)
        self.disk.trim(offset, 4096)
        self.disk.flush()

    def end(self) -> None:
        self.ending.set()
        self.join(30)
        assert not self.is_alive()
        assert self.failure is None, self.failure


def make_images(folder: Path) -> list[Path]:
    base = folder / "base.raw"
    with base.open("wb") as file:
        block = bytes(random.Random(3).choices(range(1, 256), k=MIB))
        for _ in range(BASE_SIZE // MIB - 8):
            file.write(block)
        file.truncate(BASE_SIZE)
    images = []
    for name, options in (
        ("copies", ("--copy-on-read",)),
        ("fetches", ()),
        ("small-journal", ("--journal-size", "64k", "--block-size", "4k")),
    ):
        images.append(folder / f"{name}.fvd")
        fvdctl("create", images[-1], "--base", base, "--base-format", "raw", *options)
    return images


@pytest.fixture(scope="session")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    """Three devices that work, one of whose workers was killed, and who watches them."""
    folder = tmp_path_factory.mktemp("monitoring")
    metrics = f"127.0.0.1:{free_port()}"
    daemon = Daemon(folder, metrics=metrics).start()
    loads = []
    try:
        with (
            NodeExporter(folder) as node,
            Prometheus(folder, {"fvd": metrics, "node": node.address}, RULES) as prometheus,
        ):
            images = make_images(folder)
            daemon.attach(images[0], "--name", "early")
            daemon.ctl("detach", "early")
            disks = [daemon.attach(image, "--wait", "node") for image in images]
            loads = [Load(disk, number) for number, disk in enumerate(disks)]
            for load in loads:
                load.start()
            daemon.ctl("prefetch", "small-journal", "start")
            daemon.ctl("prefetch", "small-journal", "pause")
            wait_until(
                lambda: prometheus.query("fvd_io_requests_total > 0"), "a scrape under load"
            )
            # After a scrape, so that a rate is seen, however quick it is.
            daemon.ctl("prefetch", "fetches", "start")
            pid = daemon.device("copies").worker_pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            wait_until(
                lambda: prometheus.query("sum(rate(fvd_live_takeovers_total[1m])) > 0"),
                "a takeover to be seen",
            )
            wait_until(
                lambda: prometheus.query("sum(rate(fvd_journal_checkpoints_total[1m])) > 0"),
                "a checkpoint to be seen",
            )
            yield Observed(daemon, prometheus, node, f"http://{metrics}/metrics")
            for load in loads:
                load.end()
        daemon.detach_all()
    finally:
        for load in loads:
            load.ending.set()
        daemon.stop()
        daemon.kill_workers()
