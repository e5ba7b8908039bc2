# SPDX-License-Identifier: Apache-2.0
"""Create: the defaults of the format, the order of writes, and that a failure leaves no trace."""

import os
import random
import struct
from pathlib import Path

import pytest

from fvdengine import stores
from fvdengine.check import check_image
from fvdengine.content import load_content
from fvdengine.create import create_image
from fvdengine.errors import (
    AmbiguousBaseFormat,
    BaseEmpty,
    EngineError,
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
from fvdengine.update import KEYS

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
        "stable_journal_epoch": 1, "journal_buf_size": 4 << 20, "journal_clean_buf_period": 5000,
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


def test_image_like_another_is_run_as_that(tmp_path, image, base):
    options = CreateOptions(
        base=str(base), base_format="raw", block_size=4096, copy_on_read=True, compact=True,
        chunk_size=1 << 20, storage_grow_unit=64 << 20, journal_size=8 << 20,
        journal_buffer=8 << 20, journal_period_ms=777, max_outstanding_copy_on_read=8192,
        prefetch_delay_seconds=7, prefetch_slots=64, bytes_per_prefetch=(4 << 20) - 4096,
        prefetch_read_measure_ms=1, prefetch_write_measure_ms=2, prefetch_min_read_kb=3,
        prefetch_min_write_kb=4, prefetch_max_read_kb=5, prefetch_max_write_kb=6,
        prefetch_throttle_ms=8,
    )  # fmt: skip
    other = create_image(tmp_path / "other.fvd", options).header
    again = CreateOptions(
        base=str(base), base_format="raw", block_size=2 << 20, journal_size=64 << 10, like=other
    )
    header = create_image(tmp_path / "new.fvd", again).header
    assert header.block_size == 2 << 20
    fits = {
        "journal_buf_size": 64 << 10, "max_outstanding_copy_on_read_data": 4 << 20,
        "bytes_per_prefetch": 4 << 20,
    }  # fmt: skip
    for name in KEYS:
        if name not in ("base_img", "base_img_fmt"):
            assert getattr(header, name) == fits.get(name, getattr(other, name)), name


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
    ({"journal_size": 4096}, InvalidOption, "--journal-size must be 0 or from 64k"),
    ({"journal_size": -1}, InvalidOption, "--journal-size must be 0 or from 64k"),
    ({"chunk_size": MIB}, InvalidOption, "--chunk-size needs --compact"),
    ({"storage_grow_unit": MIB}, InvalidOption, "--storage-grow-unit needs --compact"),
    ({"compact": True, "chunk_size": 5000}, InvalidOption, "--chunk-size must be a multiple"),
    ({"compact": True, "chunk_size": 0}, InvalidOption, "--chunk-size must be"),
    ({"compact": True, "chunk_size": 2 << 30}, InvalidOption, "--chunk-size must be"),
    ({"compact": True, "chunk_size": 12288, "block_size": 8192}, InvalidOption, "block size, 8k"),
    ({"compact": True, "storage_grow_unit": 4096}, InvalidOption, "--storage-grow-unit is below"),
    ({"compact": True, "storage_grow_unit": 0}, InvalidOption, "--storage-grow-unit must be"),
    ({"compact": True, "size": 1 << 50}, InvalidOption, "needs a table of 4G for chunks of 1M"),
    ({"add_storage_cmd": "x" * 1024}, InvalidOption, "--add-storage-cmd is longer than 1023"),
    ({"add_storage_cmd": "a\0b"}, InvalidOption, "--add-storage-cmd holds a NUL"),
    ({"data_file": ""}, InvalidOption, "--data-file is empty"),
    ({"data_file": "nbd://h/x"}, InvalidOption, "needs --data-file-format nbd"),
    ({"data_file": "x", "data_file_format": "nbd"}, InvalidOption, "URI of an NBD server"),
    ({"data_file": "x", "data_file_format": "qcow2"}, InvalidOption, "--data-file-format must be"),
    ({"data_file_format": "raw"}, InvalidOption, "--data-file-format needs --data-file"),
    ({"data_file": "/etc/x.data"}, PathNotAllowed, "/etc/x.data, named as data file"),
    ({"detect_holes": 0}, InvalidOption, "--detect-holes must be"),
    ({"detect_holes": -4096}, InvalidOption, "--detect-holes must be"),
    ({"journal_buffer": 1 << 30}, InvalidOption, "--journal-buffer is larger"),
    ({"journal_period_ms": -1}, InvalidOption, "--journal-period"),
    ({"journal_period_ms": 1 << 70}, InvalidOption, "--journal-period"),
    ({"prefetch_slots": 0}, InvalidOption, "--prefetch-slots is 0"),
    ({"prefetch_slots": 1 << 40}, InvalidOption, "--prefetch-slots"),
    ({"bytes_per_prefetch": 5000}, InvalidOption, "--bytes-per-prefetch"),
    ({"prefetch_max_read_kb": 1}, InvalidOption, "--prefetch-max-read is below"),
    ({"prefetch_delay_seconds": 1 << 40}, InvalidOption, "--prefetch-delay"),
    ({"prefetch_read_measure_ms": 0}, InvalidOption, "--prefetch-read-measure-time is 0"),
    ({"base_format": "vhd"}, InvalidOption, "--base-format"),
]


@pytest.mark.parametrize(("options", "error", "text"), BAD, ids=lambda v: str(v)[:50])
def test_bad_option_is_named_and_nothing_is_made(clone, tmp_path, options, error, text):
    with pytest.raises(error, match=text):
        clone(**options)
    assert os.listdir(tmp_path) == ["base.raw"]


def test_size_is_needed_without_a_base(tmp_path):
    with pytest.raises(InvalidOption, match="the size is missing"):
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


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"chunk_size": MIB}, "Add --compact, or leave --chunk-size out."),
        ({"detect_holes": 512}, "Add --base, or leave --detect-holes out."),
        ({"data_file": "nbd://h/"}, "Add --data-file-format nbd, or name a file."),
        ({"data_file": "d", "data_file_format": "qcow2"}, "through a server: give nbd"),
        ({"base": "gs://bucket/key"}, "Write it like nbd://"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_hint_fits_what_is_lacking(tmp_path, options, hint):
    with pytest.raises(EngineError) as caught:
        create_image(tmp_path / "x.fvd", CreateOptions(size=MIB, **options))
    assert hint in caught.value.hint
    assert os.listdir(tmp_path) == []


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


# Compact images ----------------------------------------------------------------------------


def test_compact_image_has_a_table_and_no_chunk(clone):
    path, header = clone(compact=True)
    expected = {
        "bitmap_offset": 16384, "journal_offset": 20480, "journal_size": 16 * MIB,
        "table_offset": 20480 + 16 * MIB, "table_size": 4096, "chunk_size": MIB,
        "data_offset": 17 * MIB, "storage_grow_unit": 100 * MIB, "need_zero_init": 0,
    }  # fmt: skip
    assert {name: getattr(header, name) for name in expected} == expected
    data = path.read_bytes()
    assert len(data) == header.data_offset
    assert data[header.table_offset :][:4096] == b"\xff" * 4096
    assert data[header.table_offset + 4096 :].strip(b"\0") == b""
    assert check_image(path).findings == []


def test_compact_options_arrive_in_the_header(clone):
    header = clone(
        compact=True, chunk_size=12288, storage_grow_unit=24576, add_storage_cmd="rm -rf /; true",
        journal_size=65536,
    )[1]  # fmt: skip
    assert (header.chunk_size, header.storage_grow_unit) == (12288, 24576)
    assert (header.add_storage_cmd, header.journal_size) == ("rm -rf /; true", 65536)


def test_large_blocks_make_large_chunks(clone):
    header = clone(compact=True, block_size=2 * MIB)[1]
    assert header.chunk_size == 2 * MIB


def test_compact_image_without_a_base_has_a_journal(tmp_path):
    options = CreateOptions(size=10 * MIB, compact=True)
    header = create_image(tmp_path / "c.fvd", options).header
    assert (header.bitmap_size, header.journal_size) == (0, 16 * MIB)
    assert header.base_img_fully_prefetched == 1


def test_journal_can_be_left_out_with_a_word_of_warning(tmp_path, base):
    options = CreateOptions(base=str(base), journal_size=0)
    result = create_image(tmp_path / "c.fvd", options)
    assert (result.header.journal_offset, result.header.journal_buf_size) == (0, 0)
    assert any("slow" in warning for warning in result.warnings)
    open_plan(tmp_path / "c.fvd").close()


def test_stored_command_is_said_to_be_never_run(clone, tmp_path, base):
    options = CreateOptions(base=str(base), add_storage_cmd="builtin:lvextend")
    assert any("never run" in text for text in create_image(tmp_path / "c", options).warnings)


@pytest.mark.parametrize(("size", "chunk"), [(16 << 40, MIB), (64 << 40, 16 * MIB)])
def test_huge_compact_image_costs_its_metadata(size, chunk):
    path = Path("/dev/shm") / f"fvd-test-{os.getpid()}.fvd"
    try:
        options = CreateOptions(size=size, compact=True, chunk_size=chunk, journal_size=65536)
        header = create_image(path, options).header
        assert header.table_size == size // chunk * 4
        assert path.stat().st_size == header.data_offset
        assert check_image(path).findings == []
        assert path.stat().st_blocks * 512 < header.table_size + (1 << 20)
    finally:
        path.unlink(missing_ok=True)


def test_hint_names_a_chunk_size_that_fits(tmp_path):
    with pytest.raises(InvalidOption) as caught:
        create_image(tmp_path / "c", CreateOptions(size=1 << 50, compact=True))
    assert caught.value.hint == "Give --chunk-size 4M or more."
    assert os.listdir(tmp_path) == []


# Data files --------------------------------------------------------------------------------


def test_data_file_is_a_sparse_file_of_the_size_of_the_disk(clone, tmp_path):
    path, header = clone(data_file=str(tmp_path / "new.data"), size=4 * MIB)
    assert (header.data_file, header.data_file_fmt, header.data_offset) == ("new.data", "raw", 0)
    assert path.stat().st_size == header.journal_offset + header.journal_size
    status = (tmp_path / "new.data").stat()
    assert (status.st_size, status.st_blocks) == (4 * MIB, 0)
    open_plan(path).close()


def test_compact_data_file_begins_empty(clone, tmp_path):
    (tmp_path / "new.data").touch()
    path, header = clone(data_file=str(tmp_path / "new.data"), compact=True)
    assert (tmp_path / "new.data").stat().st_size == 0
    assert path.stat().st_size == header.table_offset + header.table_size
    open_plan(path).close()


def test_used_data_file_is_refused_and_kept(clone, tmp_path):
    (tmp_path / "new.data").write_text("precious")
    with pytest.raises(ImageExists, match="the data file"):
        clone(data_file=str(tmp_path / "new.data"), force=True)
    assert (tmp_path / "new.data").read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["base.raw", "new.data"]


@pytest.mark.parametrize(
    ("name", "text"), [("new.fvd", "the image itself"), ("base.raw", "is the base")]
)
def test_data_file_must_be_a_file_of_its_own(clone, tmp_path, base, name, text):
    before = base.read_bytes()
    with pytest.raises(InvalidOption, match=text):
        clone(data_file=str(tmp_path / name))
    assert base.read_bytes() == before
    assert os.listdir(tmp_path) == ["base.raw"]


def test_data_file_of_another_image_in_use_is_refused(clone, tmp_path):
    path, _ = clone(data_file=str(tmp_path / "new.data"), compact=True)
    with open_plan(path), pytest.raises(ImageInUse, match=r"new\.data"):
        create_image(
            tmp_path / "other.fvd",
            CreateOptions(size=MIB, compact=True, data_file=str(tmp_path / "new.data")),
        )


@pytest.mark.parametrize("existing", [True, False])
def test_failure_removes_a_new_data_file_and_empties_an_old_one(
    clone, tmp_path, monkeypatch, existing
):
    if existing:
        (tmp_path / "new.data").touch()

    def full(fd, offset, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(NoSpace):
        clone(data_file=str(tmp_path / "new.data"))
    assert sorted(os.listdir(tmp_path)) == ["base.raw", "new.data"][: 1 + existing]
    if existing:
        assert (tmp_path / "new.data").stat().st_size == 0


def test_data_file_is_durable_before_the_header(clone, tmp_path, monkeypatch):
    events = []
    real_write, real_sync = os.pwrite, os.fsync

    def write(fd, data, offset):
        events.append(f"write {offset}")
        return real_write(fd, data, offset)

    def sync(fd):
        events.append("sync " + os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        real_sync(fd)

    monkeypatch.setattr(os, "pwrite", write)
    monkeypatch.setattr(os, "fsync", sync)
    clone(data_file=str(tmp_path / "new.data"))
    directory = f"sync {tmp_path.name}"
    assert events == [
        "sync new.data", directory, "write 8192", "sync new.fvd", "write 0", "sync new.fvd",
        directory,
    ]  # fmt: skip


# Holes -------------------------------------------------------------------------------------


@pytest.fixture
def holey(tmp_path):
    """A base of 256 blocks: data, zeros with storage, a hole, data, and zeros to its end."""
    content = bytearray(random.Random(3).randbytes(MIB))
    for first, end in ((10, 20), (40, 100), (200, 256)):
        content[first * 4096 : end * 4096] = bytes((end - first) * 4096)
    path = tmp_path / "holey.raw"
    with path.open("wb") as file:
        file.write(content[: 50 * 4096])
        file.seek(90 * 4096)  # what lies between is a hole
        file.write(content[90 * 4096 :])
    return path


@pytest.mark.parametrize("compact", [False, True])
def test_zeros_of_the_base_become_local(holey, tmp_path, compact):
    result = create_image(
        tmp_path / "c.fvd", CreateOptions(base=str(holey), detect_holes=65536, compact=compact)
    )
    assert result.hole_bytes == (60 + 56) * 4096
    assert result.header.need_zero_init == int(not compact)
    with open_plan(tmp_path / "c.fvd", OpenOptions(read_only=True)) as plan:
        content = load_content(plan.layers)
        assert content.read(0, MIB) == holey.read_bytes()
        local = [(p.start, p.end) for p in content.pieces(0, MIB) if p.depth == 0]
    assert sum(end - start for start, end in local) == result.hole_bytes
    assert check_image(tmp_path / "c.fvd").findings == []


def test_base_without_zeros_needs_no_zeroed_store(base, tmp_path):
    result = create_image(tmp_path / "c.fvd", CreateOptions(base=str(base), detect_holes=4096))
    assert (result.hole_bytes, result.header.need_zero_init) == (0, 0)


def test_unreadable_base_leaves_nothing(holey, tmp_path, monkeypatch):
    def broken(fd, length, offset):
        if length > 4096:
            raise OSError(5, "Input/output error")
        return b"xxxx"

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(EngineError, match="holey.raw"):
        create_image(tmp_path / "c.fvd", CreateOptions(base=str(holey), detect_holes=4096))
    assert os.listdir(tmp_path) == ["holey.raw"]
