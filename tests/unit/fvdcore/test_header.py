# SPDX-License-Identifier: Apache-2.0
"""Loading a header as Python packed it, refusing bad ones, and changing one sector at a time."""

import dataclasses
import errno
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvdengine.crc32c import crc32c
from fvdengine.header import FEATURES_SIZE, HEADER_FIELD_NAMES, Extension, Header

U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
LOW, HIGH = st.integers(0, 2**63), st.integers(2**63, 2**64 - 1)
FREE_FIELDS = {
    "journal_buf_size": st.integers(0, 4096), "chunk_size": U64,
    "journal_clean_buf_period": st.integers(0, 3_600_000),
    "storage_grow_unit": U64, "chunks_relocated": U32, "copy_on_read": U32,
    "max_outstanding_copy_on_read_data": U64, "need_zero_init": U32,
    "num_prefetch_slots": st.integers(1, 40),
    "prefetch_start_delay": st.integers(-(2**63), 2**63 - 1), "clean_shutdown": U32,
    "prefetch_read_throughput_measure_time": HIGH, "prefetch_write_throughput_measure_time": HIGH,
    "prefetch_min_read_throughput": LOW, "prefetch_min_write_throughput": LOW,
    "prefetch_max_read_throughput": HIGH, "prefetch_max_write_throughput": HIGH,
    "prefetch_throttle_time": U64, "stable_journal_epoch": st.integers(0, 2**62 - 1),
    "last_open_version": st.integers(2, 2**32 - 1),
    "add_storage_cmd": st.text("abc /-", max_size=1023),
    "base_img": st.text("abc/.", min_size=1, max_size=1023),
}  # fmt: skip
EXTENSIONS = st.builds(
    Extension, st.binary(min_size=16, max_size=16), st.binary(min_size=16, max_size=16),
    st.binary(min_size=16, max_size=16), U64, U64.map(lambda n: n | 1), U64,
    st.integers(0, 255), st.binary(min_size=32, max_size=32),
)  # fmt: skip


def store(probes, header, length=None):
    size = header.data_offset + header.virtual_disk_size if length is None else length
    return probes.storage.Storage(header.pack().ljust(size, b"\0")[:size])


def loaded(probes, header):
    storage = store(probes, header)
    engine = probes.layout.Header(storage)
    assert engine.load() == 0, engine.reason
    return storage, engine


@settings(max_examples=50)
@given(
    changes=st.fixed_dictionaries(FREE_FIELDS),
    extension=EXTENSIONS,
    blocks=st.integers(1, 40),
    sectors=st.integers(1, 16),
    journal=st.integers(0, 3),
)
def test_a_header_packed_by_python_is_read_the_same(
    probes, header_of, changes, extension, blocks, sectors, journal
):
    header = header_of(
        blocks=blocks, block_size=sectors * 512, journal_pages=journal, extension=extension,
        bytes_per_prefetch=sectors * 512 * 3, **changes,
    )  # fmt: skip
    _, engine = loaded(probes, header)
    packed = header.pack()
    assert engine.raw_fields() == packed[:7440]
    assert engine.raw_extension() == packed[7440:7560]
    for name, value in engine.numbers().items():
        assert value == getattr(header, name), name
    assert engine.trailers


def test_every_field_of_the_codec_is_compared(header_of, probes):
    """The bytes are compared whole above; here: that no number read through Cython is missing
    which the engine uses."""
    _, engine = loaded(probes, header_of())
    assert set(engine.numbers()) <= set(HEADER_FIELD_NAMES)


STORES = [
    ("clean", lambda h: h.store_clean(False), {"clean_shutdown": 0}, 4),
    ("epoch", lambda h: h.store_epoch(2**40 + 7), {"stable_journal_epoch": 2**40 + 7}, 4),
    ("prefetched", lambda h: h.store_prefetched(), {"base_img_fully_prefetched": 1}, 6),
]


@pytest.mark.parametrize(("call", "changes", "sector"), [row[1:] for row in STORES],
                         ids=[row[0] for row in STORES])  # fmt: skip
def test_a_field_is_stored_by_one_sector_write(probes, header_of, call, changes, sector):
    header = header_of()
    storage, engine = loaded(probes, header)
    before = storage.content()
    storage.forget()
    assert call(engine) == 0
    after = storage.content()
    assert storage.log() == [("write", sector * 512, 512, 0)]
    assert Header.unpack(after[:8192]) == dataclasses.replace(header, **changes)
    assert before[: sector * 512] == after[: sector * 512]
    assert before[(sector + 1) * 512 :] == after[(sector + 1) * 512 :]
    assert engine.bytes() == after[:8192]


def test_the_session_is_stored_in_sector_14_alone(probes, header_of):
    header = header_of()
    storage, engine = loaded(probes, header)
    storage.forget()
    boot = bytes(range(100, 116))
    assert engine.store_session(boot, False) == 0
    assert storage.log() == [("write", 14 * 512, 512, 0)]
    read = Header.unpack(storage.content()[:8192])
    assert read.extension.boot_id == boot
    assert read.extension.open_session != header.extension.open_session
    assert dataclasses.replace(read, extension=None) == dataclasses.replace(header, extension=None)
    first = read.extension.open_session
    assert engine.store_session(bytes(16), True) == 0
    again = Header.unpack(storage.content()[:8192]).extension
    assert (again.open_session, again.boot_id) == (first, bytes(16))
    assert again.image_uuid == header.extension.image_uuid


def test_two_sessions_differ(probes, header_of):
    storage, engine = loaded(probes, header_of())
    seen = set()
    for _ in range(3):
        engine.store_session(bytes(16), False)
        seen.add(Header.unpack(storage.content()[:8192]).extension.open_session)
    assert len(seen) == 3


def test_fields_of_a_longer_extension_survive_a_session(probes, header_of):
    """A newer version's fields behind ours are kept and stay covered by the sum."""
    header = header_of()
    longer = bytearray(header.pack()[7440:7560] + b"newer fields" * 2)
    struct.pack_into("<2I", longer, 0, len(longer), 0)
    struct.pack_into("<I", longer, 4, crc32c(bytes(longer)))
    packed = bytearray(header.pack().ljust(header.data_offset + header.virtual_disk_size, b"\0"))
    packed[7440 : 7440 + len(longer)] = longer
    storage = probes.storage.Storage(bytes(packed))
    engine = probes.layout.Header(storage)
    assert engine.load() == 0
    assert engine.store_session(b"b" * 16, False) == 0
    content = storage.content()
    assert content[7560 : 7440 + len(longer)] == b"newer fields" * 2
    read = Header.unpack(content[:8192])
    assert read.extension is not None
    assert read.extension.boot_id == b"b" * 16


@pytest.mark.parametrize(("version", "writes"), [(2, 0), (7, 0)])
def test_the_version_is_never_lowered(probes, header_of, version, writes):
    storage, engine = loaded(probes, header_of(last_open_version=version))
    storage.forget()
    assert engine.store_version() == 0
    assert len(storage.log()) == writes
    assert Header.unpack(storage.content()[:8192]).last_open_version == version


BAD = {
    "magic": ({"magic": 0x00445647}, "not an FVD image"),
    "small header_size": ({"header_size": 4096}, "header_size"),
    "odd header_size": ({"header_size": 8193}, "header_size"),
    "huge header_size": ({"header_size": 2 << 20}, "header_size"),
    "feature bit": (
        {"incompatible_features": bytes(FEATURES_SIZE - 1) + b"\x80"}, "incompatible"
    ),
    "no size": ({"virtual_disk_size": 0}, "virtual_disk_size"),
    "odd size": ({"virtual_disk_size": 64 * 4096 + 1}, "virtual_disk_size"),
    "size that overflows": ({"virtual_disk_size": 2**64 - 512}, "virtual_disk_size"),
    "data file": ({"data_file": "other"}, "data file"),
    "table without size": ({"table_offset": 4096}, "table_offset"),
    "table without place": ({"table_size": 4096}, "table_offset"),
    "table in the journal": ({"table_offset": 69632, "table_size": 4096}, "sections"),
    "table behind the end": ({"table_offset": 2**40, "table_size": 4096}, "sections"),
    "huge table": ({"table_offset": 73728, "table_size": 2**40}, "limit"),
    "small table": (
        {"table_offset": 73728, "table_size": 4096, "chunk_size": 4096,
         "virtual_disk_size": 1025 * 4096}, "table too small",
    ),
    "chunks of part of a block": (
        {"table_offset": 73728, "table_size": 4096, "chunk_size": 12288, "block_size": 8192,
         "bytes_per_prefetch": 8192}, "chunk_size",
    ),
    "chunks of nothing": (
        {"table_offset": 73728, "table_size": 4096, "chunk_size": 0}, "chunk_size"
    ),
    "no data": ({"data_offset": 0}, "data_offset"),
    "odd data_offset": ({"data_offset": 77825}, "data_offset"),
    "data in the journal": ({"data_offset": 73728}, "sections"),
    "data behind the end": ({"data_offset": 2**40}, "sections"),
    "base beyond the disk": ({"base_img_size": 65 * 4096}, "base_img_size"),
    "odd base size": ({"base_img_size": 4097}, "base_img_size"),
    "block size 0": ({"block_size": 0}, "block_size"),
    "odd block size": ({"block_size": 4097}, "block_size"),
    "huge block size": ({"block_size": 4 << 20, "bytes_per_prefetch": 4 << 20}, "block_size"),
    "no bitmap": ({"bitmap_offset": 0}, "bitmap"),
    "empty bitmap": ({"bitmap_size": 0}, "bitmap"),
    "bitmap in the header": ({"bitmap_offset": 4096}, "sections"),
    "bitmap in the journal": ({"bitmap_size": 8192}, "sections"),
    "bitmap wraps": ({"bitmap_offset": 2**64 - 4096}, "sections"),
    "odd bitmap_size": ({"bitmap_size": 4097}, "sections"),
    "journal in the bitmap": ({"journal_offset": 8192}, "sections"),
    "journal wraps": ({"journal_offset": 12288, "journal_size": 2**64 - 4096}, "journal_size"),
    "odd journal_size": ({"journal_size": 4095}, "journal_size"),
    "prefetch of part of a block": ({"bytes_per_prefetch": 6144}, "bytes_per_prefetch"),
    "prefetch of nothing": ({"bytes_per_prefetch": 0}, "bytes_per_prefetch"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_header_is_refused_and_nothing_written(probes, header_of, name):
    changes, words = BAD[name]
    good = header_of()
    storage = store(probes, dataclasses.replace(good, **changes), 77824 + 64 * 4096)
    engine = probes.layout.Header(storage)
    assert engine.load() == -errno.EUCLEAN
    assert words in engine.reason
    assert storage.log() == []


def test_a_bitmap_too_small_for_the_base_is_refused(probes, header_of):
    """One page of bits covers 32768 blocks and not one more."""
    good = header_of(blocks=32769, block_size=512, journal_pages=0, bytes_per_prefetch=512)
    bad = dataclasses.replace(good, bitmap_size=4096)
    engine = probes.layout.Header(store(probes, bad))
    assert engine.load() == -errno.EUCLEAN
    assert "bitmap too small" in engine.reason
    assert probes.layout.Header(store(probes, good)).load() == 0


@pytest.mark.parametrize("length", [0, 511, 8191])
def test_a_file_shorter_than_a_header_is_refused(probes, header_of, length):
    engine = probes.layout.Header(store(probes, header_of(), length))
    assert engine.load() == -errno.EUCLEAN
    assert "shorter" in engine.reason


@pytest.mark.parametrize("at", [7440, 7444, 7448, 7500, 7559])
def test_a_damaged_extension_does_not_count(probes, header_of, at):
    header = header_of()
    packed = bytearray(header.pack().ljust(header.data_offset + header.virtual_disk_size, b"\0"))
    packed[at] ^= 1
    engine = probes.layout.Header(probes.storage.Storage(bytes(packed)))
    assert engine.load() == 0
    assert not engine.trusted
    assert not engine.trailers


@pytest.mark.parametrize("wrong", [
    {"extension": None}, {"last_open_version": 1}, {"create_version": 5, "last_open_version": 4},
])  # fmt: skip
def test_an_older_writer_leaves_an_extension_that_does_not_count(probes, header_of, wrong):
    engine = probes.layout.Header(store(probes, dataclasses.replace(header_of(), **wrong)))
    assert engine.load() == 0
    assert not engine.trusted


def test_a_read_error_is_passed_on(probes, header_of):
    storage = store(probes, header_of())
    storage.fail("read", errno.EIO)
    assert probes.layout.Header(storage).load() == -errno.EIO
