# SPDX-License-Identifier: Apache-2.0
"""Somebody renames or copies a directory of the registry: nothing wrong is done to its device."""

import json
import os
import shutil
import signal

import pytest

from fvdd.devices.adoption import worker_pids
from fvdtest.daemon import wait_until


def told(daemon, name):
    """What doctor says of a device, and its remedy."""
    found = json.loads(daemon.ctl("doctor", "--json", check=False).stdout)["findings"]
    return {one["message"]: one["remedy"] for one in found if one["topic"] == f"device {name}"}


@pytest.mark.parametrize("lost", [False, True], ids=["whole", "without a record"])
@pytest.mark.parametrize("dies", [False, True], ids=["served", "worker dead"])
def test_renamed_directory_is_told_and_nothing_is_done_to_its_device(relay, clone, lost, dies):
    image, model = clone()
    disk = relay.running.attach(image)
    disk.write(5000, b"acknowledged")
    model.write(5000, b"acknowledged")
    relay.stop()
    place = relay.running.state / "devices/web"
    (worker,) = worker_pids(place)
    good = (place / "device.json").read_bytes()
    if dies:
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: not worker_pids(place), "its end")
    if lost:
        (place / "device.json").write_text("{")
    other = place.rename(place.with_name("other"))
    daemon = relay.next()
    assert not disk.is_gone
    assert daemon.device("other").state == "orphaned"
    assert told(daemon, "/dev/nbd0") == {}, "it is not leaked"
    (remedy,) = told(daemon, "other").values()
    assert remedy.endswith(f": mv {other} {place} && systemctl restart fvdd")
    daemon.ctl("doctor", "--reclaim", check=False)
    refused = daemon.ctl("recover", "other", check=False)
    assert refused.returncode == 1
    assert f"{other} is not of a device other: its state is that of web" in refused.stderr
    assert remedy in refused.stderr
    assert daemon.device("other").state == "orphaned"
    assert not disk.is_gone
    assert os.path.exists(f"/proc/{worker}/exe") != dies
    # The remedy helps.
    other.rename(place)
    (place / "device.json").write_bytes(good)
    relay.stop()
    daemon = relay.next()
    assert daemon.device("web").state == "attached"
    assert (daemon.device("web").worker_pid == worker) != dies
    assert model.difference(disk.read(0, model.size)) is None


def test_directory_renamed_under_a_running_fvdd_is_used_again_when_it_is_back(daemon, clone):
    image, model = clone()
    disk = daemon.attach(image)
    disk.write(5000, b"acknowledged")
    model.write(5000, b"acknowledged")
    place = daemon.state / "devices/web"
    away = place.rename(place.with_name("away"))
    os.kill(daemon.device("web").worker_pid, signal.SIGKILL)
    wait_until(lambda: daemon.device("web").state == "failed", "it to fail")
    away.rename(place)
    daemon.ctl("recover", "web")
    assert model.difference(disk.read(0, model.size)) is None


def test_copy_of_a_directory_is_told_and_the_device_is_left_alone(relay, clone):
    image, model = clone()
    disk = relay.running.attach(image)
    relay.stop()
    place = relay.running.state / "devices/web"
    copy = place.with_name("copy")
    shutil.copytree(place, copy, ignore=shutil.ignore_patterns("control.sock"))
    daemon = relay.next()
    assert daemon.device("web").state == "attached"
    (remedy,) = told(daemon, "copy").values()
    assert remedy == f"it is a copy of {place}, which nobody needs: remove {copy}"
    refused = daemon.ctl("recover", "copy", check=False)
    assert refused.returncode == 1
    assert remedy in refused.stderr
    shutil.rmtree(copy)
    assert [one["name"] for one in json.loads(daemon.ctl("list", "--json").stdout)["devices"]] == [
        "web"
    ]
    assert model.difference(disk.read(0, model.size)) is None
