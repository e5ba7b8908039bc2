# SPDX-License-Identifier: Apache-2.0
"""What a device leaves behind and takes over: nothing leaks, timers hold, names lead to it."""

import hashlib
import os
import time
from pathlib import Path

import pytest

from fvdtest.guest import run, wait_until
from fvdtest.writer import Writer

pytestmark = pytest.mark.kernel

PROOF = [pytest.mark.proof, pytest.mark.timeout(3600)]


def timer(device):
    return int(Path(f"/sys/block/{Path(device).name}/queue/io_timeout").read_text())


def held_by(pid):
    """What a process holds: descriptors and threads."""
    return len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))


def workers():
    return [pid for pid in os.listdir("/proc") if pid.isdigit() and is_worker(pid)]


def is_worker(pid):
    try:
        return b"fvdd.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def connected():
    return [path.parent.name for path in Path("/sys/block").glob("nbd*/pid")]


def many():
    """Cycles and devices of the campaign; another number of both by FVD_ATTACH, as in 100x32."""
    return [int(word) for word in os.environ.get("FVD_ATTACH", "20x8").split("x")]


@pytest.mark.parametrize(
    ("cycles", "devices"),
    [pytest.param(4, 2, id="few"), pytest.param(*many(), marks=PROOF, id="proof")],
)
def test_nothing_leaks_over_attach_and_detach(fvd, store, cycles, devices):
    images = [store / f"d{number}.fvd" for number in range(devices)]
    for image in images:
        fvd.ctl("create", image, "64M")
    fvd.attach(images[0])
    fvd.detach(images[0])
    before = held_by(fvd.process.pid)
    times = []
    for _ in range(cycles):
        begin = time.monotonic()
        fvd.attach(images[0])
        times.append(time.monotonic() - begin)
        fvd.detach(images[0])
    # All at once, and down again.
    for image in images:
        fvd.attach(image)
    assert len(connected()) == devices
    for image in images:
        fvd.detach(image)
    assert connected() == []
    assert os.listdir(fvd.folder / "state/devices") == []
    wait_until(lambda: workers() == [], 20, "the workers to end")
    wait_until(lambda: held_by(fvd.process.pid) <= before, 20, "descriptors and threads to go")
    half = len(times) // 2
    # Attaching does not become slower: generously, since the machine is shared, and an attach that
    # finds no warm worker pays for the start of one (of two times, the lower counts).
    assert sorted(times[half:])[(half - 1) // 2] < 3 * max(times[:half]) + 1, times


@pytest.mark.proof
def test_resend_timer_is_set_again_after_every_reconnect(fvd, store):
    image = store / "disk.fvd"
    fvd.ctl("create", image, "64M")
    device = fvd.attach(image, "--name", "disk")
    assert timer(device) == 2000
    old = fvd.status("disk")["worker_pid"]
    os.kill(old, 9)
    wait_until(lambda: fvd.status("disk")["restarts"] == 1, 60, "the successor")
    assert timer(device) == 2000
    # Other changes of the kernel's device leave it alone.
    fvd.ctl("resize", "disk", "96M")
    assert timer(device) == 2000
    assert fvd.status("disk")["timeouts"] == {
        "resend_timeout": 2.0, "base_timeout": 60.0, "kernel_timeout": 0.0, "dead_timeout": 43200.0
    }  # fmt: skip
    # And what a former user of the number had set does not come along.
    fvd.detach("disk")
    other = store / "other.fvd"
    fvd.ctl("create", other, "64M")
    assert fvd.attach(other, "--connections", "2") == device
    assert timer(device) == 90_000
    assert fvd.status("other")["timeouts"]["resend_timeout"] == 90.0
    assert fvd.status("other")["timeouts"]["kernel_timeout"] == 90.0
    fvd.detach(other)
    assert fvd.attach(image) == device
    assert timer(device) == 2000


def test_names_in_dev_lead_to_the_device_and_its_partitions(fvd, store):
    image = store / "disk.fvd"
    fvd.ctl("create", image, "64M")
    device = fvd.attach(image, "--name", "disk")
    assert os.path.realpath("/dev/fvd/disk") == device
    run("sfdisk", "-q", device, input="label: dos\n,16M\n,\n")
    fvd.detach("disk")
    assert not os.path.lexists("/dev/fvd/disk")
    device = fvd.attach(image, "--name", "disk")
    assert os.path.realpath("/dev/fvd/disk-part2") == f"{device}p2"
    fvd.detach("disk")
    assert os.listdir("/dev/fvd") == []


def test_snapshot_of_a_mounted_file_system(fvd, store, mounts):
    image, new = store / "disk.fvd", store / "new.fvd"
    fvd.ctl("create", image, "200M")
    device = fvd.attach(image, "--name", "disk")
    run("mkfs.ext4", "-q", "-F", device)
    point = mounts(device)
    (point / "before").write_text("kept")
    run("sync", "-f", point)
    fvd.ctl("snapshot", "disk", new)
    (point / "after").write_text("only in the new one")
    run("umount", point)
    fvd.detach("disk")
    old = fvd.attach(image, "--name", "old", "-r")
    point = mounts(old, "-o", "ro,noload")
    assert (point / "before").read_text() == "kept"
    assert not (point / "after").exists()
    run("umount", point)
    fvd.detach("old")
    point = mounts(fvd.attach(new))
    assert (point / "after").read_text() == "only in the new one"
    run("umount", point)


@pytest.mark.proof
def test_backup_of_an_image_on_a_block_device(fvd, store, loops, mounts):
    file = store / "disk"
    with file.open("wb") as handle:
        handle.truncate(160 << 20)
    image = loops(file)
    fvd.ctl("create", image, "100M", "--force")
    device = fvd.attach(image, "--name", "disk")
    run("mkfs.ext4", "-q", "-F", device)
    point = mounts(device)
    with Writer(point) as writer:
        writer.wait_for_more()
        known = dict(writer.written)
        fvd.ctl("backup", "disk", store / "copy.raw")
        writer.wait_for_more()
    run("umount", point)
    # As a power cut would have left it: what was synced before is there.
    copy = mounts(loops(store / "copy.raw"))
    for name, digest in known.items():
        assert hashlib.sha256((copy / name).read_bytes()).digest() == digest
    run("umount", copy)
    run("e2fsck", "-fn", device)
    fvd.detach("disk")
    fvd.ctl("check", image)


def is_read_only(node):
    return run("blockdev", "--getro", node).stdout.strip() == "1"


@pytest.mark.proof
def test_mode_of_an_attached_device_changes_unless_it_is_held(fvd, store, mounts):
    image = store / "disk.fvd"
    fvd.ctl("create", image, "64M")
    device = fvd.attach(image, "--name", "disk")
    run("sfdisk", "-q", device, input="label: dos\n,16M\n,\n")
    run("mkfs.ext4", "-q", "-F", f"{device}p1")
    point = mounts(f"{device}p1")
    (point / "file").write_text("kept")
    refused = fvd.ctl("set-read-only", "disk", "on", check=False)
    assert refused.returncode == 5
    assert str(point) in refused.stderr
    run("umount", point)
    fvd.ctl("set-read-only", "disk", "on")
    assert [is_read_only(node) for node in (device, f"{device}p1", f"{device}p2")] == [True] * 3
    worker = fvd.status("disk")["worker_pid"]
    os.kill(worker, 9)
    wait_until(lambda: fvd.status("disk")["restarts"] == 1, 60, "the successor")
    assert is_read_only(device)
    point = mounts(f"{device}p1", "-o", "ro")
    assert (point / "file").read_text() == "kept"
    run("umount", point)
    fvd.ctl("set-read-only", "disk", "off")
    point = mounts(f"{device}p1")
    (point / "file").write_text("written again")
    run("umount", point)
    fvd.detach("disk")


def test_leaked_device_of_ours_is_reclaimed_and_those_of_others_are_left(fvd, store):
    image = store / "disk.fvd"
    fvd.ctl("create", image, "64M")
    device = fvd.attach(image, "--name", "lost")
    worker = fvd.status("lost")["worker_pid"]
    # fvdd, worker and state directory vanish: nobody is left who could serve the device.
    fvd.kill()
    os.kill(worker, 9)
    run("rm", "-rf", fvd.folder / "state/devices/lost")
    fvd.start()
    wait_until(lambda: connected() == [], 30, "the leaked device to be given back")
    assert Path(f"/sys/block/{Path(device).name}/size").read_text().strip() == "0"
    assert fvd.names() == []
    assert "reclaimed" in fvd.log.read_text()


@pytest.mark.proof
def test_leaked_device_that_is_in_use_is_named_and_left(fvd, store):
    image = store / "disk.fvd"
    fvd.ctl("create", image, "64M")
    device = fvd.attach(image, "--name", "lost")
    worker = fvd.status("lost")["worker_pid"]
    held = os.open(device, os.O_RDONLY)
    try:
        fvd.kill()
        os.kill(worker, 9)
        run("rm", "-rf", fvd.folder / "state/devices/lost")
        fvd.start()
        wait_until(lambda: "leaked" in fvd.log.read_text(), 30, "the finding")
        report = fvd.client.doctor()
        (finding,) = [entry for entry in report.findings if "leaked" in entry.message]
        assert device in finding.message
        assert f"process {os.getpid()}" in finding.message
        assert connected() == [Path(device).name]
    finally:
        os.close(held)
    # Asked again, and now nothing is in the way.
    done = fvd.ctl("doctor", "--reclaim", check=False)
    assert f"reclaimed {device}" in done.stderr
    wait_until(lambda: connected() == [], 30, "the device to be given back")
