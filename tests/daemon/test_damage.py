# SPDX-License-Identifier: Apache-2.0
"""fvdd is started where something is wrong: each device's state tells the truth about it alone."""

import errno
import json
import os
import shutil
import signal

import pytest

from fvdd.devices import session
from fvdd.devices.adoption import worker_pids
from fvdd.worker.client import WorkerProcess
from fvdengine.errors import from_os_error
from fvdtest.daemon import change_record, fvdctl, record_of, wait_until


@pytest.fixture
def no_opening(monkeypatch):
    """As if the file system with the images had become read-only, until it is undone."""

    def refuse(path, wait_seconds=0):
        raise from_os_error(OSError(errno.EROFS, os.strerror(errno.EROFS)), path)

    def begin():
        monkeypatch.setattr(session, "lock_owner", refuse)
        return monkeypatch.undo

    return begin


# The image cannot be opened


def test_worker_that_serves_is_adopted_although_the_image_cannot_be_opened(
    relay, clone, no_opening, caplog
):
    image, model = clone()
    disk = relay.running.attach(image)
    worker = relay.running.device("web").worker_pid
    relay.stop()
    undo = no_opening()
    daemon = relay.next()
    status = daemon.device("web")
    assert (status.state, status.worker_pid, status.reason) == ("attached", worker, None)
    assert "read-only file system" in caplog.text
    disk.write(0, b"goes on")
    model.write(0, b"goes on")
    # The worker dies, and now the truth is another one.
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: daemon.device("web").state == "failed", "it to fail")
    assert "read-only file system" in (daemon.device("web").reason or "")
    undo()
    daemon.ctl("recover", "web")
    assert model.difference(disk.read(0, model.size)) is None
    refused = daemon.ctl("attach", image, "--name", "other", check=False)
    assert "attached already as web" in refused.stderr


def test_detach_says_why_where_neither_fvdd_nor_a_successor_can_open_the_image(
    relay, clone, no_opening, monkeypatch
):
    image, model = clone()
    disk = relay.running.attach(image)
    disk.write(0, b"x")
    model.write(0, b"x")
    relay.stop()
    undo = no_opening()
    daemon = relay.next()
    exchange = WorkerProcess.exchange

    async def deadly(self, op, fds=(), **arguments):
        if op == "stop":
            os.kill(self.pid, signal.SIGKILL)
        return await exchange(self, op, fds, **arguments)

    monkeypatch.setattr(WorkerProcess, "exchange", deadly)
    refused = daemon.ctl("detach", "web", check=False)
    assert refused.returncode == 1
    assert "read-only file system" in refused.stderr
    assert daemon.device("web").state == "failed"
    undo()
    daemon.ctl("detach", "web")
    assert model.difference(daemon.attach(image).read(0, model.size)) is None


def test_close_that_failed_is_made_up_for_by_recover_as_by_detach(relay, clone, no_opening):
    image, model = clone()
    disk = relay.running.attach(image)
    disk.write(0, b"x")
    model.write(0, b"x")
    relay.stop()
    relay.running.kill_workers()
    disk.disconnect()
    relay.running.transport.disks.clear()
    change_record(relay.running, wanted="detached")
    undo = no_opening()
    daemon = relay.next()
    assert daemon.device("web").state == "failed"
    undo()
    assert "its image was closed clean" in daemon.ctl("recover", "web").stderr
    assert model.difference(daemon.attach(image).read(0, model.size)) is None


def test_image_that_can_be_opened_again_is_held_as_ever(relay, clone, no_opening):
    image, model = clone()
    disk = relay.running.attach(image)
    relay.stop()
    undo = no_opening()
    daemon = relay.next()
    undo()
    os.kill(daemon.device("web").worker_pid, signal.SIGKILL)
    assert model.difference(disk.read(0, model.size)) is None
    wait_until(lambda: daemon.device("web").state == "attached", "the successor")
    assert daemon._app.registry.devices[0]._session.owner_fd >= 0


def test_worker_that_dies_while_it_is_adopted_is_succeeded(relay, clone, monkeypatch):
    image, model = clone()
    disk = relay.running.attach(image)
    worker = relay.running.device("web").worker_pid
    relay.stop()
    follow = session.Session.follow_image

    def die(self, pids=()):
        if worker in pids:
            os.kill(worker, signal.SIGKILL)
        return follow(self, pids)

    monkeypatch.setattr(session.Session, "follow_image", die)
    daemon = relay.next()
    status = daemon.device("web")
    assert status.state == "attached"
    assert status.worker_pid != worker
    assert model.difference(disk.read(0, model.size)) is None


def test_worker_is_kept_where_no_successor_could_open_the_base(daemon, clone, base):
    image, model = clone()
    disk = daemon.attach(image)
    worker = daemon.device("web").worker_pid
    aside = base.rename(f"{base}.aside")
    new = f"{image}.new"
    for words in (("upgrade", "web"), ("snapshot", "web", new), ("backup", "web", new)):
        refused = daemon.ctl(*words, check=False)
        assert refused.returncode == 1
        assert f"the base {base} of {image} does not exist" in refused.stderr
        assert not os.path.exists(new)
        status = daemon.device("web")
        assert (status.state, status.worker_pid) == ("attached", worker)
    assert model.difference(disk.read(0, model.size)) is None
    aside.rename(base)
    daemon.ctl("upgrade", "web")
    assert model.difference(disk.read(0, model.size)) is None


@pytest.mark.parametrize("verb", ["snapshot", "backup"])
def test_image_that_is_elsewhere_is_followed_and_what_has_its_name_is_left_alone(
    daemon, clone, tmp_path, verb
):
    image, model = clone()
    disk = daemon.attach(image)
    disk.write(0, b"mine")
    model.write(0, b"mine")
    image.rename(tmp_path / "elsewhere.fvd")
    other = clone()[0].read_bytes()
    target = tmp_path / "new"
    daemon.ctl(verb, "web", target)
    assert image.read_bytes() == other
    assert model.difference(disk.read(0, model.size)) is None
    if verb == "backup":
        assert model.difference(target.read_bytes()) is None
    # It is deleted: what has it open is all there is of it.
    os.unlink(daemon.device("web").image)
    done = daemon.ctl(verb, "web", tmp_path / "last", check=False)
    assert ("has no name any more" in done.stderr) == (verb == "snapshot")
    assert model.difference(disk.read(0, model.size)) is None
    if verb == "backup":
        assert model.difference((tmp_path / "last").read_bytes()) is None


# Files of the registry


def overwrite(path, content):
    path.unlink()
    path.write_bytes(content)


def changed(path, **fields):
    return json.dumps({**json.loads(path.read_text()), **fields}).encode()


# What happens to the record of a device whose worker is dead, and what is said then; more of them
# are in tests/unit/fvdd/test_record.py.
RECORDS = {
    "cut": (lambda path: path.read_bytes()[:100], "is damaged"),
    "moved": (lambda path: changed(path, name="elsewhere"), "holds the record of 'elsewhere'"),
}


@pytest.mark.proof
def test_devices_with_damaged_records_are_named_and_come_back_and_others_are_served(
    relay, clone
):
    disks = {name: relay.running.attach(clone(name)[0]) for name in ("well", *RECORDS)}
    model = clone("none")[1]
    for disk in disks.values():
        disk.write(5000, b"acknowledged")
    model.write(5000, b"acknowledged")
    relay.stop()
    for name, (damage, _) in RECORDS.items():
        for pid in worker_pids(relay.running.state / "devices" / name):
            os.kill(pid, signal.SIGKILL)
        path = record_of(relay.running, name)
        overwrite(path, damage(path))
    daemon = relay.next()
    assert daemon.device("well").state == "attached"
    found = json.loads(daemon.ctl("doctor", "--json", check=False).stdout)["findings"]
    told = {one["topic"]: one for one in found if one["topic"].startswith("device ")}
    assert set(told) == {f"device {name}" for name in RECORDS}  # and none is called leaked
    for name, (_, reason) in RECORDS.items():
        status = daemon.device(name)
        assert status.state == "orphaned"
        assert reason in (status.reason or "")
        assert reason in told[f"device {name}"]["message"]
        refused = daemon.ctl("detach", name, check=False)
        assert refused.returncode == 1
        assert f"fvdctl recover {name}" in refused.stderr
    # The kernel kept them all, and what was acknowledged is there.
    for name, disk in disks.items():
        if name != "well":
            daemon.ctl("recover", name)
        assert daemon.device(name).state == "attached"
        assert model.difference(disk.read(0, model.size)) is None
    for name in disks:
        daemon.ctl("detach", name)
        assert fvdctl("check", daemon.state.parent / f"{name}.fvd").returncode == 0


def test_damaged_record_of_a_living_worker_is_made_anew(relay, clone):
    image, model = clone()
    disk = relay.running.attach(image, "--connections", "2")
    worker = relay.running.device("web").worker_pid
    relay.stop()
    overwrite(record_of(relay.running), b"{")
    daemon = relay.next()
    daemon.ctl("recover", "web")
    status = daemon.device("web")
    assert (status.state, status.worker_pid, status.device) == ("attached", worker, "/dev/nbd0")
    # On them depends how long the kernel waits before it cuts one off.
    assert (status.connections, status.connections_alive) == (2, 2)
    assert status.timeouts.resend_timeout > status.timeouts.base_timeout
    assert model.difference(disk.read(0, model.size)) is None
    daemon.ctl("detach", "web")
    assert fvdctl("check", image).returncode == 0


def test_what_an_attach_was_told_is_told_again_where_its_record_is_lost(relay, base, tmp_path):
    golden, image = tmp_path / "golden/base.raw", tmp_path / "images/web.fvd"
    golden.parent.mkdir()
    image.parent.mkdir()
    base.rename(golden)
    allowed = ("--allow-dir", golden.parent)
    fvdctl("create", image, "--base", golden, "--base-format", "raw", *allowed)
    os.utime(golden, (1, 1))
    told = (*allowed, "--accept-changed-base", "--connections", "2")
    disk = relay.running.attach(image, *told)
    disk.write(5000, b"acknowledged")
    relay.stop()
    relay.running.kill_workers()
    overwrite(record_of(relay.running), b"{")
    daemon = relay.next()
    for options, reason in ((), "outside the allowed"), (allowed, "has changed"):
        refused = daemon.ctl("recover", "web", *options, check=False)
        assert refused.returncode == 1
        assert reason in refused.stderr
        assert "hint: its record was lost" in refused.stderr
        assert "fvdctl recover web: --allow-dir, --allow-uri, --accept" in refused.stderr
    daemon.ctl("recover", "web", *told)
    status = daemon.device("web")
    assert (status.state, status.connections, status.connections_alive) == ("attached", 2, 2)
    assert status.timeouts.resend_timeout > status.timeouts.base_timeout
    assert disk.read(5000, 12) == b"acknowledged"
    # And successors are told it, too.
    os.kill(status.worker_pid, signal.SIGKILL)
    assert disk.read(5000, 12) == b"acknowledged"
    wait_until(lambda: daemon.device("web").state == "attached", "the successor")


def test_damaged_record_of_a_device_that_the_kernel_has_not_is_closed_clean(relay, clone):
    image, model = clone()
    disk = relay.running.attach(image)
    disk.write(0, b"x")
    model.write(0, b"x")
    relay.stop()
    relay.running.kill_workers()
    overwrite(record_of(relay.running), b"{")
    disk.disconnect()
    relay.running.transport.disks.clear()
    daemon = relay.next()
    done = daemon.ctl("recover", "web")
    assert "closed clean" in done.stderr
    assert model.difference(daemon.attach(image).read(0, model.size)) is None


def pipe(path):
    path.unlink()
    os.mkfifo(path)


# What happens to the live state besides the record; more of it in tests/unit/fvdengine.
STATES = {
    "pipe": pipe,
    "zeros": lambda path: overwrite(path, bytes(4096)),
}


def test_damaged_live_state_is_told_and_given_up_only_by_hand(relay, clone):
    disks = {name: relay.running.attach(clone(name)[0]) for name in ("well", *STATES)}
    model = clone("none")[1]
    for disk in disks.values():
        disk.write(5000, b"flushed")
        disk.flush()
    model.write(5000, b"flushed")
    relay.stop()
    for name, damage in STATES.items():
        place = relay.running.state / "devices" / name
        for pid in worker_pids(place):
            os.kill(pid, signal.SIGKILL)
        damage(place / "live")
    overwrite(record_of(relay.running, "zeros"), b"{")  # and nothing is left to go by
    daemon = relay.next()
    assert daemon.device("well").state == "attached"
    assert daemon.device("pipe").state == "failed"
    for verb in ("detach", "recover"):
        refused = daemon.ctl(verb, "pipe", check=False)
        assert refused.returncode == 1
        assert "fvdctl recover pipe --discard-unflushed" in refused.stderr
    daemon.ctl("recover", "pipe", "--discard-unflushed")
    assert model.difference(disks["pipe"].read(0, model.size)) is None
    refused = daemon.ctl("recover", "zeros", check=False)
    assert "neither its record nor its live state can be read" in refused.stderr
    place = daemon.state / "devices/zeros"
    assert f"remove {place}, give the kernel's device back" in refused.stderr
    assert not disks["zeros"].is_gone
    shutil.rmtree(place)
    assert f"({disks['zeros'].spec.backend}) is leaked" in daemon.ctl("doctor", check=False).stdout
    daemon.ctl("doctor", "--reclaim", check=False)
    assert disks["zeros"].is_gone


def test_lost_record_gives_up_no_state_that_is_aside(relay, clone):
    image, model = clone()
    disk = relay.running.attach(image)
    disk.write(5000, b"acknowledged")
    model.write(5000, b"acknowledged")
    relay.stop()
    relay.running.kill_workers()
    record = record_of(relay.running)
    overwrite(record, b"{")
    live, aside = record.parent / "live", record.parent / "live.of-1-2"
    live.rename(aside)  # as a recovery on a moved image does until it has succeeded
    daemon = relay.next()
    for _ in range(2):  # the second time with a state of the file that was tried, too
        refused = daemon.ctl("recover", "web", check=False)
        assert refused.returncode == 1
        assert "which live state counts" in refused.stderr
        assert f"mv {aside} {live}; " in refused.stderr
        live.touch()
    aside.rename(live)
    daemon.ctl("recover", "web")
    assert model.difference(disk.read(0, model.size)) is None


# What was left over


def test_leftovers_are_named_with_their_remedy_and_removed_on_demand(relay, clone, tmp_path):
    image, model = clone()
    daemon = relay.running
    disk = daemon.attach(image)
    place = daemon.state / "devices/web"
    (place / "device.json.new").write_text("{")
    os.utime(place / "device.json.new", (1, 1))
    os.link(image, f"{image}.backup-base")
    (tmp_path / "web.fvd.backup-base.new").touch()
    ours = {
        str(place / "device.json.new"), f"{image}.backup-base", f"{image}.backup-base.new"
    }  # fmt: skip
    found = json.loads(daemon.ctl("doctor", "--json", check=False).stdout)["findings"]
    told = [one for one in found if one["topic"] == "device web"]
    assert {path for path in ours for one in told if one["message"].startswith(f"{path} ")} == ours
    assert all("fvdctl doctor --reclaim" in one["remedy"] for one in told)
    done = daemon.ctl("doctor", "--reclaim", check=False)
    assert {line.partition("removed ")[2] for line in done.stderr.splitlines()} == ours
    assert not any(os.path.lexists(path) for path in ours)
    assert "device web" not in done.stdout
    assert model.difference(disk.read(0, model.size)) is None
