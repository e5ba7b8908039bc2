# SPDX-License-Identifier: Apache-2.0
"""Storage that fails for a while under a mounted file system, and is mended without a detach."""

import errno
import os

import pytest

from fvdtest.guest import checksum, load_driver, run, wait_until

pytestmark = pytest.mark.kernel

MIB = 1 << 20


@pytest.fixture
def disk(store, loops):
    """A block device that can be told to fail: call it with a target of device-mapper."""
    load_driver("dm_mod", "md/dm-mod.ko")
    file = store / "disk"
    file.touch()
    os.truncate(file, 160 * MIB)
    node = loops(file)
    sectors = 160 * MIB // 512
    run("dmsetup", "create", "fragile", "--table", f"0 {sectors} linear {node} 0")

    def become(target):
        table = f"0 {sectors} error" if target == "error" else f"0 {sectors} linear {node} 0"
        run("dmsetup", "suspend", "--noflush", "--nolockfs", "fragile")
        run("dmsetup", "load", "fragile", "--table", table)
        run("dmsetup", "resume", "fragile")

    yield become
    become("linear")
    run("dmsetup", "remove", "--retry", "fragile")


def test_storage_that_failed_is_used_again_without_a_detach(fvd, disk, mounts, tmp_path):
    image = "/dev/mapper/fragile"
    fvd.ctl("create", image, "64M", "--force")
    device = fvd.attach(image, "--name", "disk")
    refused = fvd.ctl("recover", "disk", "--discard-unflushed", check=False)
    assert refused.returncode != 0
    assert "only a failed device" in refused.stderr
    run("mkfs.ext4", "-q", "-F", device)
    point = mounts(device)
    kept = tmp_path / "kept"
    kept.write_bytes(os.urandom(4 * MIB))
    run("dd", f"if={kept}", f"of={point / 'kept'}", "bs=1M", "conv=fsync")
    disk("error")
    lost = run("dd", f"if={kept}", f"of={point / 'lost'}", "bs=1M", "conv=fsync", check=False)
    assert lost.returncode != 0
    wait_until(lambda: fvd.status("disk")["fault_errno"] == errno.EIO, 30, "the fault to be shown")
    assert "the image has stopped" in fvd.log.read_text()
    assert "fault" in fvd.ctl("status", "disk").stdout
    refused = fvd.ctl("recover", "disk", "--discard-unflushed", check=False)
    assert refused.returncode != 0
    assert f"is mounted on {point}" in refused.stderr
    refused = fvd.ctl("snapshot", "disk", tmp_path / "new.fvd", check=False)
    assert "new.fvd was not made" in refused.stderr
    assert "then: fvdctl recover disk --discard-unflushed" in refused.stderr
    run("umount", point, check=False)
    refused = fvd.ctl("recover", "disk", check=False)
    assert refused.returncode != 0
    assert "--discard-unflushed" in refused.stderr
    # The cause is there still: the device fails, and stays.
    assert fvd.ctl("recover", "disk", "--discard-unflushed", check=False).returncode != 0
    assert fvd.status("disk")["state"] == "failed"
    disk("linear")
    fvd.ctl("recover", "disk", "--discard-unflushed")
    assert fvd.status("disk")["fault_errno"] == 0
    run("e2fsck", "-fy", device, check=False)
    run("e2fsck", "-fn", device)
    point = mounts(device)
    assert checksum(point / "kept") == checksum(kept)
    run("dd", f"if={kept}", f"of={point / 'again'}", "bs=1M", "conv=fsync")
    run("umount", point)
    fvd.detach("disk")
    assert "no errors found" in fvd.ctl("check", image).stdout
