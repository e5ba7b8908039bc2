# SPDX-License-Identifier: Apache-2.0
"""Create: the defaults of the format, the order of writes, and that a failure leaves no trace."""

import os
import shutil
import struct
import subprocess
from dataclasses import replace

import pytest

from fvdengine import create, geometry, stores
from fvdengine.check import check_image
from fvdengine.create import create_image
from fvdengine.errors import (
    AmbiguousBaseFormat,
    BaseEmpty,
    FileTooLarge,
    ImageExists,
    ImageInUse,
    ImageNotFound,
    InvalidOption,
    InvalidSize,
    NoSpace,
    PathNotAllowed,
    UnsupportedStore,
)
from fvdengine.header import BASE_FILE, Header
from fvdengine.opening import OpenOptions, open_plan
from fvdengine.options import CreateOptions

MIB = 1 << 20


@pytest.fixture
def clone(tmp_path, base):
    """A function that makes tmp_path/new.fvd over `base`."""

    def make(**options):
        path = tmp_path / "new.fvd"
        return path, create_image(path, CreateOptions(base=str(base), **options)).header

    return make


def test_defaults_are_those_of_the_format(clone):
    path, header = clone()
    expected = {
        "header_size": 16384, "create_version": 2, "last_open_version": 2,
        "virtual_disk_size": MIB, "data_file": "", "base_img": "base.raw", "base_img_fmt": "raw",
        "base_img_size": MIB, "bitmap_offset": 16384, "bitmap_size": 4096, "block_size": 4096,
        "journal_offset": 20480, "journal_size": 16 * MIB, "clean_shutdown": 1,
        "stable_journal_epoch": 1, "journal_buf_size": 65536, "journal_clean_buf_period": 5000,
        "table_offset": 0, "table_size": 0, "chunk_size": MIB, "storage_grow_unit": 100 * MIB,
        "add_storage_cmd": "", "chunks_relocated": 0, "copy_on_read": 0,
        "max_outstanding_copy_on_read_data": 2_000_000, "prefetch_start_delay": -1,
        "base_img_fully_prefetched": 0, "num_prefetch_slots": 2, "bytes_per_prefetch": MIB,
        "prefetch_read_throughput_measure_time": 100, "prefetch_write_throughput_measure_time": 100,
        "prefetch_min_read_throughput": 5120, "prefetch_min_write_throughput": 5120,
        "prefetch_max_read_throughput": 10**9, "prefetch_max_write_throughput": 10**9,
        "prefetch_throttle_time": 30000, "need_zero_init": 0,
    }  # fmt: skip
    assert {name: getattr(header, name) for name in expected} == expected
    data = path.read_bytes()
    assert Header.unpack(data[:8192]) == header
    assert data[8192:16384] == data[:8192]
    assert data[16384 : header.data_offset].strip(b"\0") == b""


def test_extension_identifies_the_base(clone, base):
    extension = clone()[1].extension
    assert extension.base_kind == BASE_FILE
    assert extension.base_length == MIB
    assert extension.base_id == struct.pack("<qQ16x", base.stat().st_mtime_ns, MIB)
    assert extension.boot_id == bytes(16)
    assert extension.compatible_features == 1
    assert any(extension.image_uuid)


def test_every_image_has_a_uuid_of_its_own(clone):
    first = clone()[1].extension
    second = clone(force=True)[1].extension
    assert first.image_uuid != second.image_uuid
    assert first.open_session != second.open_session


def test_data_are_sparse_and_metadata_are_allocated(clone):
    path, header = clone(size=1 << 40)
    status = path.stat()
    assert status.st_size == header.data_offset + (1 << 40)
    metadata_end = header.journal_offset + header.journal_size
    assert metadata_end <= status.st_blocks * 512 <= metadata_end + MIB


def test_image_without_a_base_has_no_bitmap_and_no_journal(tmp_path):
    header = create_image(tmp_path / "plain.fvd", CreateOptions(size=MIB)).header
    assert (header.bitmap_size, header.journal_size, header.base_img_size) == (0, 0, 0)
    assert header.base_img_fully_prefetched == 1
    open_plan(tmp_path / "plain.fvd").close()


def test_options_arrive_in_the_header(clone):
    header = clone(
        size=8 * MIB, block_size=65536, journal_size=100_000, journal_buffer=4096,
        journal_period_ms=7, copy_on_read=True, max_outstanding_copy_on_read=1 << 20,
        prefetch_delay_seconds=9, prefetch_slots=5, bytes_per_prefetch=131072,
        prefetch_read_measure_ms=11, prefetch_write_measure_ms=12, prefetch_min_read_kb=13,
        prefetch_min_write_kb=14, prefetch_max_read_kb=15, prefetch_max_write_kb=16,
        prefetch_throttle_ms=17,
    )[1]  # fmt: skip
    expected = {
        "virtual_disk_size": 8 * MIB, "block_size": 65536, "journal_size": 102400,
        "journal_buf_size": 4096, "journal_clean_buf_period": 7, "copy_on_read": 1,
        "max_outstanding_copy_on_read_data": 1 << 20, "prefetch_start_delay": 9,
        "num_prefetch_slots": 5, "bytes_per_prefetch": 131072,
        "prefetch_read_throughput_measure_time": 11, "prefetch_write_throughput_measure_time": 12,
        "prefetch_min_read_throughput": 13, "prefetch_min_write_throughput": 14,
        "prefetch_max_read_throughput": 15, "prefetch_max_write_throughput": 16,
        "prefetch_throttle_time": 17,
    }  # fmt: skip
    assert {name: getattr(header, name) for name in expected} == expected


def test_smaller_disk_than_base_covers_only_itself(clone):
    assert clone(size=4096)[1].base_img_size == 4096


def test_copy_on_read_may_hold_back_two_blocks(clone):
    header = clone(block_size=2 * MIB, max_outstanding_copy_on_read=1)[1]
    assert header.max_outstanding_copy_on_read_data == 4 * MIB
    assert header.bytes_per_prefetch == 2 * MIB


BAD = [
    ({"size": 0}, InvalidSize, "0 bytes"),
    ({"size": -512}, InvalidSize, "-512 bytes"),
    ({"size": 1000}, InvalidSize, "not a multiple of 512"),
    ({"size": (1 << 63) - 512}, InvalidSize, "larger than a file"),
    ({"block_size": 2048}, InvalidOption, "--block-size"),
    ({"block_size": 12288}, InvalidOption, "--block-size"),
    ({"block_size": 4 * MIB}, InvalidOption, "--block-size"),
    ({"journal_size": 4096}, InvalidOption, "--journal-size"),
    ({"journal_buffer": 1 << 30}, InvalidOption, "--journal-buffer is larger"),
    ({"journal_period_ms": -1}, InvalidOption, "--journal-period"),
    ({"journal_period_ms": 1 << 70}, InvalidOption, "--journal-period"),
    ({"prefetch_slots": 0}, InvalidOption, "--prefetch-slots is 0"),
    ({"prefetch_slots": 1 << 40}, InvalidOption, "--prefetch-slots"),
    ({"bytes_per_prefetch": 5000}, InvalidOption, "--bytes-per-prefetch"),
    ({"prefetch_max_read_kb": 1}, InvalidOption, "--prefetch-max-read is below"),
    ({"prefetch_delay_seconds": 1 << 40}, InvalidOption, "--prefetch-delay"),
    ({"prefetch_read_measure_ms": 0}, InvalidOption, "--prefetch-read-measure-time is 0"),
    ({"base_format": "qcow2"}, InvalidOption, "--base-format"),
]


@pytest.mark.parametrize(("options", "error", "text"), BAD, ids=lambda v: str(v)[:50])
def test_bad_option_is_named_and_nothing_is_made(clone, tmp_path, options, error, text):
    with pytest.raises(error, match=text):
        clone(**options)
    assert os.listdir(tmp_path) == ["base.raw"]


def test_size_is_needed_without_a_base(tmp_path):
    with pytest.raises(InvalidSize, match="needs a size"):
        create_image(tmp_path / "x.fvd", CreateOptions())


def test_existing_file_is_kept_unless_forced(clone, tmp_path):
    (tmp_path / "new.fvd").write_text("precious")
    (tmp_path / "new.fvd").chmod(0o640)
    with pytest.raises(ImageExists):
        clone()
    assert (tmp_path / "new.fvd").read_text() == "precious"
    path, _ = clone(force=True)
    open_plan(path).close()
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(os.listdir(tmp_path)) == ["base.raw", "new.fvd"]


def test_failed_force_keeps_the_old_file(clone, tmp_path, monkeypatch):
    (tmp_path / "new.fvd").write_text("precious")

    def full(fd, offset, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(NoSpace):
        clone(force=True)
    assert (tmp_path / "new.fvd").read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["base.raw", "new.fvd"]


def test_file_too_large_for_its_store_leaves_nothing(clone, tmp_path, monkeypatch):
    def refuse(fd, length):
        raise OSError(27, "File too large")

    monkeypatch.setattr(os, "ftruncate", refuse)
    with pytest.raises(FileTooLarge):
        clone()
    assert os.listdir(tmp_path) == ["base.raw"]


def test_image_in_use_is_not_overwritten(clone):
    path, _ = clone()
    with open_plan(path, OpenOptions(read_only=True)), pytest.raises(ImageInUse):
        clone(force=True)


def test_base_is_not_overwritten(base):
    before = base.read_bytes()
    with pytest.raises(InvalidOption, match="is the base"):
        create_image(base, CreateOptions(base=str(base), force=True))
    assert base.read_bytes() == before


def test_base_of_the_base_is_not_overwritten(image, base):
    with pytest.raises(InvalidOption, match="or one of its bases"):
        create_image(base, CreateOptions(base=str(image), base_format="fvd", force=True))


def test_fvd_base_needs_its_format_said(image, tmp_path):
    with pytest.raises(AmbiguousBaseFormat, match="looks like an FVD image") as caught:
        create_image(tmp_path / "x.fvd", CreateOptions(base=str(image)))
    assert "--base-format fvd" in caught.value.hint
    raw = CreateOptions(base=str(image), base_format="raw")
    assert create_image(tmp_path / "x.fvd", raw).header.base_img_fmt == "raw"


def test_qcow2_base_needs_its_format_said(tmp_path):
    (tmp_path / "b.qcow2").write_bytes(b"QFI\xfb" + bytes(4092))
    with pytest.raises(AmbiguousBaseFormat, match="qcow2"):
        create_image(tmp_path / "x.fvd", CreateOptions(base=str(tmp_path / "b.qcow2")))


def test_empty_base_is_refused(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(BaseEmpty):
        create_image(tmp_path / "x.fvd", CreateOptions(base=str(tmp_path / "empty"), size=512))


def test_missing_base_is_refused(tmp_path):
    with pytest.raises(ImageNotFound, match="the base"):
        create_image(tmp_path / "x.fvd", CreateOptions(base=str(tmp_path / "none")))


def test_missing_directory_is_said_so(tmp_path):
    with pytest.raises(ImageNotFound, match="the directory"):
        create_image(tmp_path / "no/x.fvd", CreateOptions(size=512))


def test_base_elsewhere_needs_to_be_allowed(tmp_path, base):
    (tmp_path / "vm").mkdir()
    options = {"base": str(base), "journal_size": 65536}
    with pytest.raises(PathNotAllowed):
        create_image(tmp_path / "vm/x.fvd", CreateOptions(**options))
    assert os.listdir(tmp_path / "vm") == []
    allowed = CreateOptions(**options, allow_dirs=(str(tmp_path),))
    assert create_image(tmp_path / "vm/x.fvd", allowed).header.base_img == str(base)
    with pytest.raises(PathNotAllowed):
        open_plan(tmp_path / "vm/x.fvd")
    open_plan(tmp_path / "vm/x.fvd", OpenOptions(allow_dirs=(str(tmp_path),))).close()


def test_pair_can_be_moved_together(tmp_path, base, image):
    target = tmp_path / "elsewhere"
    target.mkdir()
    for path in (base, image):
        path.rename(target / path.name)
    open_plan(target / image.name).close()


def test_too_long_base_name_is_refused(tmp_path):
    deep = tmp_path / ("d" * 250) / ("e" * 250) / ("f" * 250) / ("g" * 250)
    deep.mkdir(parents=True)
    base = deep / ("b" * 100)
    base.write_bytes(b"x" * 512)
    with pytest.raises(InvalidOption, match="--base is longer than 1023 bytes"):
        create_image(tmp_path / "x.fvd", CreateOptions(base=str(base)))
    assert not (tmp_path / "x.fvd").exists()


def test_network_store_is_refused(clone, tmp_path, monkeypatch):
    real = stores.judge_store

    def judge(fd):
        name = os.readlink(f"/proc/self/fd/{fd}")
        return (stores.Verdict.REFUSED, "nfs4") if name.endswith(".fvd") else real(fd)

    monkeypatch.setattr(stores, "judge_store", judge)
    with pytest.raises(UnsupportedStore, match="nfs4"):
        clone()
    assert os.listdir(tmp_path) == ["base.raw"]


def test_header_comes_last_and_is_flushed(clone, monkeypatch):
    """Everything else is durable before the first byte of the magic is written."""
    events = []
    real_write, real_sync = os.pwrite, os.fsync

    def write(fd, data, offset):
        events.append(f"write {offset}")
        return real_write(fd, data, offset)

    def sync(fd):
        events.append("sync directory" if os.path.isdir(f"/proc/self/fd/{fd}") else "sync")
        real_sync(fd)

    monkeypatch.setattr(os, "pwrite", write)
    monkeypatch.setattr(os, "fsync", sync)
    clone()
    assert events == ["write 8192", "sync", "write 0", "sync", "sync directory"]


def test_zeroing_a_device_covers_metadata_and_what_no_bit_hides(base, tmp_path, monkeypatch):
    """Old content of a device must never be read: only blocks of the base stay as they are."""
    layout = geometry.choose_layout(geometry.Wanted(4 * MIB, MIB, None, 65536))
    disk = tmp_path / "disk"
    disk.write_bytes(b"\xee" * (layout.file_size + 8192))
    fd = os.open(disk, os.O_RDWR)
    try:  # a regular file knows no BLKZEROOUT, so the fallback writes zeros
        create._zero_device(fd, layout)
    finally:
        os.close(fd)
    data = disk.read_bytes()
    first_local = layout.data_offset + MIB
    assert data[16384 : layout.metadata_end].strip(b"\0") == b""
    assert data[layout.data_offset : first_local].strip(b"\xee") == b""
    assert data[first_local : layout.file_size].strip(b"\0") == b""
    assert data[layout.file_size :] == b"\xee" * 8192


@pytest.fixture
def loop_device(tmp_path):
    """A block device of 24 MiB full of somebody's old data."""
    backing = tmp_path / "backing"
    backing.write_bytes(b"\xee" * (24 * MIB))
    found = subprocess.run(
        ["losetup", "--find", "--show", str(backing)], capture_output=True, text=True, check=False
    )
    if found.returncode:
        pytest.skip(f"no loop device here: {found.stderr.strip()}")
    device = found.stdout.strip()
    yield device
    subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("losetup"), reason="needs root, losetup")
def test_image_on_a_device_shows_nothing_of_its_old_content(base, tmp_path, loop_device):
    options = CreateOptions(
        base=str(base), size=2 * MIB, journal_size=65536, allow_dirs=(str(tmp_path),)
    )
    with pytest.raises(ImageExists):
        create_image(loop_device, options)
    header = create_image(loop_device, replace(options, force=True)).header
    with open_plan(loop_device, OpenOptions(allow_dirs=(str(tmp_path),))) as plan:
        assert plan.header == header
        with pytest.raises(ImageInUse):
            open_plan(loop_device, OpenOptions(allow_dirs=(str(tmp_path),)))
        data = os.pread(plan.layers[0].fd, 24 * MIB, 0)
    assert data[16384 : header.journal_offset + header.journal_size].strip(b"\0") == b""
    local = header.data_offset + MIB
    assert data[local : local + MIB].strip(b"\0") == b""
    assert check_image(loop_device, OpenOptions(allow_dirs=(str(tmp_path),))).exit_status == 0
    too_large = replace(options, force=True, size=64 * MIB)
    with pytest.raises(InvalidOption, match="the device has 25165824"):
        create_image(loop_device, too_large)


def test_a_base_behind_a_uri_is_refused_as_such(tmp_path):
    with pytest.raises(InvalidOption, match="no remote bases"):
        create_image(tmp_path / "x.fvd", CreateOptions(base="https://example.org/golden.img"))
    assert not (tmp_path / "x.fvd").exists()


def test_a_missing_directory_is_named_before_the_base(tmp_path, base):
    with pytest.raises(ImageNotFound, match="the directory"):
        create_image(tmp_path / "none" / "x.fvd", CreateOptions(base=str(base)))


def test_an_image_smaller_than_its_base_is_warned_about(tmp_path, base):
    result = create_image(tmp_path / "x.fvd", CreateOptions(size=65536, base=str(base)))
    assert any("only the first 64" in warning for warning in result.warnings)
