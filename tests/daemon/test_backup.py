# SPDX-License-Identifier: Apache-2.0
"""A copy of a disk at one moment, while it is written; the device ends up as it was before."""

import os
import random
import signal
import threading

import pytest

from fvdd.devices import backup
from fvdd.worker.client import WorkerProcess
from fvdtest.daemon import Daemon, fvdctl, wait_until
from fvdtest.model import FlatModel
from fvdtest.serve import Server


def content(image, size):
    with Server(image, "-r", directory=image.parent) as server:
        client = server.connect()
        data = client.read(0, size)
        client.disconnect()
    return data


def write(disk, model, offset, data):
    disk.write(offset, data)
    model.write(offset, data)


class Held:
    """Lets something happen while a backup copies."""

    def __init__(self, monkeypatch, op="copy_out"):
        self.begun, self.go_on = threading.Event(), threading.Event()
        exchange = WorkerProcess.exchange

        async def slow(process, said, fds=(), **arguments):
            if said == op:
                self.begun.set()
                while not self.go_on.is_set():
                    await exchange(process, "ping", timeout=10)
            return await exchange(process, said, fds, **arguments)

        monkeypatch.setattr(WorkerProcess, "exchange", slow)

    def __enter__(self):
        assert self.begun.wait(30)
        return self

    def __exit__(self, kind, error, trace):
        self.go_on.set()


def in_background(daemon, *words):
    done = []
    thread = threading.Thread(target=lambda: done.append(daemon.ctl(*words, check=False)))
    thread.start()

    def result():
        thread.join(60)
        return done[0]

    return result


def test_copy_is_of_one_moment_and_later_writes_stay(daemon, clone, tmp_path, monkeypatch):
    image, model = clone()
    disk = daemon.attach(image)
    write(disk, model, 1000, b"before")
    before = daemon.status("web")
    frozen = FlatModel(model.size, model.read(0, model.size))
    held = Held(monkeypatch)
    result = in_background(daemon, "backup", "web", tmp_path / "copy.raw")
    with held:
        write(disk, model, 1000, b"after!")
        write(disk, model, 4_000_000, bytes(100_000))
        write(disk, model, 6_000_000, b"y" * 70_001)
        disk.trim(200_000, 65_536)
        trimmed = disk.read(200_000, 65_536)
        model.write(200_000, trimmed)
        assert model.difference(disk.read(0, model.size)) is None
    done = result()
    assert done.returncode == 0, done.stderr
    assert "web: " in done.stderr
    assert "paused" in done.stderr
    assert frozen.difference((tmp_path / "copy.raw").read_bytes()) is None
    # The device is what it was: same name, no base more, nothing left over.
    assert model.difference(disk.read(0, model.size)) is None
    assert (disk.deaths, disk.resent) == (0, 0)
    status = daemon.status("web")
    assert (status["image"], status["image_uuid"]) == (str(image), before["image_uuid"])
    assert sorted(os.listdir(tmp_path)).count("web.fvd") == 1
    assert not [name for name in os.listdir(tmp_path) if "backup" in name or ".part" in name]
    daemon.ctl("detach", "web")
    assert fvdctl("check", image).returncode == 0
    assert model.difference(content(image, model.size)) is None


def test_backups_under_load_lose_nothing(daemon, clone, tmp_path):
    image, model = clone()
    disk = daemon.attach(image, "--connections", "2")
    stop = threading.Event()
    failures = []

    def load(begin):
        source = random.Random(begin)
        try:
            while not stop.is_set():
                offset = begin + source.randrange(model.size // 2 - 70_000)
                write(disk, model, offset, source.randbytes(source.choice([100, 4096, 70_000])))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=load, args=(lane * model.size // 2,)) for lane in range(2)]
    for thread in threads:
        thread.start()
    try:
        for number in range(3):
            daemon.ctl("backup", "web", tmp_path / f"copy{number}.raw")
            assert (tmp_path / f"copy{number}.raw").stat().st_size == model.size
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not failures
    assert disk.deaths == 0
    assert model.difference(disk.read(0, model.size)) is None


def test_read_only_device_is_copied_without_a_pause(daemon, clone, tmp_path):
    image, model = clone()
    daemon.attach(image, "-r")
    worker = daemon.device("web").worker_pid
    done = daemon.ctl("backup", "web", tmp_path / "copy.raw")
    assert "paused" not in done.stderr
    assert model.difference((tmp_path / "copy.raw").read_bytes()) is None
    assert daemon.device("web").worker_pid == worker


def test_zeros_take_no_space(daemon, tmp_path):
    image = tmp_path / "thin.fvd"
    fvdctl("create", image, "64M")
    daemon.attach(image).write(1 << 20, b"x" * 4096)
    daemon.ctl("backup", "thin", tmp_path / "copy.raw")
    assert (tmp_path / "copy.raw").stat().st_size == 64 << 20
    assert (tmp_path / "copy.raw").stat().st_blocks * 512 <= 1 << 20


@pytest.mark.parametrize("target", ["there", "none/copy.raw"])
def test_what_cannot_be_a_target_is_refused(daemon, clone, tmp_path, target):
    image, _ = clone()
    disk = daemon.attach(image)
    worker = daemon.device("web").worker_pid
    (tmp_path / "there").touch()
    refused = daemon.ctl("backup", "web", tmp_path / target, check=False)
    assert refused.returncode != 0
    assert str((tmp_path / target).name if target == "there" else "none") in refused.stderr
    assert daemon.device("web").worker_pid == worker
    assert disk.deaths == 0


def test_second_backup_at_once_is_refused_and_detach_is_not_held_up(
    daemon, clone, tmp_path, monkeypatch
):
    image, model = clone()
    disk = daemon.attach(image)
    held = Held(monkeypatch)
    result = in_background(daemon, "backup", "web", tmp_path / "copy.raw")
    with held:
        refused = daemon.ctl("backup", "web", tmp_path / "other.raw", check=False)
        assert "already" in refused.stderr
        write(disk, model, 0, b"written meanwhile")
        daemon.ctl("detach", "web")
    done = result()
    assert done.returncode != 0
    assert "next backup" in done.stderr
    assert (tmp_path / "copy.raw").exists()
    # Nothing is lost, and the next backup tidies up.
    disk = daemon.attach(image)
    assert model.difference(disk.read(0, model.size)) is None
    daemon.ctl("backup", "web", tmp_path / "again.raw")
    assert model.difference((tmp_path / "again.raw").read_bytes()) is None
    assert model.difference(disk.read(0, model.size)) is None
    assert not (tmp_path / f"web.fvd{backup.SUFFIX}").exists()


@pytest.mark.parametrize("op", ["copy_out", "fold"])
def test_copier_that_dies_costs_the_backup_alone(daemon, clone, tmp_path, monkeypatch, op):
    image, model = clone()
    disk = daemon.attach(image)
    write(disk, model, 0, b"acknowledged")
    exchange = WorkerProcess.exchange

    async def deadly(self, said, fds=(), **arguments):
        if said == op:
            os.kill(self.pid, signal.SIGKILL)
        return await exchange(self, said, fds, **arguments)

    monkeypatch.setattr(WorkerProcess, "exchange", deadly)
    assert daemon.ctl("backup", "web", tmp_path / "copy.raw", check=False).returncode != 0
    assert (tmp_path / "copy.raw").exists() == (op == "fold")
    write(disk, model, 70_000, b"more")
    assert model.difference(disk.read(0, model.size)) is None
    monkeypatch.undo()
    daemon.ctl("backup", "web", tmp_path / "again.raw")
    assert model.difference((tmp_path / "again.raw").read_bytes()) is None
    assert model.difference(disk.read(0, model.size)) is None
    daemon.ctl("detach", "web")
    assert model.difference(content(image, model.size)) is None
    assert not (tmp_path / f"web.fvd{backup.SUFFIX}").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("snapshot", "web", "new.fvd"), ("set-read-only", "web", "on"),
        ("update", "web", "copy_on_read=0"), ("prefetch", "web", "policy", "eager"),
    ],
    ids=lambda words: words[0],
)  # fmt: skip
def test_what_the_end_of_a_backup_would_undo_waits_for_it(
    daemon, clone, tmp_path, monkeypatch, words
):
    image, model = clone()
    disk = daemon.attach(image)
    monkeypatch.chdir(tmp_path)
    held = Held(monkeypatch)
    result = in_background(daemon, "backup", "web", tmp_path / "copy.raw")
    with held:
        refused = daemon.ctl(*words, check=False)
        assert refused.returncode == 5
        assert "a backup of web is being made" in refused.stderr
    assert result().returncode == 0
    assert model.difference(disk.read(0, model.size)) is None
    assert daemon.device("web").image == str(image)


@pytest.mark.parametrize("step", ["copy", "set aside", "put together"])
def test_daemon_that_dies_in_a_backup_is_succeeded(tmp_path, clone, monkeypatch, step):
    class Stopped(BaseException):
        """fvdd dies here."""

    async def dies(*arguments):
        raise Stopped

    name = {"copy": "_in_a_worker", "set aside": "_set_aside", "put together": "_put_together"}
    image, model = clone()
    daemon = Daemon(tmp_path).start()
    disk = daemon.attach(image)
    write(disk, model, 0, b"acknowledged")
    second = None
    try:
        monkeypatch.setattr(backup, name[step], dies)
        daemon.ctl("backup", "web", tmp_path / "copy.raw", check=False)
        monkeypatch.undo()
        daemon.stop()
        second = Daemon(tmp_path, after=daemon).start()
        wait_until(second.settled, "the adoption to end")
        assert second.device("web").state == "attached"
        write(disk, model, 5000, b"more")
        assert model.difference(disk.read(0, model.size)) is None
        leftover = f"web.fvd{backup.SUFFIX} belongs to"
        assert (leftover in second.ctl("doctor", check=False).stdout) == (step != "set aside")
        second.ctl("backup", "web", tmp_path / "again.raw")
        assert leftover not in second.ctl("doctor", check=False).stdout
        assert model.difference((tmp_path / "again.raw").read_bytes()) is None
        assert not (tmp_path / f"web.fvd{backup.SUFFIX}").exists()
        second.detach_all()
    finally:
        if second is not None:
            second.stop()
        daemon.kill_workers()
