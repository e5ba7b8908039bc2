# SPDX-License-Identifier: Apache-2.0
"""The kernel device itself: partitions, refusals, geometry, what the kernel is told."""

import os
from pathlib import Path

import pytest

from fvdtest.guest import run

pytestmark = pytest.mark.kernel

GPT = "label: gpt\nstart=2048, size=204800, name=first\nsize=102400, name=second\n"


def queue(device, name):
    return Path(f"/sys/block/{Path(device).name}/queue/{name}").read_text().strip()


def test_partitions_are_there_when_attach_returns(fvd, store, mounts):
    image = store / "disk.fvd"
    fvd.ctl("create", image, "200M")
    device = fvd.attach(image)
    run("sfdisk", "-q", device, input=GPT)
    run("mkfs.ext4", "-q", "-F", f"{device}p1")
    point = mounts(f"{device}p1")
    (point / "file").write_text("on a partition")
    run("umount", point)
    fvd.detach(image)

    device = fvd.attach(image)
    assert Path(f"{device}p1").is_block_device()
    assert Path(f"{device}p2").is_block_device()
    point = mounts(f"{device}p1")
    assert (point / "file").read_text() == "on a partition"
    run("umount", point)
    run("sfdisk", "-q", "--verify", device)


def test_detach_of_a_mounted_device_is_refused_and_names_the_mount_point(
    fvd, store, mounts, settled
):
    image = store / "disk.fvd"
    fvd.ctl("create", image, "100M")
    device = fvd.attach(image, "--name", "busy")
    run("mkfs.ext4", "-q", "-F", device)
    point = mounts(device)
    refused = fvd.ctl("detach", "busy", check=False)
    assert refused.returncode != 0
    assert str(point) in refused.stderr
    settled()
    (point / "works").write_text("still")
    run("sync", "-f", point)
    run("umount", point)
    fvd.detach("busy")


def test_detach_of_a_device_that_is_open_names_the_process(fvd, store):
    image = store / "disk.fvd"
    fvd.ctl("create", image, "100M")
    device = fvd.attach(image, "--name", "busy")
    held = os.open(device, os.O_RDONLY)
    try:
        refused = fvd.ctl("detach", "busy", check=False)
        assert refused.returncode != 0
        assert str(os.getpid()) in refused.stderr
    finally:
        os.close(held)
    fvd.detach("busy")


def test_detached_device_is_free_for_the_next(fvd, store):
    image = store / "disk.fvd"
    fvd.ctl("create", image, "100M")
    first = fvd.attach(image)
    fvd.detach(image)
    assert Path(f"/sys/block/{Path(first).name}/size").read_text().strip() == "0"
    assert fvd.attach(image) == first


def test_kernel_is_told_the_truth(fvd, store):
    image = store / "disk.fvd"
    fvd.ctl("create", image, "100M")
    device = fvd.attach(image, "--name", "disk")
    assert run("blockdev", "--getsize64", device).stdout.strip() == str(100 << 20)
    assert queue(device, "logical_block_size") == "512"
    assert queue(device, "write_cache") == "write back"
    assert queue(device, "fua") == "1"
    assert int(queue(device, "discard_max_bytes")) > 0
    backend = Path(f"/sys/block/{Path(device).name}/backend").read_text()
    assert backend.startswith("fvd:disk:")


def test_sector_size_can_be_chosen(fvd, store):
    image = store / "disk.fvd"
    fvd.ctl("create", image, "100M")
    device = fvd.attach(image, "--sector-size", "4096")
    assert queue(device, "logical_block_size") == "4096"


def test_image_in_use_is_refused_by_name(fvd, store):
    image = store / "disk.fvd"
    fvd.ctl("create", image, "100M")
    fvd.attach(image, "--name", "first")
    refused = fvd.ctl("attach", image, "--name", "second", check=False)
    assert refused.returncode != 0
    assert refused.stdout == ""
    assert fvd.names() == ["first"]


def test_programs_themselves_attach_and_detach(fvd, store):
    image = store / "disk.fvd"
    run("fvdctl", "create", "-q", image, "100M")
    device = run("fvdctl", "attach", image).stdout
    assert device in [f"/dev/nbd{number}\n" for number in range(32)]
    assert "disk" in run("fvdctl", "list").stdout
    assert "detached disk" in run("fvdctl", "detach", device.strip()).stderr
