# SPDX-License-Identifier: Apache-2.0
"""Workers and servers have given up their privileges, in every thread, and do all they must."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from fvdd.worker import seccomp
from fvdengine.units import round_up
from fvdtest.guest import wait_until
from fvdtest.model import FlatModel

from .conftest import World, create
from .test_worker import LIMIT, attach, drive, worker_in

FILTER = "2" if seccomp.is_supported() else "0"
DAC_READ_SEARCH = 1 << 2


def threads_of(pid: int) -> list[dict[str, str]]:
    """The status lines of every thread of a process."""
    found = []
    for folder in Path(f"/proc/{pid}/task").iterdir():
        try:
            lines = (folder / "status").read_text().splitlines()
        except OSError:  # the thread of a connection has ended
            continue
        found.append({name: value.strip() for name, _, value in (x.partition(":") for x in lines)})
    return found


def expect_confined(pid: int, kept: int = 0) -> None:
    """Check that no thread can do, or get back, more than `kept` says."""
    threads = threads_of(pid)
    # The engine's threads besides the interpreter's.
    assert len(threads) > 8
    for thread in threads:
        assert int(thread["CapEff"], 16) == 0
        assert int(thread["CapInh"], 16) == 0
        assert int(thread["CapPrm"], 16) & ~kept == 0
        if os.geteuid() == 0:
            assert int(thread["CapBnd"], 16) & ~kept == 0
        assert thread["NoNewPrivs"] == "1"
        assert thread.get("Seccomp", "0") == FILTER


def test_worker_is_confined_from_the_moment_it_has_its_image(clone: World) -> None:
    async def scenario() -> None:
        async with worker_in(None) as worker:
            await worker.request("ping", timeout=LIMIT)
            assert threads_of(worker.pid)[0]["NoNewPrivs"] == "0"
            await worker.request("open", image=str(clone.image), timeout=LIMIT)
            expect_confined(worker.pid)
            client = await attach(worker)
            await worker.request("status", timeout=LIMIT)
            expect_confined(worker.pid)
            client.close()
            await worker.request("stop", timeout=LIMIT)
            assert await worker.wait() == 0

    drive(scenario)


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_server_is_confined_and_stops_clean(clone: World, tmp_path: Path, tcp: bool) -> None:
    options = ("--state", str(tmp_path / "state"), "--metrics", "127.0.0.1:0")
    with clone.serve(*options, tcp=tcp) as server:
        clone.expect(server)
        expect_confined(server.pid)
        clone.scribble(server)
    assert not (tmp_path / "state" / "live").exists()
    assert not server.socket_path.exists()
    with clone.serve("-r") as server:
        clone.expect(server)
        expect_confined(server.pid)


def children_of(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(word) for path in found for word in path.read_text().split()]


def test_server_of_a_base_is_started_again_by_a_confined_process(
    clone: World, tmp_path: Path
) -> None:
    """The worker keeps what its child needs, and the child gets no more than that."""
    raw, base, image = tmp_path / "base.raw", tmp_path / "base.qcow2", tmp_path / "over.fvd"
    size = round_up(raw.stat().st_size, 512)
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, base], check=True, timeout=60
    )
    create(image, size=clone.model.size, base=str(base), base_format="qcow2")
    model = FlatModel(clone.model.size, raw.read_bytes().ljust(size, b"\0"))
    world = World(tmp_path, image, model, clone.rng)
    with world.serve("--no-copy-on-read") as server:
        expect_confined(server.pid, DAC_READ_SEARCH)
        (first,) = children_of(server.pid)
        expect_limited(first)
        world.expect(server)
        os.kill(first, signal.SIGKILL)
        (second,) = wait_until(
            lambda: [pid for pid in children_of(server.pid) if pid != first], 20, "a new child"
        )
        world.expect(server)
        expect_limited(second)
        assert threads_of(second)[0].get("Seccomp", "0") == FILTER


def expect_limited(child: int) -> None:
    """Check that a server of a base can read its file and has no other right."""
    status = threads_of(child)[0]
    assert int(status["CapEff"], 16) & ~DAC_READ_SEARCH == 0
    assert status["NoNewPrivs"] == "1"
