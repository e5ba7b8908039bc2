# SPDX-License-Identifier: Apache-2.0
"""A device from attach to detach, over the real API and real workers, data checked to the byte."""

import json
import os
import stat
import threading

import pytest

from fvdapi.errors import ApiError
from fvdapi.models import AttachRequest
from fvdd.attach.attachment import AttachError
from fvdengine.opening import lock_owner
from fvdtest.daemon import fvdctl, record_of, wait_until
from fvdtest.standin import StandInAttachment

MIB = 1 << 20


def test_attach_prints_only_the_path_and_detach_closes_clean(daemon, clone):
    image, model = clone()
    done = daemon.ctl("attach", image)
    assert done.stdout == "/dev/nbd0\n"
    disk = daemon.transport.disks[0]
    assert disk.read(0, MIB) == model.read(0, MIB)
    disk.write(1000, b"hello")
    model.write(1000, b"hello")
    disk.trim(4 * MIB, 4096)
    disk.write_zeroes(5 * MIB + 1, 100_000)
    model.write(5 * MIB + 1, bytes(100_000))
    model.write(4 * MIB, disk.read(4 * MIB, 4096))
    disk.flush()
    assert model.difference(disk.read(0, model.size)) is None

    status = daemon.status("web")
    assert status["state"] == "attached"
    assert status["device"] == "/dev/nbd0"
    assert status["image"] == str(image)
    assert status["size_bytes"] == model.size
    assert status["local_bytes"] + status["base_bytes_left"] == model.size
    assert status["timeouts"] == {
        "resend_timeout": 2.0, "base_timeout": 60.0, "kernel_timeout": 0.0, "dead_timeout": 43200.0,
    }  # fmt: skip
    assert os.path.exists(f"/proc/{status['worker_pid']}")

    daemon.ctl("detach", image)
    assert daemon.transport.disks == {}
    assert list((daemon.state / "devices").iterdir()) == []
    wait_until(lambda: not os.path.exists(f"/proc/{status['worker_pid']}"), "the worker to end")
    assert "state         clean" in fvdctl("info", image).stdout
    assert fvdctl("check", image).returncode == 0
    # Everything is there again, and the lock is free.
    disk = daemon.attach(image)
    assert model.difference(disk.read(0, model.size)) is None


def test_the_kernel_is_told_everything(daemon, clone):
    image, model = clone()
    disk = daemon.attach(image, "--device", "/dev/nbd7", "--sector-size", "4096", "--name", "x")
    assert disk.index == 7
    assert disk.spec.size_bytes == model.size
    assert disk.spec.sector_size == 4096
    assert disk.spec.backend.startswith("fvd:x:")
    assert (disk.spec.kernel_timeout, disk.spec.dead_timeout) == (0, 43200)
    # has-flags, flush, FUA, trim, write-zeroes, multi-conn; not read-only.
    assert disk.spec.flags == 1 | 4 | 8 | 32 | 64 | 256


def test_several_connections_serve_one_device(daemon, clone):
    image, model = clone()
    disk = daemon.attach(image, "--connections", "4")
    assert daemon.status("web")["connections_alive"] == 4
    assert disk.spec.kernel_timeout > 60

    def work(lane: int) -> None:
        for step in range(32):
            offset = (lane * 32 + step) * 16384
            disk.write(offset, bytes([lane + 1]) * 16384)

    threads = [threading.Thread(target=work, args=(lane,)) for lane in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for lane in range(4):
        model.write(lane * 32 * 16384, bytes([lane + 1]) * 16384 * 32)
    assert model.difference(disk.read(0, model.size)) is None


def test_read_only_device_refuses_writes_and_changes_nothing(daemon, clone):
    image, model = clone()
    before = image.read_bytes()
    disk = daemon.attach(image, "-r")
    assert disk.spec.flags & 2
    assert disk.read(MIB, 4096) == model.read(MIB, 4096)
    with pytest.raises(OSError, match="answered with an error"):
        disk.write(0, b"x")
    assert daemon.status("web")["read_only"] is True
    # Readers share.
    daemon.attach(image, "-r", "--name", "second")
    daemon.ctl("detach", "second")
    daemon.ctl("detach", "web")
    assert image.read_bytes() == before


def test_prefetch_can_be_started_and_waited_for(daemon, clone):
    image, model = clone()
    disk = daemon.attach(image)
    assert daemon.status("web")["prefetch"]["state"] == "disabled"
    refused = daemon.ctl("prefetch", "web", "wait", check=False)
    assert refused.returncode == 1
    assert "fvdctl prefetch web start" in refused.stderr
    daemon.ctl("prefetch", "web", "start")
    done = daemon.ctl("prefetch", "web", "wait", "--timeout", "60", "--json")
    status = json.loads(done.stdout)
    assert status["prefetch"]["state"] == "done"
    assert (status["base_bytes_left"], status["local_bytes"]) == (0, model.size)
    assert model.difference(disk.read(0, model.size)) is None
    assert "100%" in daemon.ctl("list").stdout


def test_waiting_for_prefetch_ends_at_the_limit(daemon, clone):
    image, _ = clone("web", "--prefetch-delay", "3600")
    daemon.attach(image)
    late = daemon.ctl("prefetch", "web", "wait", "--timeout", "0.3", check=False)
    assert late.returncode == 8
    assert "after 0.3 s" in late.stderr


def test_waiting_for_no_time_tells_the_state_once(daemon, clone):
    image, _ = clone("web", "--prefetch-delay", "3600")
    daemon.attach(image)
    looked = daemon.ctl("prefetch", "web", "wait", "--json", "--timeout", "0", check=False)
    assert looked.returncode == 8
    (line,) = looked.stdout.splitlines()
    assert json.loads(line)["state"] == "waiting"


def test_list_and_status_name_every_device(daemon, clone):
    for name in ("one", "two"):
        daemon.attach(clone(name)[0])
    listed = json.loads(daemon.ctl("list", "--json").stdout)
    assert [entry["name"] for entry in listed["devices"]] == ["one", "two"]
    text = daemon.ctl("list").stdout
    assert "/dev/nbd0" in text
    assert "/dev/nbd1" in text
    for argument in ("two", "/dev/nbd1", listed["devices"][1]["image"]):
        assert daemon.status(argument)["name"] == "two"
    shown = daemon.ctl("status", "two").stdout
    assert "attached" in shown
    assert "resend 2s" in shown


def test_detach_is_refused_while_somebody_holds_it(daemon, clone):
    image, _ = clone()
    disk = daemon.attach(image)
    disk.holders.append("/dev/nbd0 is mounted on /mnt")
    refused = daemon.ctl("detach", "web", check=False)
    assert refused.returncode == 5
    assert "/dev/nbd0 is mounted on /mnt" in refused.stderr
    assert "hint: " in refused.stderr
    disk.write(0, b"still alive")
    disk.holders.clear()
    daemon.ctl("detach", "web")


def test_socket_belongs_to_its_owner_and_group(daemon):
    mode = stat.S_IMODE(daemon.socket.stat().st_mode)
    assert mode == 0o660
    assert stat.S_IMODE((daemon.state / "devices").stat().st_mode) == 0o700


def test_image_stays_locked_between_requests(daemon, clone):
    image, _ = clone()
    daemon.attach(image)
    with pytest.raises(Exception, match="in use"):
        lock_owner(str(image))
    served = fvdctl("serve", image, "--tcp", "127.0.0.1:0", check=False)
    assert served.returncode != 0
    assert "in use" in served.stderr


def test_attaching_at_once_gives_each_its_own(daemon, clone):
    images = [clone(f"d{number}")[0] for number in range(4)]
    found: list[str] = []
    errors: list[ApiError] = []

    def attach(image) -> None:
        try:
            with daemon.client() as client:
                found.append(client.attach(AttachRequest(image=str(image))).device or "")
        except ApiError as error:
            errors.append(error)

    threads = [threading.Thread(target=attach, args=(image,)) for image in [*images, images[0]]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set(found)) == 4
    assert [error.code for error in errors] == ["image_in_use"]


def test_attach_that_is_undone_is_noted_before_the_kernel_lets_go(daemon, clone, monkeypatch):
    """Else the next fvdd would say that somebody else took the device away."""
    image, _ = clone()
    disconnect, noted = StandInAttachment.disconnect, []

    async def late(attachment, wait, timeout):
        raise AttachError("node_missing", "no node")

    async def noting(attachment, timeout):
        record = json.loads(record_of(daemon).read_text())
        noted.append((record["device"], record["wanted"]))
        await disconnect(attachment, timeout)

    monkeypatch.setattr(StandInAttachment, "ready", late)
    monkeypatch.setattr(StandInAttachment, "disconnect", noting)
    assert "no node" in daemon.ctl("attach", image, check=False).stderr
    assert noted == [("/dev/nbd0", "detached")]
    assert os.listdir(daemon.state / "devices") == []


def test_a_device_that_cannot_be_looked_at_is_no_defect(daemon, clone, monkeypatch):
    image, model = clone()
    disk = daemon.attach(image)

    def fail(self):
        raise AttachError("kernel_refused", "it cannot be told", "remove the cause")

    monkeypatch.setattr(StandInAttachment, "is_read_only", fail)
    refused = daemon.ctl("set-read-only", "web", "off", check=False)
    assert refused.returncode
    assert refused.stderr == "fvdctl: it cannot be told\nhint: remove the cause\n"
    monkeypatch.undo()
    assert model.difference(disk.read(0, model.size)) is None
