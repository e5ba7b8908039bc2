# SPDX-License-Identifier: Apache-2.0
"""A device continues on a new image: the old one is what it was, and no write is lost."""

import json
import os
import random
import signal
import threading

import pytest

from fvdapi.client import Client
from fvdapi.models import SnapshotRequest
from fvdd.devices import snapshot
from fvdd.worker.client import WorkerProcess
from fvdtest.daemon import Daemon, fvdctl, wait_until
from fvdtest.model import FlatModel
from fvdtest.serve import Server


def content(image, size, *options):
    with Server(image, "-r", *options, directory=image.parent) as server:
        client = server.connect()
        data = client.read(0, size)
        client.disconnect()
    return data


def test_old_image_stays_and_the_new_one_takes_the_writes(daemon, clone):
    image, model = clone()
    disk = daemon.attach(image)
    disk.write(1000, b"before")
    model.write(1000, b"before")
    frozen = FlatModel(model.size, model.read(0, model.size))
    new = image.parent / "new.fvd"
    done = daemon.ctl("snapshot", "web", new)
    assert f"web: continues on {new}, {image} stays as it is (paused " in done.stderr
    disk.write(1000, b"after!")
    model.write(1000, b"after!")
    disk.write(3_000_000, b"x" * 5000)
    model.write(3_000_000, b"x" * 5000)
    assert model.difference(disk.read(0, model.size)) is None
    assert (disk.deaths, disk.resent) == (0, 0)
    status = daemon.status("web")
    assert (status["image"], status["restarts"]) == (str(new), 0)
    # A successor finds the new image as well, and so does another snapshot.
    os.kill(status["worker_pid"], signal.SIGKILL)
    assert model.difference(disk.read(0, model.size)) is None
    wait_until(lambda: daemon.device("web").restarts == 1, "the successor")
    daemon.ctl("snapshot", "web", image.parent / "third.fvd")
    assert model.difference(disk.read(0, model.size)) is None
    daemon.ctl("detach", "web")
    for path in (image, new, image.parent / "third.fvd"):
        assert fvdctl("check", path).returncode == 0
    assert frozen.difference(content(image, model.size)) is None
    assert model.difference(content(image.parent / "third.fvd", model.size)) is None


def test_snapshots_under_load_lose_and_reorder_nothing(daemon, clone):
    image, model = clone()
    disk = daemon.attach(image, "--connections", "2")
    stop = threading.Event()
    failures = []

    def load(begin):
        source = random.Random(begin)
        try:
            while not stop.is_set():
                offset = begin + source.randrange(model.size // 2 - 70_000)
                data = source.randbytes(source.choice([100, 4096, 70_000]))
                disk.write(offset, data)
                model.write(offset, data)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=load, args=(lane * model.size // 2,)) for lane in range(2)]
    for thread in threads:
        thread.start()
    try:
        with daemon.client() as client:
            for number in range(4):
                target = str(image.parent / f"s{number}.fvd")
                assert client.snapshot("web", SnapshotRequest(target=target)).image == target
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not failures
    assert disk.deaths == 0
    assert model.difference(disk.read(0, model.size)) is None


def test_what_cannot_be_a_target_is_refused(daemon, clone, tmp_path):
    image, model = clone()
    disk = daemon.attach(image)
    worker = daemon.device("web").worker_pid
    (tmp_path / "there").touch()
    refused = daemon.ctl("snapshot", "web", tmp_path / "there", check=False)
    assert "exists already" in refused.stderr
    assert daemon.device("web").worker_pid == worker
    refused = daemon.ctl("snapshot", "web", tmp_path / "none/new.fvd", check=False)
    assert refused.returncode != 0
    assert daemon.device("web").image == str(image)
    disk.write(0, b"goes on")
    model.write(0, b"goes on")
    assert model.difference(disk.read(0, model.size)) is None
    assert disk.deaths == 0
    daemon.ctl("detach", "web")
    daemon.attach(image, "-r")
    refused = daemon.ctl("snapshot", "web", tmp_path / "new.fvd", check=False)
    assert "read-only" in refused.stderr


@pytest.mark.parametrize("step", ["hand_over", "stop", "open", "resume"])
def test_worker_that_dies_on_either_side_of_the_commit_loses_nothing(
    daemon, clone, monkeypatch, step
):
    image, model = clone()
    disk = daemon.attach(image)
    disk.write(0, b"acknowledged")
    model.write(0, b"acknowledged")
    exchange = WorkerProcess.exchange
    struck = []

    async def deadly(self, op, fds=(), **arguments):
        if op == step and not struck:
            struck.append(op)
            os.kill(self.pid, signal.SIGKILL)
        return await exchange(self, op, fds, **arguments)

    monkeypatch.setattr(WorkerProcess, "exchange", deadly)
    new = image.parent / "new.fvd"
    done = daemon.ctl("snapshot", "web", new, check=False)
    assert struck
    is_committed = step in ("open", "resume")
    assert (done.returncode == 0) == is_committed
    assert daemon.device("web").image == str(new if is_committed else image)
    disk.write(5000, b"more")
    model.write(5000, b"more")
    assert model.difference(disk.read(0, model.size)) is None
    daemon.ctl("detach", "web")
    assert model.difference(content(new if is_committed else image, model.size)) is None


class Stopped(BaseException):
    """fvdd dies here."""


@pytest.mark.parametrize("committed", [False, True])
def test_daemon_that_dies_beside_the_commit_is_succeeded(tmp_path, clone, monkeypatch, committed):
    image, model = clone()
    daemon = Daemon(tmp_path).start()
    disk = daemon.attach(image)
    disk.write(0, b"acknowledged")
    model.write(0, b"acknowledged")
    new = image.parent / "new.fvd"
    change = snapshot._change_image

    async def dies(session, target):
        if committed:
            await change(session, target)
        raise Stopped

    monkeypatch.setattr(snapshot, "_change_image", dies)
    second = None
    try:
        daemon.ctl("snapshot", "web", new, check=False)
        monkeypatch.undo()
        daemon.stop()
        second = Daemon(tmp_path, after=daemon).start()
        wait_until(second.settled, "the adoption to end")
        status = second.device("web")
        assert (status.state, status.image) == ("attached", str(new if committed else image))
        disk.write(5000, b"more")
        model.write(5000, b"more")
        assert model.difference(disk.read(0, model.size)) is None
        record = json.loads((second.state / "devices/web/device.json").read_text())
        assert record["request"]["image"] == status.image
        second.detach_all()
    finally:
        if second is not None:
            second.stop()
        daemon.kill_workers()


def test_a_file_that_appears_meanwhile_is_not_removed(daemon, clone, monkeypatch):
    image, model = clone()
    disk = daemon.attach(image)
    new = image.parent / "new.fvd"
    made = snapshot.create_image

    def beaten(path, options):
        new.write_bytes(b"somebody else's")
        return made(path, options)

    monkeypatch.setattr(snapshot, "create_image", beaten)
    refused = daemon.ctl("snapshot", "web", new, check=False)
    assert refused.returncode == 1
    assert "exists" in refused.stderr
    assert new.read_bytes() == b"somebody else's"
    assert model.difference(disk.read(0, model.size)) is None
    assert daemon.device("web").image == str(image)


def test_what_attach_allowed_holds_for_snapshots_and_backups(daemon, base, tmp_path):
    for name in ("golden", "images", "other"):
        (tmp_path / name).mkdir()
    golden = base.rename(tmp_path / "golden/base.raw")
    image = tmp_path / "images/web.fvd"
    allowed = ("--allow-dir", tmp_path / "golden")
    fvdctl("create", image, "--base", golden, "--base-format", "raw", *allowed)
    os.utime(golden, (1, 1))
    disk = daemon.attach(image, *allowed, "--accept-changed-base")
    model = FlatModel(golden.stat().st_size, golden.read_bytes())
    daemon.ctl("backup", "web", tmp_path / "other/copy.raw")
    assert model.difference((tmp_path / "other/copy.raw").read_bytes()) is None
    daemon.ctl("snapshot", "web", tmp_path / "other/new.fvd")
    disk.write(0, b"after")
    model.write(0, b"after")
    assert model.difference(disk.read(0, model.size)) is None


def test_a_name_that_needs_resolving_is_kept_resolved(daemon, clone):
    image, model = clone()
    disk = daemon.attach(image)
    target = f"{image.parent}/not-there/../new.fvd"
    with Client(str(daemon.socket)) as client:
        client.snapshot("web", SnapshotRequest(target=target))
    assert daemon.device("web").image == str(image.parent / "new.fvd")
    assert model.difference(disk.read(0, model.size)) is None
