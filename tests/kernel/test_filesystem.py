# SPDX-License-Identifier: Apache-2.0
"""File systems on a device: made, filled with a real tree, checked, found again after detach."""

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from fvdtest.guest import run
from fvdtest.marks import in_proof

pytestmark = pytest.mark.kernel

TREE = Path("/usr/lib/python3.11")
PARTS = ["asyncio", "collections", "email", "importlib", "json", "unittest"]
MAKE = {
    "ext4": ["mkfs.ext4", "-q", "-F"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
}
CHECK = {"ext4": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n"]}


def manifest(root):
    """Path, kind, mode and checksum of everything below a folder."""
    found = {}
    for path in sorted(root.rglob("*")):
        mode = path.lstat().st_mode
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            content = ""
        found[str(path.relative_to(root))] = (mode, content)
    return found


def unpack(target):
    """Copy a real tree through tar, as packages and backups do."""
    pack = subprocess.Popen(["tar", "-C", TREE, "-cf", "-", *PARTS], stdout=subprocess.PIPE)
    unpacking = subprocess.run(["tar", "-C", target, "-xf", "-"], stdin=pack.stdout, check=False)
    pack.stdout.close()
    assert pack.wait() == 0
    assert unpacking.returncode == 0


def kernel_knows(kind):
    return kind in Path("/proc/filesystems").read_text().split()


@pytest.mark.parametrize("kind", ["ext4", in_proof("xfs")])
def test_tree_survives_detach_and_attach(fvd, store, mounts, kind):
    assert kernel_knows(kind)
    image = store / "disk.fvd"
    fvd.ctl("create", image, "600M")
    device = fvd.attach(image, "--name", "disk")
    run(*MAKE[kind], device)
    point = mounts(device)
    unpack(point)
    before = manifest(point)
    assert len(before) > 200
    run("umount", point)
    run(*CHECK[kind], device)
    fvd.detach("disk")
    fvd.ctl("check", image)

    device = fvd.attach(image, "--name", "disk")
    run(*CHECK[kind], device)
    point = mounts(device, "-o", "ro")
    assert manifest(point) == before
    run("umount", point)
    fvd.detach("disk")
    fvd.ctl("check", image)


def test_discarded_space_goes_back_to_the_store(fvd, store, mounts):
    image = store / "disk.fvd"
    fvd.ctl("create", image, "400M")
    device = fvd.attach(image)
    # Everything at once: the kernel's lazy zeroing of tables would write meanwhile.
    run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", device)
    point = mounts(device)
    (point / "large").write_bytes(os.urandom(64 << 20))
    run("sync", "-f", point)
    used = image.stat().st_blocks * 512
    assert used > 64 << 20
    (point / "large").unlink()
    run("sync", "-f", point)
    run("fstrim", point)
    run("umount", point)
    fvd.detach(image)
    assert image.stat().st_blocks * 512 < used - (60 << 20)


@pytest.mark.proof
def test_two_devices_at_once_keep_apart(fvd, store, mounts):
    points = {}
    for name in ("left", "right"):
        image = store / f"{name}.fvd"
        fvd.ctl("create", image, "200M")
        device = fvd.attach(image, "--name", name)
        run("mkfs.ext4", "-q", "-F", "-L", name, device)
        points[name] = (device, mounts(device))
    assert sorted(fvd.names()) == ["left", "right"]
    assert points["left"][0] != points["right"][0]
    for name, (_, point) in points.items():
        (point / "who").write_text(name * 100_000)
    for name, (_, point) in points.items():
        run("umount", point)
        fvd.detach(name)
    for name in points:
        device = fvd.attach(store / f"{name}.fvd", "--name", name)
        point = mounts(device)
        assert (point / "who").read_text() == name * 100_000
        run("umount", point)


def test_read_only_device_takes_no_write(fvd, store, mounts):
    image = store / "disk.fvd"
    fvd.ctl("create", image, "200M")
    device = fvd.attach(image)
    run("mkfs.ext4", "-q", "-F", device)
    point = mounts(device)
    (point / "kept").write_text("kept")
    run("umount", point)
    fvd.detach(image)
    content = hashlib.sha256(image.read_bytes()).digest()

    device = fvd.attach(image, "-r")
    assert run("blockdev", "--getro", device).stdout.strip() == "1"
    raw = os.open(device, os.O_RDWR)
    try:
        with pytest.raises(OSError, match="not permitted"):
            os.write(raw, bytes(4096))
    finally:
        os.close(raw)
    point = mounts(device, "-o", "ro,noload")
    assert (point / "kept").read_text() == "kept"
    with pytest.raises(OSError, match="Read-only file system"):
        (point / "new").write_text("new")
    run("umount", point)
    fvd.detach(image)
    assert hashlib.sha256(image.read_bytes()).digest() == content
