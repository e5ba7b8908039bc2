# SPDX-License-Identifier: Apache-2.0
"""fvdd comes and goes: what it left is found again, mended where it is broken, and nothing is lost.

The kernel is a stand-in that outlives each fvdd; workers and live state are real.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading

import pytest

from fvdd.devices import session
from fvdd.devices.adoption import worker_pids
from fvdd.log import fields_of
from fvdtest.daemon import IMPATIENT, Daemon, change_record, fvdctl, record_of, wait_until
from fvdtest.marks import in_proof


def test_next_daemon_adopts_worker_and_device(relay, clone):
    image, model = clone()
    disk = relay.running.attach(image)
    worker = relay.running.device("web").worker_pid
    relay.stop()
    # Nobody is there, and the device works.
    disk.write(4096, b"without a daemon")
    model.write(4096, b"without a daemon")
    assert not relay.running.socket.exists()

    daemon = relay.next()
    status = daemon.device("web")
    assert (status.state, status.worker_pid, status.restarts) == ("attached", worker, 0)
    assert (status.connections_alive, status.device) == (1, "/dev/nbd0")
    assert status.size_bytes == model.size
    assert daemon.metrics()[("fvd_device_up", (("device", "nbd0"),))] == 1
    # It is watched like any other, and detached like any other.
    os.kill(worker, signal.SIGKILL)
    assert model.difference(disk.read(0, model.size)) is None
    wait_until(lambda: daemon.device("web").restarts == 1, "the successor")
    daemon.ctl("detach", "web")
    assert fvdctl("check", image).returncode == 0
    assert list((daemon.state / "devices").iterdir()) == []


def test_image_stays_taken_while_nobody_is_there(relay, clone):
    image, _ = clone()
    relay.running.attach(image)
    relay.stop()
    refused = fvdctl("serve", image, "--tcp", "127.0.0.1:0", check=False)
    assert "in use" in refused.stderr
    daemon = relay.next()
    refused = daemon.ctl("attach", image, check=False)
    assert "attached already as web" in refused.stderr


def test_worker_that_died_meanwhile_is_succeeded(relay, clone):
    image, model = clone()
    disk = relay.running.attach(image, "--connections", "2")
    for number in range(50):
        disk.write(number * 99_991, b"%d" % number)
        model.write(number * 99_991, b"%d" % number)
    worker = relay.running.device("web").worker_pid
    relay.stop()
    os.kill(worker, signal.SIGKILL)
    waiting = threading.Thread(target=disk.write, args=(0, b"waited"))
    waiting.start()
    model.write(0, b"waited")
    daemon = relay.next()
    waiting.join(30)
    assert not waiting.is_alive()
    assert daemon.device("web").state == "attached"
    assert model.difference(disk.read(0, model.size)) is None


def test_connection_that_died_meanwhile_is_replaced(relay, clone):
    image, model = clone()
    disk = relay.running.attach(image, "--connections", "2")
    worker = relay.running.device("web").worker_pid
    relay.stop()
    disk.cut(1)
    daemon = relay.next()
    status = daemon.device("web")
    assert (status.worker_pid, status.connections_alive) == (worker, 2)
    assert status.reconnects == 1
    assert model.difference(disk.read(0, model.size)) is None


@pytest.mark.proof
def test_many_devices_are_adopted_side_by_side(relay, clone):
    disks = {name: relay.running.attach(clone(name)[0]) for name in ("a", "b", "c", "d")}
    relay.stop()
    for pid in relay.running.workers[:2]:
        os.kill(pid, signal.SIGKILL)
    daemon = relay.next()
    assert {name: daemon.device(name).state.value for name in disks} == dict.fromkeys(
        disks, "attached"
    )
    for disk in disks.values():
        disk.write(0, b"x")


def test_stopped_worker_is_killed_before_its_successor_starts(relay, clone):
    image, model = clone()
    disk = relay.running.attach(image)
    disk.write(0, b"before")
    model.write(0, b"before")
    hung = relay.running.device("web").worker_pid
    relay.stop()
    os.kill(hung, signal.SIGSTOP)
    daemon = relay.next()
    status = daemon.device("web")
    assert status.state == "attached"
    assert status.worker_pid != hung
    assert worker_pids(daemon.state / "devices/web") == [status.worker_pid]
    assert model.difference(disk.read(0, model.size)) is None


def test_worker_that_hangs_is_replaced(relay, clone, caplog):
    image, model = clone()
    daemon = relay.running
    disk = daemon.attach(image)
    hung = daemon.device("web").worker_pid
    os.kill(hung, signal.SIGSTOP)
    disk.write(0, b"through a successor")
    model.write(0, b"through a successor")
    wait_until(lambda: daemon.device("web").state == "attached", "the successor")
    assert daemon.device("web").worker_pid != hung
    reasons = [fields_of(one).get("reason") for one in caplog.records]
    assert f"the worker process {hung} hung and was killed" in reasons
    assert model.difference(disk.read(0, model.size)) is None


def test_device_that_the_kernel_lost_meanwhile_has_failed_and_is_closed_by_detach(relay, clone):
    image, model = clone()
    disk = relay.running.attach(image)
    disk.write(0, b"acknowledged")
    model.write(0, b"acknowledged")
    relay.stop()
    disk.disconnect()
    del relay.running.transport.disks[0]
    daemon = relay.next()
    status = daemon.device("web")
    assert status.state == "failed"
    assert "/dev/nbd0 was disconnected by somebody else" in (status.reason or "")
    daemon.ctl("detach", "web")
    disk = daemon.attach(image)
    assert model.difference(disk.read(0, model.size)) is None


def test_device_of_an_earlier_boot_says_so(relay, clone, monkeypatch):
    image, _ = clone()
    disk = relay.running.attach(image)
    relay.stop()
    relay.running.kill_workers()
    disk.disconnect()
    del relay.running.transport.disks[0]
    monkeypatch.setattr("fvdd.devices.adoption.boot_id", lambda: b"another".ljust(16))
    status = relay.next().device("web")
    assert status.state == "failed"
    assert "the host was started anew" in (status.reason or "")
    assert "somebody else" not in (status.reason or "")
    relay.running.ctl("detach", "web")


def test_process_that_only_names_a_worker_is_left_alone(relay, clone):
    relay.running.attach(clone()[0])
    place = relay.running.state / "devices/web"
    worker = relay.running.device("web").worker_pid
    relay.stop()
    words = [
        ["fvdd.worker", place], ["-m", "fvdd.worker", place], ["--dir", place, "-m", "fvdd.worker"],
    ]  # fmt: skip
    script = "import sys; print(flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with contextlib.ExitStack() as stack:
        others = [
            stack.enter_context(subprocess.Popen([sys.executable, "-Sc", script, *more], **pipes))
            for more in words
        ]
        assert [other.stdout.readline() for other in others] == [b"\n"] * len(words)
        relay.next()
        assert worker_pids(place) == [worker]
        assert [other.poll() for other in others] == [None] * len(words)


@pytest.mark.parametrize("worker_dies", [False, in_proof(True)])
def test_detach_that_was_broken_off_is_finished(relay, clone, worker_dies):
    image, _ = clone()
    disk = relay.running.attach(image)
    disk.write(0, b"x")
    worker = relay.running.device("web").worker_pid
    relay.stop()
    disk.disconnect()
    del relay.running.transport.disks[0]
    change_record(relay.running, wanted="detached")
    if worker_dies:
        os.kill(worker, signal.SIGKILL)
    daemon = relay.next()
    wait_until(lambda: not (daemon.state / "devices/web").exists(), "the directory to go")
    assert daemon.ctl("list", "--json").stdout.strip() == '{\n  "devices": []\n}'
    assert "state         clean" in fvdctl("info", image).stdout
    daemon.attach(image)


def test_detach_that_did_not_reach_the_kernel_leaves_a_device(relay, clone):
    image, _ = clone()
    disk = relay.running.attach(image)
    relay.stop()
    change_record(relay.running, wanted="detached")
    daemon = relay.next()
    disk.write(0, b"x")
    assert daemon.device("web").state == "attached"
    assert json.loads(record_of(daemon).read_text())["wanted"] == "attached"


def test_attach_that_did_not_reach_the_kernel_is_undone(relay, clone):
    image, _ = clone()
    disk = relay.running.attach(image)
    relay.stop()
    disk.disconnect()
    del relay.running.transport.disks[0]
    change_record(relay.running, index=None, device=None)
    daemon = relay.next()
    wait_until(lambda: not (daemon.state / "devices/web").exists(), "the directory to go")
    assert "state         clean" in fvdctl("info", image).stdout


def test_kernel_device_is_found_although_its_number_was_not_noted(relay, clone):
    image, _ = clone()
    disk = relay.running.attach(image, "--device", "/dev/nbd5")
    relay.stop()
    change_record(relay.running, index=None, device=None)
    daemon = relay.next()
    assert daemon.device("web").device == "/dev/nbd5"
    disk.write(0, b"x")


# Images that move


def test_renamed_image_is_followed(relay, clone):
    image, model = clone()
    daemon = relay.running
    disk = daemon.attach(image)
    disk.write(0, b"x")
    model.write(0, b"x")
    moved = image.rename(image.parent / "moved.fvd")
    os.kill(daemon.device("web").worker_pid, signal.SIGKILL)
    assert model.difference(disk.read(0, model.size)) is None
    wait_until(lambda: daemon.device("web").image == str(moved), "the new name")
    # And across a restart, in a name's change that nobody saw.
    relay.stop()
    moved.rename(image.parent / "again.fvd")
    daemon = relay.next()
    assert daemon.device("web").image == str(image.parent / "again.fvd")
    daemon.ctl("detach", "web")


def test_file_that_took_the_images_name_is_not_touched(relay, clone):
    image, model = clone()
    other, _ = clone("other")
    daemon = relay.running
    disk = daemon.attach(image)
    disk.write(0, b"x")
    model.write(0, b"x")
    image.rename(image.parent / "moved.fvd")
    other.rename(image)
    before = image.read_bytes()
    os.kill(daemon.device("web").worker_pid, signal.SIGKILL)
    assert model.difference(disk.read(0, model.size)) is None
    assert image.read_bytes() == before


def test_deleted_image_is_served_to_the_end(relay, clone):
    image, model = clone()
    daemon = relay.running
    disk = daemon.attach(image)
    disk.write(0, b"x")
    model.write(0, b"x")
    image.unlink()
    os.kill(daemon.device("web").worker_pid, signal.SIGKILL)
    assert model.difference(disk.read(0, model.size)) is None


def test_recover_is_told_where_the_image_went(relay, clone):
    image, model = clone()
    disk = relay.running.attach(image)
    disk.write(0, b"x")
    model.write(0, b"x")
    worker = relay.running.device("web").worker_pid
    relay.stop()
    os.kill(worker, signal.SIGKILL)
    moved = image.rename(image.parent / "moved.fvd")
    daemon = relay.next()
    assert daemon.device("web").state == "failed"
    refused = daemon.ctl("recover", "web", check=False)
    assert refused.returncode == 1
    assert "hint: " in refused.stderr
    done = daemon.ctl("recover", "web", "--image", moved)
    assert done.stderr == "web: /dev/nbd0 is served again\n"
    assert model.difference(disk.read(0, model.size)) is None


def test_recover_of_a_device_that_works_is_refused(relay, clone):
    image, _ = clone()
    relay.running.attach(image)
    refused = relay.running.ctl("recover", "web", check=False)
    assert refused.returncode == 1
    assert "only a failed device" in refused.stderr
    assert relay.running.ctl("recover", "nobody", check=False).returncode == 4


# A full state directory


@pytest.fixture
def full_state(monkeypatch):
    """Call it with the number of records that still find room."""
    real = session.store_record

    def fill(left=0):
        room = [left]

        def store(directory, record):
            room[0] -= 1
            if room[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))
            real(directory, record)

        monkeypatch.setattr(session, "store_record", store)

    yield fill
    monkeypatch.undo()


def test_recovery_does_not_need_room_for_the_record(relay, clone, full_state):
    image, model = clone()
    daemon = relay.running
    disk = daemon.attach(image)
    full_state()
    os.kill(daemon.device("web").worker_pid, signal.SIGKILL)
    assert model.difference(disk.read(0, model.size)) is None
    status = daemon.device("web")
    assert (status.state, status.restarts) == ("attached", 1)


def test_adoption_does_not_need_room_and_finds_what_the_record_does_not_know(
    relay, clone, full_state
):
    image, model = clone()
    disk = relay.running.attach(image)
    full_state()
    os.kill(relay.running.device("web").worker_pid, signal.SIGKILL)
    assert model.difference(disk.read(0, model.size)) is None
    wait_until(lambda: relay.running.device("web").restarts == 1, "the successor")
    worker = relay.running.device("web").worker_pid
    relay.stop()
    assert json.loads(record_of(relay.running).read_text())["worker_pid"] != worker
    assert relay.next().device("web").worker_pid == worker


@pytest.mark.parametrize("left", [0, 1, 2])
def test_attach_without_room_leaves_nothing(relay, clone, full_state, left):
    image, _ = clone()
    full_state(left)
    refused = relay.running.ctl("attach", image, check=False)
    assert refused.returncode == 1
    directory = relay.running.state / "devices/web"
    assert f"no space left for {directory}\nhint: " in refused.stderr
    assert list((relay.running.state / "devices").iterdir()) == []
    assert relay.running.transport.disks == {}
    assert "state         clean" in fvdctl("info", image).stdout


# What is in the way


def test_damaged_record_is_told_with_the_remedy_and_nothing_is_touched(relay, clone):
    image, model = clone()
    disk = relay.running.attach(image)
    worker = relay.running.device("web").worker_pid
    relay.stop()
    good = record_of(relay.running).read_text()
    record_of(relay.running).write_text("{")
    daemon = relay.next()
    status = daemon.device("web")
    assert (status.state, status.worker_pid) == ("orphaned", worker)
    assert "damaged" in (status.reason or "")
    refused = daemon.ctl("detach", "web", check=False)
    assert f"process {worker} goes on serving" in refused.stderr
    assert "web" in daemon.ctl("doctor", check=False).stdout
    disk.write(0, b"it works")
    model.write(0, b"it works")
    # What is told is what is true now, not what was true at the start.
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: daemon.device("web").worker_pid is None, "the worker's death to show")
    assert "fvdctl recover web" in daemon.ctl("detach", "web", check=False).stderr
    daemon.stop()
    record_of(daemon).write_text(good)
    assert relay.next().device("web").state == "attached"
    assert model.difference(disk.read(0, model.size)) is None


def test_pipe_in_the_place_of_a_record_does_not_hold_the_start_up(relay):
    relay.stop()
    folder = relay.running.state / "devices/strange"
    folder.mkdir()
    os.mkfifo(folder / "device.json")
    daemon = relay.next()
    assert daemon.device("strange").state == "orphaned"
    assert f"remove {folder}" in daemon.ctl("detach", "strange", check=False).stderr
    (folder / "device.json").unlink()
    folder.rmdir()
    assert daemon.ctl("list", "--json").stdout.strip() == '{\n  "devices": []\n}'


def test_orphans_say_what_is_known_of_them_and_what_helps(relay, clone, tmp_path):
    image, _ = clone()
    relay.running.attach(image)
    relay.stop()
    folder = relay.running.state / "devices"
    good = record_of(relay.running).read_text()
    record_of(relay.running).write_text("{")
    (folder / "sub").mkdir()
    (folder / "sub/device.json").write_text(good)
    strange = folder / "x\ny'"
    strange.mkdir()
    (strange / "device.json").write_text("{")
    daemon = relay.next()
    with daemon.client() as client:
        listed = {one.name: one for one in client.devices()}
    assert (listed["web"].image, listed["sub"].image) == (str(image), "")
    rows = [line.split() for line in daemon.ctl("list").stdout.splitlines()]
    assert [row[-1] for row in rows if row[0] in ("web", "sub")] == ["-", str(image)]
    assert listed["sub"].reason == f"{folder / 'sub'} holds the record of 'web'"
    table = tmp_path / "fvdtab"
    table.write_text(f"web {image} -\n")
    booted = daemon.ctl("boot", "web", "--file", table, check=False)
    assert (booted.returncode, booted.stdout) == (1, "")
    assert "device web is attached, but is orphaned: " in booted.stderr
    assert "then: fvdctl recover web" in booted.stderr
    refused = daemon.ctl("detach", "sub", check=False).stderr
    assert f"remove {folder / 'sub'}" in refused
    assert "restart" not in refused
    # What the remedy names can be pasted.
    (word,) = re.findall(r"remove (.*)", daemon.ctl("detach", strange.name, check=False).stderr)
    named = subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, check=True)
    assert named.stdout == os.fsencode(strange)
    told = json.loads(daemon.ctl("doctor", "--json", check=False).stdout)["findings"]
    (remedy,) = (one["remedy"] for one in told if one["topic"] == f"device {strange.name}")
    assert remedy.endswith(f"remove {word}")
    record_of(daemon).write_text(good)
    refused = daemon.ctl("detach", "web", check=False).stderr
    assert "has become readable" in refused
    assert "restart fvdd" in refused
    for path in (folder / "sub", strange):
        (path / "device.json").unlink()
        path.rmdir()


def test_directory_of_an_attach_that_hardly_began_is_removed(relay):
    relay.stop()
    folder = relay.running.state / "devices/early"
    folder.mkdir()
    (folder / "device.json.new").touch()
    daemon = relay.next()
    assert not folder.exists()
    assert daemon.ctl("list", "--json").stdout.strip() == '{\n  "devices": []\n}'


def test_directory_of_a_detach_that_was_nearly_over_is_removed(relay):
    relay.stop()
    folder = relay.running.state / "devices/late"
    folder.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
        left.bind(str(folder / "control.sock"))
        left.listen()
        assert relay.next().device("late").state == "orphaned", "somebody answers there"
        relay.stop()
    daemon = relay.next()
    assert not folder.exists()
    assert daemon.ctl("list", "--json").stdout.strip() == '{\n  "devices": []\n}'


def test_state_directory_may_have_a_long_name(tmp_path, clone):
    image, model = clone()
    daemon = Daemon(tmp_path, state="s" * 120, limits=IMPATIENT)
    daemon.start()
    try:
        disk = daemon.attach(image)
        worker = daemon.device("web").worker_pid
        daemon.stop()
        second = Daemon(tmp_path, after=daemon, limits=IMPATIENT).start()
        wait_until(second.settled, "the adoption to end")
        assert second.device("web").worker_pid == worker
        assert model.difference(disk.read(0, model.size)) is None
        second.detach_all()
        second.stop()
    finally:
        daemon.kill_workers()


# Leaks


def test_leaked_device_is_reclaimed_at_the_start(relay, clone):
    image, _ = clone()
    disk = relay.running.attach(image)
    relay.stop()
    relay.running.kill_workers()
    shutil.rmtree(relay.running.state / "devices/web")
    daemon = relay.next()
    wait_until(lambda: disk.is_gone, "the device to be given back")
    assert daemon.transport.disks == {}


def test_leaked_device_that_is_held_is_named_and_reclaimed_on_demand(relay, clone):
    image, _ = clone()
    disk = relay.running.attach(image)
    other = relay.running.attach(clone("other")[0])
    disk.holders.append("/dev/nbd0 is mounted on /mnt")
    relay.stop()
    os.kill(relay.running.workers[0], signal.SIGKILL)
    shutil.rmtree(relay.running.state / "devices/web")
    daemon = relay.next()
    told = daemon.ctl("doctor", check=False).stdout
    assert "/dev/nbd0 (fvd:web:" in told
    assert "mounted on /mnt" in told
    assert "fvdctl doctor --reclaim" in told
    daemon.ctl("doctor", "--reclaim", check=False)
    assert not disk.is_gone
    disk.holders.clear()
    assert "reclaimed /dev/nbd0" in daemon.ctl("doctor", "--reclaim", check=False).stderr
    assert disk.is_gone
    other.write(0, b"x")


def test_fvdd_in_a_pid_namespace_reclaims_nothing_even_when_it_is_asked(relay, clone, caplog):
    image, _ = clone()
    disk = relay.running.attach(image)
    relay.stop()
    relay.running.kill_workers()
    shutil.rmtree(relay.running.state / "devices/web")
    relay.running.transport.is_in_a_namespace = True
    daemon = relay.next()
    wait_until(lambda: "leaked device" in caplog.messages, "the word of it")
    assert not disk.is_gone
    done = daemon.ctl("doctor", "--reclaim", check=False)
    assert "reclaimed" not in done.stderr
    assert not disk.is_gone
    assert "nobody whom fvdd sees from its PID" in done.stdout
    assert "it stays because fvdd runs in a PID namespace and cannot see" in done.stdout
    assert "one with the PIDs of the host): fvdctl doctor --reclaim" in done.stdout
    # By one that sees everybody it is given back.
    daemon.transport.is_in_a_namespace = False
    assert "reclaimed /dev/nbd0" in daemon.ctl("doctor", "--reclaim", check=False).stderr
    assert disk.is_gone
