# SPDX-License-Identifier: Apache-2.0
"""Storage that is full, freed and made longer under mounted file systems, by the real programs."""

import errno
import os
import subprocess

import pytest

from fvdtest.guest import checksum, load_driver, run, wait_until

pytestmark = pytest.mark.kernel

LAYOUTS = ["compact", pytest.param("raw", marks=pytest.mark.proof)]
MIB = 1 << 20
@pytest.fixture
def small(store, loops, mounts):
    """A file system of 160 MiB in which an image has to share its space with a filler."""
    disk = store / "small"
    disk.touch()
    os.truncate(disk, 160 * MIB)
    run("mkfs.ext4", "-q", "-F", disk)
    return mounts(loops(disk))


def fill(folder):
    """Take all the space that is left but for less than 1 MiB."""
    run("sync", "-f", folder)
    step, at = 16 * MIB, 0
    with (folder / "filler").open("wb") as filler:
        while step >= MIB // 2:
            try:
                os.posix_fallocate(filler.fileno(), at, step)
                at += step
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                step //= 2


def data(path, count):
    """Bytes that no file system stores away as zeros or holes."""
    path.write_bytes(os.urandom(count * MIB))
    return path


def writing(source, target):
    """Copy a file onto the disk, up to the storage below.

    With requests of 128 KiB, of which Linux 6.1 has 128 under way, 16 MiB that wait for space would
    keep reads in the kernel."""
    return subprocess.Popen(
        ["dd", f"if={source}", f"of={target}", "bs=1M", "conv=fsync"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def checked(fvd, image, device, *, repair=False):
    """The file system is clean; so is the image, detached."""
    if repair:
        done = run("e2fsck", "-fy", device, check=False)
        assert done.returncode in (0, 1), done.stdout
    run("e2fsck", "-fn", device)
    fvd.detach(image)
    done = fvd.ctl("check", image)
    assert "no errors found" in done.stdout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_writes_wait_for_space_and_go_on(fvd, small, mounts, tmp_path, layout):
    image = small / "disk.fvd"
    options = ("--compact", "--storage-grow-unit", "1M") if layout == "compact" else ()
    fvd.ctl("create", image, "400M", *options)
    device = fvd.attach(image, "--name", "disk", "--on-full", "wait")
    run("mkfs.ext4", "-q", "-F", device)
    point = mounts(device)
    kept, source = data(tmp_path / "kept", 4), data(tmp_path / "source", 12)
    run("dd", f"if={kept}", f"of={point / 'kept'}", "bs=1M", "conv=fsync")
    fill(small)
    copying = writing(source, point / "copy")
    wait_until(lambda: fvd.status("disk")["parked"], 60, "writes to wait for space")
    # Everything else goes on.
    run("dd", f"if={device}", "of=/dev/null", "bs=1M", "count=8", "iflag=direct")
    assert copying.poll() is None
    assert fvd.status("disk")["fault_errno"] == 0
    assert "writes wait for space" in fvd.ctl("status", "disk").stdout
    parked = [line for line in fvd.ctl("metrics").stdout.splitlines() if "fvd_io_parked{" in line]
    assert parked
    assert float(parked[0].split()[-1]) > 0
    (small / "filler").unlink()
    assert copying.communicate(timeout=90)[1] is not None
    assert copying.returncode == 0
    wait_until(lambda: not fvd.status("disk")["parked"], 60, "nothing to wait any more")
    run("umount", point)
    point = mounts(device)
    assert checksum(point / "copy") == checksum(source)
    assert checksum(point / "kept") == checksum(kept)
    run("umount", point)
    checked(fvd, image, device)


@pytest.mark.proof
def test_detach_is_refused_and_an_upgrade_done_while_writes_wait(fvd, small, tmp_path):
    image = small / "disk.fvd"
    fvd.ctl("create", image, "400M", "--compact", "--storage-grow-unit", "1M")
    device = fvd.attach(image, "--name", "disk", "--on-full", "wait")
    source = data(tmp_path / "source", 12)
    fill(small)
    copying = writing(source, device)
    wait_until(lambda: fvd.status("disk")["parked"], 60, "writes to wait for space")
    refused = fvd.ctl("detach", "disk", check=False)
    assert refused.returncode == 5
    assert "wait for space" in refused.stderr
    refused = fvd.ctl("snapshot", "disk", small / "new.fvd", check=False)
    assert refused.returncode == 5
    assert "wait for space" in refused.stderr
    worker = fvd.status("disk")["worker_pid"]
    assert "restarted" in fvd.ctl("upgrade", "disk").stderr
    assert fvd.status("disk")["worker_pid"] != worker
    wait_until(lambda: fvd.status("disk")["parked"], 60, "writes to wait again")
    (small / "filler").unlink()
    copying.communicate(timeout=90)
    assert copying.returncode == 0
    fvd.detach("disk")
    assert "no errors found" in fvd.ctl("check", image).stdout
    device = fvd.attach(image, "--name", "disk")
    written = tmp_path / "written"
    run("dd", f"if={device}", f"of={written}", "bs=1M", "count=12")
    assert checksum(written) == checksum(source)
    fvd.detach("disk")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_full_storage_is_an_error_and_harms_nothing(fvd, small, mounts, tmp_path, layout):
    image = small / "disk.fvd"
    options = ("--compact", "--storage-grow-unit", "1M") if layout == "compact" else ()
    fvd.ctl("create", image, "400M", *options)
    device = fvd.attach(image, "--name", "disk")
    run("mkfs.ext4", "-q", "-F", device)
    point = mounts(device)
    kept, source = data(tmp_path / "kept", 4), data(tmp_path / "source", 12)
    run("dd", f"if={kept}", f"of={point / 'kept'}", "bs=1M", "conv=fsync")
    fill(small)
    copying = writing(source, point / "copy")
    assert b"rror" in copying.communicate(timeout=90)[1]
    assert copying.returncode != 0
    assert fvd.status("disk")["parked"] == 0
    assert fvd.status("disk")["fault_errno"] == 0, "what is full is not broken"
    assert checksum(point / "kept") == checksum(kept)
    (small / "filler").unlink()
    run("umount", point, check=False)
    run("e2fsck", "-fy", device, check=False)
    point = mounts(device)
    assert checksum(point / "kept") == checksum(kept)
    run("dd", f"if={source}", f"of={point / 'again'}", "bs=1M", "conv=fsync")
    assert checksum(point / "again") == checksum(source)
    run("umount", point)
    checked(fvd, image, device)


@pytest.fixture
def group(store, loops):
    """A volume group of LVM; volumes that it makes are its own."""
    load_driver("dm_mod", "md/dm-mod.ko")
    disk = store / "physical"
    disk.touch()
    os.truncate(disk, 512 * MIB)
    node = loops(disk)
    run("pvcreate", "-q", node)
    run("vgcreate", "-q", "-s", "4M", "fvdtest", node)
    yield "fvdtest"
    run("vgremove", "-q", "-f", "-y", "fvdtest")


@pytest.mark.proof
def test_volume_is_made_longer_by_lvextend_while_it_is_written(fvd, group, mounts, tmp_path):
    run("lvcreate", "-q", "-y", "-Zn", "-L", "24M", "-n", "clone", group)
    volume = f"/dev/{group}/clone"
    fvd.ctl("create", volume, "400M", "--compact", "--storage-grow-unit", "16M", "--force")
    device = fvd.attach(volume, "--name", "disk")
    run("mkfs.ext4", "-q", "-F", device)
    point = mounts(device)
    source = data(tmp_path / "source", 40)
    run("dd", f"if={source}", f"of={point / 'copy'}", "bs=1M", "conv=fsync")
    length = int(run("blockdev", "--getsize64", volume).stdout)
    assert 40 * MIB < length < 200 * MIB
    assert fvd.status("disk")["parked"] == 0
    # Now the group is full: what does not fit fails, and what is there stays.
    run("lvcreate", "-q", "-y", "-Zn", "-l", "100%FREE", "-n", "rest", group)
    large = data(tmp_path / "large", 60)
    copying = writing(large, point / "large")
    assert copying.communicate(timeout=90)[1]
    assert copying.returncode != 0
    assert int(run("blockdev", "--getsize64", volume).stdout) == length
    run("umount", point, check=False)
    run("lvremove", "-q", "-y", f"{group}/rest")
    run("e2fsck", "-fy", device, check=False)
    point = mounts(device)
    assert checksum(point / "copy") == checksum(source)
    run("umount", point)
    checked(fvd, volume, device)
