# SPDX-License-Identifier: Apache-2.0
"""The header codec: published offsets, round trips, and what is refused before anything else."""

import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvdengine import header as codec
from fvdengine.errors import (
    EarlyCodeLayout,
    ImageTruncated,
    InvalidHeader,
    NotAnImage,
    OldLayout,
    UnknownFeature,
)
from fvdengine.header import Extension, Header

# Offset and width of every field, from the public header structure.
OFFSETS = {
    "magic": (0, 4), "header_size": (4, 4), "create_version": (8, 4), "last_open_version": (12, 4),
    "virtual_disk_size": (16, 8), "data_offset": (24, 8), "data_file": (32, 1024),
    "data_file_fmt": (1056, 16), "base_img": (1072, 1024), "base_img_fmt": (2096, 16),
    "base_img_size": (2112, 8), "bitmap_offset": (2120, 8), "bitmap_size": (2128, 8),
    "block_size": (2136, 8), "journal_offset": (2144, 8), "journal_size": (2152, 8),
    "clean_shutdown": (2160, 4), "stable_journal_epoch": (2164, 8), "journal_buf_size": (2172, 8),
    "journal_clean_buf_period": (2180, 8), "table_offset": (2188, 8), "table_size": (2196, 8),
    "chunk_size": (2204, 8), "storage_grow_unit": (2212, 8), "add_storage_cmd": (2220, 1024),
    "chunks_relocated": (3244, 4), "copy_on_read": (3248, 4),
    "max_outstanding_copy_on_read_data": (3252, 8), "prefetch_start_delay": (3260, 8),
    "base_img_fully_prefetched": (3268, 4), "num_prefetch_slots": (3272, 4),
    "bytes_per_prefetch": (3276, 8), "prefetch_read_throughput_measure_time": (3284, 8),
    "prefetch_write_throughput_measure_time": (3292, 8), "prefetch_min_read_throughput": (3300, 8),
    "prefetch_min_write_throughput": (3308, 8), "prefetch_max_read_throughput": (3316, 8),
    "prefetch_max_write_throughput": (3324, 8), "prefetch_throttle_time": (3332, 8),
    "need_zero_init": (3340, 4), "incompatible_features": (3344, 4096),
}  # fmt: skip
EXTENSION_OFFSETS = {
    "image_uuid": (7448, 16), "open_session": (7464, 16), "boot_id": (7480, 16),
    "create_time": (7496, 8), "compatible_features": (7504, 8), "base_length": (7512, 8),
    "base_kind": (7520, 1), "base_id": (7528, 32),
}  # fmt: skip
FIXED = {"magic": codec.MAGIC, "header_size": 16384, "incompatible_features": bytes(4096)}


def names(size):
    text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
    return text.filter(lambda name: len(name.encode()) < size)


def value_of(name, width):
    if name in FIXED:
        return st.just(FIXED[name])
    if width in (1024, 16):
        return names(width)
    if name == "prefetch_start_delay":
        return st.integers(-(1 << 63), (1 << 63) - 1)
    return st.integers(0, (1 << width * 8) - 1)


extensions = st.builds(
    Extension,
    **{
        name: st.binary(min_size=width, max_size=width)
        if name in ("image_uuid", "open_session", "boot_id", "base_id")
        else st.integers(0, (1 << width * 8) - 1)
        for name, (_, width) in EXTENSION_OFFSETS.items()
    },
)
headers = st.builds(
    Header,
    **{name: value_of(name, width) for name, (_, width) in OFFSETS.items()},
    extension=extensions,
)


@given(headers)
def test_header_survives_packing(header):
    packed = header.pack()
    assert len(packed) == 8192
    assert Header.unpack(packed) == header
    assert Header.unpack(packed).pack() == packed


@given(headers)
def test_every_field_stands_at_its_published_place(header):
    packed = header.pack()
    for name, (offset, width) in OFFSETS.items():
        value = getattr(header, name)
        raw = packed[offset : offset + width]
        if isinstance(value, str):
            assert raw == value.encode().ljust(width, b"\0"), name
        elif isinstance(value, bytes):
            assert raw == value, name
        else:
            signed = name == "prefetch_start_delay"
            assert int.from_bytes(raw, "little", signed=signed) == value, name
    for name, (offset, width) in EXTENSION_OFFSETS.items():
        value = getattr(header.extension, name)
        expected = value if isinstance(value, bytes) else value.to_bytes(width, "little")
        assert packed[offset : offset + width] == expected, name


def test_no_scalar_leaves_its_sector():
    for offset, width in [*OFFSETS.values(), *EXTENSION_OFFSETS.values()]:
        if width <= 8:
            assert offset // 512 == (offset + width - 1) // 512
    assert codec.EXTENSION_OFFSET // 512 == (codec.EXTENSION_OFFSET + 119) // 512 == 14


def test_there_are_41_fields_in_order():
    assert tuple(OFFSETS) == codec.HEADER_FIELD_NAMES


@given(st.binary(max_size=9000))
def test_junk_is_refused_by_name(data):
    with pytest.raises(NotAnImage):
        Header.unpack(data)


def test_short_file_with_the_magic_is_truncated(header):
    with pytest.raises(ImageTruncated):
        Header.unpack(header.pack()[:8191])


@pytest.mark.parametrize("size", [0, 1, 2, 4095])
def test_small_header_size_is_the_older_layout(header, size):
    with pytest.raises(OldLayout, match="older"):
        Header.unpack(replace(header, header_size=size).pack())


def test_layout_of_the_early_code_is_refused_by_name():
    """The code of January 2011 wrote another magic, then a version, then 64-bit fields."""
    data = struct.pack("<IIIQQ", 0x5143F5A9, 1, 1, 1 << 30, 8192).ljust(8192, b"\0")
    assert data[:4] == bytes.fromhex("a9f54351")
    with pytest.raises(EarlyCodeLayout, match="January 2011"):
        Header.unpack(data)


@pytest.mark.parametrize("size", [4096, 8193, 12287, (1 << 20) + 4096, 0xFFFFF000])
def test_wrong_header_size_is_refused(header, size):
    with pytest.raises(InvalidHeader, match="header_size"):
        Header.unpack(replace(header, header_size=size).pack())


@pytest.mark.parametrize(("bit", "text"), [(0, "bit 0 "), (13, "bit 13 "), (32767, "bit 32767 ")])
def test_unknown_feature_is_named(header, bit, text):
    features = (1 << bit).to_bytes(4096, "little")
    with pytest.raises(UnknownFeature, match=text):
        Header.unpack(replace(header, incompatible_features=features).pack())


def test_many_unknown_features_make_a_short_message(header):
    with pytest.raises(UnknownFeature, match=r"bit 0, 1, 2, 3, \.\.\. is set"):
        Header.unpack(replace(header, incompatible_features=b"\xff" * 4096).pack())


@pytest.mark.parametrize("name", ["data_file", "data_file_fmt", "base_img", "base_img_fmt"])
def test_name_without_end_is_refused(header, name):
    offset, width = OFFSETS[name]
    packed = bytearray(header.pack())
    packed[offset : offset + width] = b"x" * width
    with pytest.raises(InvalidHeader, match="not NUL-terminated"):
        Header.unpack(bytes(packed))


def test_features_are_judged_before_names(header):
    packed = bytearray(replace(header, incompatible_features=b"\1" + bytes(4095)).pack())
    packed[32:1056] = b"x" * 1024
    with pytest.raises(UnknownFeature):
        Header.unpack(bytes(packed))


@given(extensions, st.integers(0, 119), st.integers(1, 255))
def test_any_changed_byte_of_the_extension_is_noticed(extension, position, flip):
    packed = bytearray(extension.pack())
    packed[position] ^= flip
    found = Extension.unpack(bytes(packed).ljust(752, b"\0"))
    # Bytes of padding are covered by the sum as well.
    assert found is None


def test_longer_extension_of_a_newer_version_is_read_as_far_as_known(header):
    body = bytearray(header.extension.pack().ljust(160, b"\7"))
    struct.pack_into("<2I", body, 0, 160, 0)
    struct.pack_into("<I", body, 4, codec.crc32c(bytes(body)))
    assert Extension.unpack(bytes(body).ljust(752, b"\0")) == header.extension


@pytest.mark.parametrize("size", [0, 119, 241, 1 << 31])
def test_extension_of_a_wrong_size_is_not_trusted(header, size):
    body = bytearray(header.extension.pack().ljust(752, b"\0"))
    struct.pack_into("<I", body, 0, size)
    assert Extension.unpack(bytes(body)) is None


@pytest.mark.parametrize(
    ("versions", "trusted"), [((2, 2), True), ((2, 1), False), ((3, 2), False), ((1, 2), True)]
)
def test_extension_is_trusted_only_if_no_older_writer_was_here(header, versions, trusted):
    created, opened = versions
    found = replace(header, create_version=created, last_open_version=opened)
    assert (found.trusted_extension is not None) is trusted
    assert found.has_journal_trailers is trusted


def test_too_long_name_is_refused_when_packing(header):
    with pytest.raises(InvalidHeader, match="longer than 1023 bytes"):
        replace(header, base_img="x" * 1024).pack()
