# SPDX-License-Identifier: Apache-2.0
"""Writing a new image: block devices show nothing of their old content."""

import contextlib
import os
import shutil
import subprocess
from dataclasses import replace

import pytest

from fvdengine import geometry, new_files
from fvdengine.check import check_image
from fvdengine.create import create_image
from fvdengine.errors import ImageExists, ImageInUse, InvalidOption
from fvdengine.new_files import NewImage
from fvdengine.opening import OpenOptions, open_plan
from fvdengine.options import CreateOptions

MIB = 1 << 20
HOLES = ((8192, 4096), (65536, 131072))


def layout(**values):
    return geometry.choose_layout(geometry.Wanted(4 * MIB, MIB, journal_size=65536, **values))


def test_zeroing_a_device_covers_metadata_and_what_no_bit_hides(header, tmp_path):
    """Old content must never be read: only blocks that the base still shows stay as they are."""
    plan = layout()
    new = NewImage(plan, replace(header, virtual_disk_size=4 * MIB), b"", HOLES)
    disk = tmp_path / "disk"
    disk.write_bytes(b"\xee" * (plan.file_size + 8192))
    fd = os.open(disk, os.O_RDWR)
    try:  # a regular file knows no BLKZEROOUT, so the fallback writes zeros
        new_files.zero_device(fd, new_files.device_zeros(new))
        new_files.zero_device(fd, new_files.data_zeros(new))
    finally:
        os.close(fd)
    data = bytearray(disk.read_bytes())
    assert data[16384 : plan.metadata_end].strip(b"\0") == b""
    for offset, length in HOLES:
        start = plan.data_offset + offset
        assert data[start : start + length].strip(b"\0") == b""
        data[start : start + length] = b"\xee" * length
    first_local = plan.data_offset + MIB
    assert data[plan.data_offset : first_local].strip(b"\xee") == b""
    assert data[first_local : plan.file_size].strip(b"\0") == b""
    assert data[plan.file_size :] == b"\xee" * 8192


def test_chunks_of_a_device_are_the_business_of_the_engine(header):
    plan = layout(is_compact=True)
    assert list(new_files.data_zeros(NewImage(plan, header, b"", HOLES))) == []
    (metadata,) = new_files.device_zeros(NewImage(plan, header))
    assert sum(metadata) == plan.table_offset + plan.table_size


@pytest.fixture
def loop_device(tmp_path):
    """A function that gives block devices of 24 MiB full of somebody's old data."""
    if os.geteuid() != 0 or not shutil.which("losetup"):
        pytest.skip("needs root and losetup")
    with contextlib.ExitStack() as stack:

        def make():
            backing = tmp_path / f"backing{len(os.listdir(tmp_path))}"
            backing.write_bytes(b"\xee" * (24 * MIB))
            found = subprocess.run(
                ["losetup", "--find", "--show", str(backing)],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if found.returncode:
                pytest.skip(f"no loop device here: {found.stderr.strip()}")
            device = found.stdout.strip()
            stack.callback(subprocess.run, ["losetup", "--detach", device], check=True)
            return device

        yield make


@pytest.fixture
def options(base, tmp_path):
    return CreateOptions(
        base=str(base), size=2 * MIB, journal_size=65536, allow_dirs=(str(tmp_path), "/dev")
    )


def opened(path, options):
    return open_plan(path, OpenOptions(allow_dirs=options.allow_dirs))


def test_image_on_a_device_shows_nothing_of_its_old_content(loop_device, options):
    device = loop_device()
    with pytest.raises(ImageExists):
        create_image(device, options)
    header = create_image(device, replace(options, force=True)).header
    with opened(device, options) as plan:
        assert plan.header == header
        with pytest.raises(ImageInUse):
            opened(device, options)
        data = os.pread(plan.layers[0].fd, 24 * MIB, 0)
    assert data[16384 : header.journal_offset + header.journal_size].strip(b"\0") == b""
    local = header.data_offset + MIB
    assert data[local : local + MIB].strip(b"\0") == b""
    allowed = OpenOptions(allow_dirs=options.allow_dirs)
    assert check_image(device, allowed).exit_status == 0


def test_compact_image_on_a_device_maps_nothing(loop_device, options):
    device = loop_device()
    header = create_image(device, replace(options, compact=True, force=True)).header
    with opened(device, options) as plan:
        table = os.pread(plan.layers[0].fd, header.table_size, header.table_offset)
    assert table == b"\xff" * 4096


def test_holes_on_a_device_are_zeroed_so_that_nothing_is_relied_on(
    loop_device, options, base
):
    with base.open("r+b") as file:
        file.seek(65536)
        file.write(bytes(65536))
    device = loop_device()
    header = create_image(device, replace(options, detect_holes=65536, force=True)).header
    assert header.need_zero_init == 0
    with opened(device, options) as plan:
        data = os.pread(plan.layers[0].fd, 65536 + 8192, header.data_offset + 65536 - 4096)
    assert data == b"\xee" * 4096 + bytes(65536) + b"\xee" * 4096


def test_data_device_is_zeroed_behind_the_base(loop_device, options, tmp_path):
    device = loop_device()
    options = replace(options, data_file=device)
    create_image(tmp_path / "c.fvd", options)
    with opened(tmp_path / "c.fvd", options) as plan:
        data = os.pread(plan.layers[0].data.fd, 24 * MIB, 0)
    assert data[:MIB].strip(b"\xee") == b""
    assert data[MIB : 2 * MIB].strip(b"\0") == b""
    assert data[2 * MIB :].strip(b"\xee") == b""


def test_data_device_that_is_too_short_is_left_alone(loop_device, options, tmp_path):
    device = loop_device()
    with pytest.raises(InvalidOption, match="the data file needs 33554432 bytes and the device"):
        create_image(tmp_path / "c.fvd", replace(options, size=32 * MIB, data_file=device))
    assert not (tmp_path / "c.fvd").exists()
    with open(device, "rb") as file:
        assert file.read().strip(b"\xee") == b""


@pytest.mark.parametrize("fails", [False, True])
def test_new_file_stays_in_the_folder_that_it_was_made_in(tmp_path, monkeypatch, fails):
    """Somebody puts a link in the place of the folder: what lies where that leads is left alone."""
    durable, fsync = [], os.fsync

    def noted(fd):
        durable.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noted)
    folder, other = tmp_path / "folder", tmp_path / "other"
    for place in (folder, other):
        place.mkdir()
    (other / "new").write_text("precious")
    with contextlib.suppress(InterruptedError), new_files.new_file(str(folder / "new"), []) as fd:
        os.rename(folder, tmp_path / "moved")
        folder.symlink_to(other)
        assert not new_files.unlink_if(str(tmp_path / "other/new"), fd)
        if fails:
            raise InterruptedError
    assert (other / "new").read_text() == "precious"
    assert os.listdir(tmp_path / "moved") == ([] if fails else ["new"])
    assert durable == ([] if fails else [str(tmp_path / "moved")])


def test_no_file_is_made_by_way_of_a_link(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "folder").symlink_to("other")
    with pytest.raises(OSError, match="symbolic links"), new_files.new_file(
        str(tmp_path / "folder/new"), []
    ):
        pass
    assert os.listdir(tmp_path / "other") == []


def test_only_the_very_file_is_removed(tmp_path):
    path = tmp_path / "new"
    with path.open("w") as file:
        assert new_files.unlink_if(str(path), file.fileno())
        assert not new_files.unlink_if(str(path), file.fileno())
        path.touch()
        assert not new_files.unlink_if(str(path), file.fileno())
    assert path.exists()
