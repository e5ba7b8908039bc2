# SPDX-License-Identifier: Apache-2.0
"""A device continues on a new image: the old one is what it was, and no write is lost."""

import contextlib
import errno
import json
import os
import random
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from fvdapi.client import Client
from fvdapi.models import SnapshotRequest
from fvdd.devices import snapshot
from fvdd.devices.device import Device
from fvdd.worker.client import WorkerError, WorkerProcess
from fvdengine import new_files
from fvdengine.errors import EngineError
from fvdengine.options import CreateOptions
from fvdengine.overlay import header_of
from fvdtest.daemon import Daemon, fvdctl, wait_until
from fvdtest.marks import in_proof
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


def test_an_image_that_has_stopped_is_told_with_what_helps(daemon, clone, monkeypatch):
    image, _ = clone()
    daemon.attach(image)
    exchange = WorkerProcess.exchange

    async def stopped(self, op, fds=(), **arguments):
        if op == "flush":
            raise WorkerError("engine_failed", "Input/output error", "", {})
        return await exchange(self, op, fds, **arguments)

    monkeypatch.setattr(snapshot, "fault_in", lambda directory: errno.EIO)
    monkeypatch.setattr(WorkerProcess, "exchange", stopped)
    for verb in ("snapshot", "backup"):
        refused = daemon.ctl(verb, "web", image.parent / "new", check=False)
        assert "new was not made: Input/output error; web goes on as before" in refused.stderr
        assert "then: fvdctl recover web --discard-unflushed" in refused.stderr
        assert "try again" not in refused.stderr


@pytest.mark.parametrize("step", ["hand_over", in_proof("stop"), "open", in_proof("resume")])
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
    if not is_committed:
        told = f"{new} was not made: the worker died; web goes on as before, with {image}"
        assert done.stderr.splitlines()[0] == f"fvdctl: {told}"
        assert "try again" in done.stderr
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
        if not committed:
            monkeypatch.setattr(session, "update_record", stop_at_the_commit(session))
        await change(session, target)
        raise Stopped

    def stop_at_the_commit(session):
        update = session.update_record

        def stop(*, required=False, **changes):
            if required:
                raise Stopped
            update(**changes)

        return stop

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
        told = second.ctl("doctor", check=False).stdout
        assert (f"{new} was made by a snapshot that was broken off" in told) == (not committed)
        assert (f"if you have no use for it: rm {new}" in told) == (not committed)
        second.detach_all()
    finally:
        if second is not None:
            second.stop()
        daemon.kill_workers()


def test_a_file_that_appears_meanwhile_is_not_removed(daemon, clone, monkeypatch):
    image, model = clone()
    disk = daemon.attach(image)
    new = image.parent / "new.fvd"
    made = snapshot.create_over

    def beaten(path, options, own):
        new.write_bytes(b"somebody else's")
        return made(path, options, own)

    monkeypatch.setattr(snapshot, "create_over", beaten)
    refused = daemon.ctl("snapshot", "web", new, check=False)
    assert refused.returncode == 1
    assert "exists" in refused.stderr
    assert new.read_bytes() == b"somebody else's"
    assert model.difference(disk.read(0, model.size)) is None
    assert daemon.device("web").image == str(image)


@pytest.mark.parametrize("what", ["new image moved", "old image renamed", "worker replaced"])
def test_what_happens_between_making_and_pause_is_found_out(daemon, clone, monkeypatch, what):
    image, model = clone()
    disk = daemon.attach(image)
    disk.write(0, b"before")
    model.write(0, b"before")
    new = image.parent / "new.fvd"
    check = snapshot._check_made

    async def disturbed(session, made):
        if what == "new image moved":
            os.rename(new, image.parent / "moved.fvd")
            new.write_bytes(b"somebody else's")
        elif what == "old image renamed":
            os.rename(image, image.parent / "renamed.fvd")
            await session.follow_image()
        else:
            extension = replace(made.header.extension, base_id=bytes(32))
            made.header = replace(made.header, extension=extension)
        await check(session, made)

    monkeypatch.setattr(snapshot, "_check_made", disturbed)
    refused = daemon.ctl("snapshot", "web", new, check=False)
    assert "new.fvd was not made" in refused.stderr
    assert "web goes on as before" in refused.stderr
    assert "try again" in refused.stderr
    assert new.exists() == (what == "new image moved")
    if new.exists():
        assert new.read_bytes() == b"somebody else's"
        new.unlink()
    disk.write(5000, b"more")
    model.write(5000, b"more")
    assert model.difference(disk.read(0, model.size)) is None
    assert daemon.ctl("doctor", check=False).stdout.count("new.fvd") == 0
    monkeypatch.undo()
    daemon.ctl("snapshot", "web", new)
    assert model.difference(disk.read(0, model.size)) is None


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


def test_the_device_is_run_as_before(daemon, clone):
    image, model = clone("web", "--copy-on-read", "--prefetch-delay", "3600")
    disk = daemon.attach(image)
    fields = ("prefetch_max_read_throughput=20480", "journal_clean_buf_period=777")
    daemon.ctl("update", "web", *fields, "max_outstanding_copy_on_read_data=4M")
    daemon.ctl("prefetch", "web", "pause")
    new = image.parent / "new.fvd"
    daemon.ctl("snapshot", "web", new)
    status = daemon.device("web")
    assert status.prefetch.paused_reason == "manual"
    assert status.base_bytes_left == model.size
    assert model.difference(disk.read(0, 1 << 20)) is None
    wait_until(lambda: daemon.device("web").base_bytes_left < model.size, "copy-on-read")
    daemon.ctl("prefetch", "web", "start")
    wait_until(lambda: daemon.device("web").base_bytes_left == 0, "the copy")
    daemon.ctl("detach", "web")
    old, after = header_of(str(image)), header_of(str(new))
    assert (after.copy_on_read, after.prefetch_start_delay) == (1, 3600)
    assert after.prefetch_max_read_throughput == 20480
    assert after.journal_clean_buf_period == 777
    assert after.max_outstanding_copy_on_read_data == old.max_outstanding_copy_on_read_data
    assert model.difference(content(new, model.size)) is None


def test_an_image_that_has_let_its_base_go_stays_whole_below_a_snapshot(daemon, clone, base):
    image, model = clone()
    disk = daemon.attach(image)
    daemon.ctl("prefetch", "web", "start")
    daemon.ctl("prefetch", "web", "wait")
    worker = daemon.device("web").worker_pid
    wait_until(lambda: base not in opened_by(worker), "the base to be closed")
    base.unlink()
    daemon.ctl("prefetch", "web", "pause")  # else it would copy the old image into the new one
    new = image.parent / "new.fvd"
    daemon.ctl("snapshot", "web", new)
    disk.write(1 << 20, b"after" * 10_000)
    model.write(1 << 20, b"after" * 10_000)
    assert model.difference(disk.read(0, model.size)) is None
    os.kill(daemon.device("web").worker_pid, signal.SIGKILL)
    assert model.difference(disk.read(0, model.size)) is None
    wait_until(lambda: daemon.device("web").state == "attached", "the successor")
    assert {image, new} <= opened_by(daemon.device("web").worker_pid)
    daemon.ctl("detach", "web")
    for path in (image, new):
        assert fvdctl("check", path).returncode == 0
    assert header_of(str(new)).base_img == image.name
    assert model.difference(content(new, model.size)) is None


def opened_by(pid):
    """The files that a process has open."""
    folder, paths = Path(f"/proc/{pid}/fd"), set()
    for entry in folder.iterdir():
        with contextlib.suppress(OSError):
            paths.add(entry.readlink())
    return paths


def test_a_backup_that_was_broken_off_comes_first(daemon, clone, tmp_path, monkeypatch):
    """Else the settings that it has for its time would stay, and its base in the chain."""
    image, model = clone("web", "--copy-on-read")
    disk = daemon.attach(image)
    exchange = WorkerProcess.exchange

    async def deadly(self, said, fds=(), **arguments):
        if said in ("copy_out", "fold"):
            os.kill(self.pid, signal.SIGKILL)
        return await exchange(self, said, fds, **arguments)

    monkeypatch.setattr(WorkerProcess, "exchange", deadly)
    assert daemon.ctl("backup", "web", tmp_path / "copy.raw", check=False).returncode != 0
    monkeypatch.undo()
    assert (tmp_path / "web.fvd.backup-base").exists()
    changes = [("snapshot", "web", tmp_path / "new.fvd"), ("update", "web", "copy_on_read=0")]
    for words in changes:
        refused = daemon.ctl(*words, check=False)
        assert refused.returncode != 0
        assert "a backup of web was broken off" in refused.stderr
        assert "fvdctl backup web FILE" in refused.stderr
    assert not (tmp_path / "new.fvd").exists()
    # The record of another attachment does not know of it, but the files do.
    daemon.ctl("detach", "web")
    disk = daemon.attach(image)
    for words in changes:
        refused = daemon.ctl(*words, check=False)
        assert "a backup of web was broken off" in refused.stderr
    daemon.ctl("backup", "web", tmp_path / "again.raw")
    daemon.ctl("snapshot", "web", tmp_path / "new.fvd")
    assert model.difference(disk.read(0, model.size)) is None
    daemon.ctl("detach", "web")
    assert header_of(str(tmp_path / "new.fvd")).copy_on_read == 1


def test_what_is_said_of_the_prefetch_meanwhile_waits_for_the_end(daemon, clone, monkeypatch):
    image, _ = clone("web", "--prefetch-delay", "3600")
    daemon.attach(image)
    made, asked, done = snapshot.create_over, threading.Event(), []
    prefetch = Device.prefetch
    pause = threading.Thread(
        target=lambda: done.append(daemon.ctl("prefetch", "web", "pause", check=False))
    )

    async def noted(device, action):
        asked.set()
        await prefetch(device, action)

    def slow(path, options, own):
        pause.start()
        assert asked.wait(30)
        return made(path, options, own)

    monkeypatch.setattr(Device, "prefetch", noted)
    monkeypatch.setattr(snapshot, "create_over", slow)
    daemon.ctl("snapshot", "web", image.parent / "new.fvd")
    pause.join(60)
    assert done[0].returncode == 0, done[0].stderr
    assert daemon.device("web").prefetch.paused_reason == "manual"


def test_snapshot_tells_the_line_that_the_table_of_devices_needs(daemon, clone, tmp_path):
    image, _ = clone()
    table, new = tmp_path / "fvdtab", tmp_path / "web2.fvd"
    table.write_text(f"web {image} cache=writeback\n")
    daemon.ctl("boot", "--file", table, "web")
    done = daemon.ctl("snapshot", "web", new, "--fvdtab", table, "--json")
    line = f"web {new} cache=writeback"
    assert f"{table}, line 1: 'web' is still on {image}" in done.stderr
    assert f"write there: {line}\n" in done.stderr
    assert json.loads(done.stdout)["warnings"][0].endswith(line)
    # Until that is done the device is known to be on another image than the table says.
    done = daemon.ctl("boot", "--file", table, "web", check=False)
    assert f"device web is attached already, with {new}; {table} has it on {image}" in done.stderr
    assert f"name that in {table}" in done.stderr
    table.write_text(f"{line}\n")
    assert daemon.ctl("boot", "--file", table, "web").stdout == "/dev/nbd0\n"
    assert daemon.ctl("snapshot", "web", tmp_path / "web3.fvd").stderr.count("fvdtab") == 0


@pytest.mark.parametrize("name", ["web", "www"])
def test_table_that_was_left_behind_is_told_at_each_snapshot_and_by_doctor(
    daemon, clone, tmp_path, name
):
    image, _ = clone()
    table, first, second = tmp_path / "fvdtab", tmp_path / "web2.fvd", tmp_path / "web3.fvd"
    table.write_text(f"web {image} -\n")
    daemon.attach(image, "--name", name)
    for new in (first, second):
        done = daemon.ctl("snapshot", name, new, "--fvdtab", table)
        assert f"{table}, line 1: 'web' is still on {image}, which the next boot" in done.stderr
        told = daemon.ctl("doctor", "--fvdtab", table, check=False).stdout
        assert f"[!!] fvdtab: {table}, line 1: 'web' is still on {image}" in told
        assert str(new) in told[told.index("fvdtab:") :]
    table.write_text(f"web {second} -\n")
    assert "fvdtab:" not in daemon.ctl("doctor", "--fvdtab", table, check=False).stdout


def test_new_image_whose_name_cannot_be_made_durable_is_not_held(tmp_path, monkeypatch):
    def fail(fd):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    fvdctl("create", tmp_path / "web.fvd", "1M")
    options = CreateOptions(base=str(tmp_path / "web.fvd"), base_format="fvd")
    monkeypatch.setattr(new_files, "_sync_directory_of", fail)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(EngineError):
        snapshot._make(str(tmp_path / "new.fvd"), options, is_direct=False)
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert os.listdir(tmp_path) == ["web.fvd"]
