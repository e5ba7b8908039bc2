# SPDX-License-Identifier: Apache-2.0
"""A copy of a disk at one moment, while it is written; the device ends up as it was before."""

import asyncio
import errno
import json
import os
import random
import signal
import threading

import pytest

from fvdd.devices import backup
from fvdd.worker.client import WorkerError, WorkerLost, WorkerProcess
from fvdengine import overlay
from fvdengine.options import CreateOptions
from fvdtest.daemon import Daemon, fvdctl, record_of, running_daemon, wait_until
from fvdtest.held import Held, in_background
from fvdtest.marks import in_proof
from fvdtest.model import FlatModel
from fvdtest.serve import Server

HANG_SECONDS = 0.3
ENOUGH = 5


@pytest.fixture(scope="module")
def one_daemon(tmp_path_factory):
    with running_daemon(tmp_path_factory.mktemp("fvdd")) as running:
        yield running


@pytest.fixture
def daemon(one_daemon):
    yield one_daemon
    one_daemon.detach_all()


def content(image, size):
    with Server(image, "-r", directory=image.parent) as server:
        client = server.connect()
        data = client.read(0, size)
        client.disconnect()
    return data


def leftovers(folder):
    return [name for name in os.listdir(folder) if "backup" in name or ".part" in name]


def write(disk, model, offset, data):
    disk.write(offset, data)
    model.write(offset, data)


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
    assert leftovers(tmp_path) == []
    daemon.ctl("detach", "web")
    assert fvdctl("check", image).returncode == 0
    assert model.difference(content(image, model.size)) is None


@pytest.mark.proof
def test_backups_under_load_lose_nothing(daemon, clone, tmp_path):
    image, model = clone()
    disk = daemon.attach(image, "--connections", "2")
    stop = threading.Event()
    failures = []

    def load(begin):
        source = random.Random(begin)
        try:
            while not stop.wait(0.002):  # it shares this process with fvdd
                offset = begin + source.randrange(model.size // 2 - 70_000)
                write(disk, model, offset, source.randbytes(source.choice([100, 4096, 70_000])))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=load, args=(lane * model.size // 2,)) for lane in range(2)]
    for thread in threads:
        thread.start()
    try:
        for number in range(2):
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


TARGETS = {
    "there": "exists already",
    "none/copy.raw": "there is no directory",
    "/proc/copy.raw": "cannot be created",
    "n" * 256: "shorter by 1 bytes",
    "web.fvd.backup-base": "a name that backups give to images",
    "web.fvd.backup-base.new": "a name that backups give to images",
}


def test_what_cannot_be_a_target_is_refused_before_the_device_is_touched(
    daemon, clone, tmp_path
):
    image, _ = clone()
    disk = daemon.attach(image)
    worker = daemon.device("web").worker_pid
    (tmp_path / "there").touch()
    before = sorted(os.listdir(tmp_path))
    for target, reason in TARGETS.items():
        refused = daemon.ctl("backup", "web", tmp_path / target, check=False)
        assert refused.returncode == 1
        assert reason in refused.stderr
    refused = daemon.ctl("snapshot", "web", tmp_path / "new.fvd.backup-base", check=False)
    assert "a name that backups give to images" in refused.stderr
    # And what somebody else calls so is not taken for what a backup left.
    (tmp_path / "web.fvd.backup-base").touch()
    refused = daemon.ctl("backup", "web", tmp_path / "copy.raw", check=False)
    assert "is not what a backup of" in refused.stderr
    (tmp_path / "web.fvd.backup-base").unlink()
    assert sorted(os.listdir(tmp_path)) == before
    assert daemon.device("web").worker_pid == worker
    assert disk.deaths == 0


def test_image_with_too_long_a_name_is_told_what_to_do(daemon, clone, tmp_path):
    image, _ = clone("w" * 240)
    daemon.attach(image, "--name", "web")
    worker = daemon.device("web").worker_pid
    refused = daemon.ctl("backup", "web", tmp_path / "copy.raw", check=False)
    assert "make it shorter by 5 bytes" in refused.stderr
    assert daemon.device("web").worker_pid == worker
    assert not (tmp_path / "copy.raw").exists()


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


@pytest.mark.parametrize("op", [in_proof("hand_over"), in_proof("copy_out"), "fold"])
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
    done = daemon.ctl("backup", "web", tmp_path / "copy.raw", check=False)
    assert done.returncode == 1
    told = {
        "hand_over": f"copy.raw was not made: the worker died; web goes on as before, with {image}",
        "copy_out": f"copy.raw was not made: the worker died; web goes on as before, with {image}",
        "fold": "copy.raw is complete, but the end of the backup failed: the worker died",
    }
    assert told[op] in done.stderr
    assert ("until the next backup" if op == "fold" else "try again") in done.stderr
    assert (tmp_path / "copy.raw").exists() == (op == "fold")
    assert leftovers(tmp_path) == ([f"web.fvd{backup.SUFFIX}"] if op == "fold" else [])
    write(disk, model, 70_000, b"more")
    assert model.difference(disk.read(0, model.size)) is None
    monkeypatch.undo()
    daemon.ctl("backup", "web", tmp_path / "again.raw")
    assert model.difference((tmp_path / "again.raw").read_bytes()) is None
    assert model.difference(disk.read(0, model.size)) is None
    daemon.ctl("detach", "web")
    assert model.difference(content(image, model.size)) is None
    assert not (tmp_path / f"web.fvd{backup.SUFFIX}").exists()


def test_what_a_backup_left_below_an_image_is_not_attached_for_writing(daemon, clone):
    image, model = clone()
    base = f"{image}{backup.SUFFIX}"
    overlay.put_over(str(image), base, CreateOptions())
    refused = daemon.ctl("attach", base, check=False)
    assert refused.returncode != 0
    assert f"{base} is the base of {image}: a backup" in refused.stderr
    assert f"Attach {image} instead" in refused.stderr
    daemon.ctl("detach", daemon.ctl("attach", "--read-only", base).stdout.strip())
    disk = daemon.attach(image)
    assert model.difference(disk.read(0, model.size)) is None


@pytest.mark.parametrize("op", [in_proof("copy_out"), "fold"])
def test_copier_that_hangs_is_ended_and_costs_the_backup_alone(
    daemon, tmp_path, clone, monkeypatch, op
):
    image, model = clone()
    exchange, watched = WorkerProcess.exchange, backup._watched
    stopped = []

    async def hanging(self, said, fds=(), **arguments):
        if said == op:
            stopped.append(self.pid)
            os.kill(self.pid, signal.SIGSTOP)
        return await exchange(self, said, fds, **arguments)

    def impatient(worker, limit, said, *rest):
        return watched(worker, HANG_SECONDS if said == op else limit, said, *rest)

    disk = daemon.attach(image)
    write(disk, model, 0, b"acknowledged")
    monkeypatch.setattr(WorkerProcess, "exchange", hanging)
    monkeypatch.setattr(backup, "_watched", impatient)
    refused = daemon.ctl("backup", "web", tmp_path / "copy.raw", check=False)
    monkeypatch.undo()
    assert refused.returncode != 0
    assert "the worker died" in refused.stderr
    (copier,) = stopped
    wait_until(lambda: not os.path.exists(f"/proc/{copier}/exe"), "the end of the copier")
    assert (tmp_path / "copy.raw").exists() == (op == "fold")
    write(disk, model, 70_000, b"more")
    assert model.difference(disk.read(0, model.size)) is None


class _Copier:
    """A process that copies until told otherwise, and answers pings so often."""

    pid = 1

    def __init__(self, answers):
        self.answers = answers
        self.pings = 0
        self.is_killed = False
        self.done = asyncio.Event()

    async def request(self, op, fds=(), *, timeout=None, **arguments):
        if op != "ping":
            await self.done.wait()
            return {"written": 7}
        self.pings += 1
        if self.pings > self.answers:
            raise TimeoutError
        if self.pings == self.answers and self.answers == ENOUGH:
            self.done.set()
        return {}

    def kill(self):
        self.is_killed = True


@pytest.mark.parametrize("answers", [0, 2, ENOUGH])
def test_copier_may_take_as_long_as_it_answers(answers):
    async def main():
        copier = _Copier(answers)
        if answers == ENOUGH:
            assert await backup._watched(copier, 0.001, "copy_out", 0, {}) == {"written": 7}
        else:
            with pytest.raises(WorkerLost, match="hung and was killed"):
                await backup._watched(copier, 0.001, "copy_out", 0, {})
        assert copier.is_killed == (answers != ENOUGH)
        assert copier.pings == (answers if answers == ENOUGH else answers + 1)
        assert len(asyncio.all_tasks()) == 1  # nobody waits for the work any more

    asyncio.run(main())


@pytest.mark.parametrize(
    "words",
    [
        ("snapshot", "web", "new.fvd"), in_proof(("set-read-only", "web", "on")),
        in_proof(("update", "web", "copy_on_read=0")), in_proof(("prefetch", "web", "start")),
        in_proof(("prefetch", "web", "policy", "eager")),
    ],
    ids=lambda words: words[0] + words[2],
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


def test_terms_given_to_recover_outlive_the_backup_that_was_broken_off(
    tmp_path, clone, base, monkeypatch
):
    """What the device was told before the backup holds again behind it, and so does what
    `recover` was told in between."""

    class Stopped(BaseException):
        """fvdd dies here."""

    async def dies(*arguments, **options):
        raise Stopped

    image, model = clone()
    daemon = Daemon(tmp_path, restarts=1).start()
    disk = daemon.attach(image)
    write(disk, model, 0, b"acknowledged")
    second = None
    try:
        monkeypatch.setattr(backup, "_in_a_worker", dies)
        daemon.ctl("backup", "web", tmp_path / "copy.raw", check=False)
        monkeypatch.undo()
        daemon.stop()
        second = Daemon(tmp_path, after=daemon, restarts=1).start()
        wait_until(second.settled, "the adoption to end")
        os.utime(base, (1, 1))
        os.kill(second.device("web").worker_pid, signal.SIGKILL)
        wait_until(lambda: second.device("web").state == "failed", "it to fail")
        second.ctl("recover", "web", "--accept-changed-base")
        second.ctl("backup", "web", tmp_path / "again.raw")
        assert second.device("web").state == "attached"
        assert model.difference(disk.read(0, model.size)) is None
        second.detach_all()
    finally:
        if second is not None:
            second.stop()
        daemon.kill_workers()


@pytest.mark.parametrize(
    "step", [in_proof("copy"), in_proof("set aside"), "put together"]
)
def test_daemon_that_dies_in_a_backup_is_succeeded(tmp_path, clone, monkeypatch, step):
    class Stopped(BaseException):
        """fvdd dies here."""

    async def dies(*arguments):
        if step == "set aside":  # the image has its second name, and nothing over it yet
            os.link(image, f"{image}{backup.SUFFIX}")
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


@pytest.mark.parametrize("op", [in_proof("copy_out"), "fold"])
def test_stop_of_fvdd_does_not_wait_for_a_backup(tmp_path, clone, monkeypatch, op):
    monkeypatch.setattr(backup, "FOLD_GRACE_SECONDS", 0.2)
    image, model = clone()
    daemon = Daemon(tmp_path).start()
    disk = daemon.attach(image)
    write(disk, model, 0, b"acknowledged")
    exchange = WorkerProcess.exchange
    copiers = []

    async def stopped(self, said, fds=(), **arguments):
        if said == op:
            os.kill(self.pid, signal.SIGSTOP)
            copiers.append(self.pid)
        return await exchange(self, said, fds, **arguments)

    monkeypatch.setattr(WorkerProcess, "exchange", stopped)
    second = None
    try:
        result = in_background(daemon, "backup", "web", tmp_path / "copy.raw")
        wait_until(lambda: copiers, "the copier")
        daemon.stop()
        done = result()
        assert done.returncode == 7
        assert "fvdd is about to stop" in done.stderr
        assert "the next backup puts both together" in done.stderr
        made = "is complete" if op == "fold" else "was not made"
        assert f"copy.raw {made}" in done.stderr
        assert (tmp_path / "copy.raw").exists() == (op == "fold")
        assert not os.path.exists(f"/proc/{copiers[0]}/exe")
        write(disk, model, 5000, b"more")
        monkeypatch.setattr(WorkerProcess, "exchange", exchange)
        second = Daemon(tmp_path, after=daemon).start()
        wait_until(second.settled, "the adoption to end")
        assert model.difference(disk.read(0, model.size)) is None
        assert disk.deaths == 0
        second.detach_all()
    finally:
        if second is not None:
            second.stop()
        daemon.kill_workers()


@pytest.mark.parametrize("op", [in_proof("copy_out"), "fold"])
def test_full_storage_is_named_and_what_is_there_is_told(
    daemon, clone, tmp_path, monkeypatch, op
):
    image, model = clone()
    disk = daemon.attach(image)
    exchange = WorkerProcess.exchange

    async def full(self, said, fds=(), **arguments):
        if said == op:
            name = arguments["name"]
            raise WorkerError("no_space", f"no space left for {name}", "Free some space.", {})
        return await exchange(self, said, fds, **arguments)

    monkeypatch.setattr(WorkerProcess, "exchange", full)
    refused = daemon.ctl("backup", "web", tmp_path / "copy.raw", check=False)
    assert refused.returncode == 1
    if op == "fold":
        again = daemon.ctl("backup", "web", tmp_path / "again.raw", check=False)
        assert f"{tmp_path / 'again.raw'} was not made: no space left for {image}" in again.stderr
        assert "until the next backup puts both together" in again.stderr
    monkeypatch.undo()
    if op == "copy_out":
        assert f"no space left for {tmp_path / 'copy.raw'}" in refused.stderr
        assert leftovers(tmp_path) == []
    else:
        assert f"{tmp_path / 'copy.raw'} is complete, but" in refused.stderr
        assert f"no space left for {image}" in refused.stderr
        assert "until the next backup puts both together" in refused.stderr
        assert model.difference((tmp_path / "copy.raw").read_bytes()) is None
    assert model.difference(disk.read(0, model.size)) is None


def test_file_that_has_a_name_meanwhile_is_noted_for_as_long_as_that(
    daemon, clone, tmp_path, monkeypatch
):
    image, _ = clone()
    daemon.attach(image)
    real = os.open

    def opened(path, flags, *rest, **others):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real(path, flags, *rest, **others)

    monkeypatch.setattr(os, "open", opened)
    held = Held(monkeypatch)
    result = in_background(daemon, "backup", "web", tmp_path / "copy.raw")
    with held:
        assert json.loads(record_of(daemon).read_text())["part"] == f"{tmp_path}/copy.raw.fvd.part"
    assert result().returncode == 0
    assert json.loads(record_of(daemon).read_text())["part"] is None
