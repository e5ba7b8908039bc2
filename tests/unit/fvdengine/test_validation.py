# SPDX-License-Identifier: Apache-2.0
"""Each rule on opening, broken one at a time; random headers never lead outside the file."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fvdengine import geometry
from fvdengine.errors import (
    EngineError,
    ImageTruncated,
    InvalidHeader,
    InvalidSections,
    UnknownBaseFormat,
    UnknownDataFormat,
)
from fvdengine.validation import validate_header

BAD = [
    ({"virtual_disk_size": 0}, InvalidHeader, "virtual_disk_size is 0"),
    ({"virtual_disk_size": 1000}, InvalidHeader, "not a multiple of 512"),
    ({"virtual_disk_size": (1 << 63) - 512}, InvalidHeader, "too large"),
    ({"block_size": 0}, InvalidHeader, "block_size"),
    ({"block_size": 1000}, InvalidHeader, "block_size"),
    ({"block_size": 1 << 32}, InvalidHeader, "block_size"),
    ({"base_img_size": 0}, InvalidHeader, "base_img_size is 0"),
    ({"base_img": ""}, InvalidHeader, "no base is named"),
    ({"base_img": "", "base_img_size": 0}, InvalidHeader, "bitmap_size"),
    ({"base_img_size": 1000}, InvalidHeader, "base_img_size"),
    ({"base_img_size": 1 << 30}, InvalidHeader, "larger than the virtual disk"),
    ({"base_img_fmt": "parallels"}, UnknownBaseFormat, "parallels"),
    ({"bitmap_offset": 0}, InvalidHeader, "bitmap_offset"),
    ({"bitmap_size": 0}, InvalidHeader, "bitmap_size"),
    ({"bitmap_size": 5000}, InvalidHeader, "multiple of 4096"),
    ({"bitmap_size": 2 << 30}, InvalidHeader, "memory limit"),
    ({"journal_offset": 0}, InvalidHeader, "journal_offset"),
    ({"journal_size": 5000}, InvalidHeader, "journal_size"),
    ({"journal_size": 2 << 30}, InvalidHeader, "journal_size"),
    ({"journal_buf_size": 1 << 30}, InvalidHeader, "journal_buf_size"),
    ({"journal_clean_buf_period": 1 << 40}, InvalidHeader, "one hour"),
    ({"stable_journal_epoch": 2**62 + 1}, InvalidHeader, "stable_journal_epoch"),
    ({"num_prefetch_slots": 0}, InvalidHeader, "num_prefetch_slots"),
    ({"num_prefetch_slots": 65}, InvalidHeader, "num_prefetch_slots"),
    ({"bytes_per_prefetch": 0}, InvalidHeader, "bytes_per_prefetch"),
    ({"bytes_per_prefetch": 5000}, InvalidHeader, "multiple of block_size"),
    ({"bytes_per_prefetch": 1 << 30}, InvalidHeader, "256 MiB"),
    ({"prefetch_start_delay": 1 << 40}, InvalidHeader, "ten years"),
    ({"prefetch_read_throughput_measure_time": 0}, InvalidHeader, "measure_time is 0"),
    ({"prefetch_max_write_throughput": 1}, InvalidHeader, "is below"),
    ({"table_offset": 4096}, InvalidHeader, "table_size are not both set"),
    ({"table_size": 4096}, InvalidHeader, "table_size are not both set"),
    ({"data_file": "x.data"}, InvalidHeader, "data_offset is 1048576 though the data lie in"),
    ({"data_file_fmt": "qcow2"}, UnknownDataFormat, "qcow2"),
    ({"data_file_fmt": "nbd"}, InvalidHeader, "is nbd though no data_file is named"),
    ({"bitmap_offset": 16385}, InvalidSections, "not a multiple of 4096"),
    ({"bitmap_offset": 8192}, InvalidSections, "overlaps the header"),
    ({"journal_offset": 16384}, InvalidSections, "overlaps"),
    ({"data_offset": 0}, InvalidSections, "overlaps the header"),
    ({"data_offset": 16384}, InvalidSections, "overlaps"),
    ({"journal_offset": 1 << 40}, InvalidSections, "outside the file"),
    ({"bitmap_offset": (1 << 64) - 4096}, InvalidSections, "outside the file"),
    ({"data_offset": 1 << 30}, ImageTruncated, "cut short"),
]


# The same for a compact header: bitmap at 16384, journal, table of a page, data at 1 MiB.
BAD_COMPACT = [
    ({"chunk_size": 0}, InvalidHeader, "chunk_size is 0"),
    ({"chunk_size": 10000}, InvalidHeader, "chunk_size is 10000"),
    ({"chunk_size": (1 << 64) - 4096}, InvalidHeader, "chunk_size"),
    ({"chunk_size": 12288, "block_size": 8192}, InvalidHeader, "not a multiple of block_size"),
    ({"table_offset": 0}, InvalidHeader, "table_size are not both set"),
    ({"table_size": 5000}, InvalidHeader, "table_size is not a multiple of 4096"),
    ({"table_size": 4096, "virtual_disk_size": 1025 << 20}, InvalidHeader, "table_size is 4096"),
    ({"table_size": 1 << 30}, InvalidHeader, "memory limit"),
    ({"virtual_disk_size": 1 << 62}, InvalidHeader, "fewer bytes than the"),
    ({"storage_grow_unit": 4096}, InvalidHeader, "storage_grow_unit is below"),
    ({"data_offset": (1 << 63) - 4096}, InvalidHeader, "too large for its data_offset"),
    ({"data_offset": (1 << 20) + 512}, InvalidSections, "data area begins at 1049088"),
    ({"data_offset": 16384}, InvalidSections, "data area at 16384 overlaps the bitmap"),
    ({"data_offset": 20480}, InvalidSections, "overlaps the journal"),
    ({"data_offset": 0}, InvalidSections, "overlaps the header"),
    ({"table_offset": 4096}, InvalidSections, "overlaps the header"),
    ({"table_offset": 16384}, InvalidSections, "overlaps the bitmap"),
    ({"table_offset": 20480}, InvalidSections, "overlaps"),
    ({"table_offset": 86016 + 512}, InvalidSections, "table begins at"),
    ({"table_offset": 1 << 40}, InvalidSections, "table at 1099511627776 lies outside the file"),
    ({"table_offset": (1 << 64) - 4096}, InvalidSections, "outside the file"),
    ({"data_file": "d"}, InvalidHeader, "data_offset is 1048576"),
]


@pytest.fixture
def compact(header):
    """A compact header over a base."""
    return replace(header, table_offset=86016, table_size=4096, chunk_size=65536)


@pytest.mark.parametrize(("values", "error", "text"), BAD_COMPACT, ids=lambda v: str(v)[:60])
def test_broken_rule_of_a_compact_image_is_named(compact, values, error, text):
    with pytest.raises(error, match=text):
        validate_header(replace(compact, **values), "x.fvd", 1 << 20)


def test_good_compact_headers_pass(compact):
    validate_header(compact, "x.fvd", 90112)
    validate_header(replace(compact, table_size=2 << 20), "x.fvd", 3 << 20)
    validate_header(replace(compact, table_offset=5 << 20), "x.fvd", 6 << 20)
    separate = {"data_file": "d", "data_offset": 0}
    validate_header(replace(compact, **separate), "x.fvd", 90112)
    validate_header(
        replace(compact, data_offset=0, data_file="nbd://h/d", data_file_fmt="nbd"), "x", 90112
    )
    with pytest.raises(ImageTruncated):
        validate_header(compact, "x.fvd", 90111)


def test_good_header_with_a_data_file_passes(header):
    separate = replace(header, data_file="d", data_file_fmt="raw", data_offset=0)
    validate_header(separate, "x.fvd", header.journal_offset + header.journal_size)


def test_chunk_size_means_nothing_without_a_table(header, image):
    values = {"chunk_size": 0, "storage_grow_unit": 0}
    validate_header(replace(header, **values), "x.fvd", image.stat().st_size)


@pytest.mark.parametrize(("values", "error", "text"), BAD, ids=lambda v: str(v)[:60])
def test_broken_rule_is_named(header, image, values, error, text):
    with pytest.raises(error, match=text):
        validate_header(replace(header, **values), "x.fvd", image.stat().st_size)


def test_good_header_passes(header, image):
    validate_header(header, "x.fvd", image.stat().st_size)


def test_one_missing_byte_is_noticed(header, image):
    with pytest.raises(ImageTruncated):
        validate_header(header, "x.fvd", image.stat().st_size - 1)


def test_section_sizes_are_judged_even_where_the_file_is_huge(header):
    with pytest.raises(InvalidSections):
        validate_header(replace(header, data_offset=16384), "x.fvd", 1 << 62)


edges = st.sampled_from(
    [0, 1, 512, 4096, 16384, 20480, 1 << 20, 1 << 31, 1 << 63, (1 << 64) - 4096]
)
NUMBERS = [
    "virtual_disk_size", "data_offset", "base_img_size", "bitmap_offset", "bitmap_size",
    "block_size", "journal_offset", "journal_size", "table_offset", "table_size",
]  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.dictionaries(st.sampled_from(NUMBERS), edges | st.integers(0, (1 << 64) - 1)))
def test_what_passes_lies_inside_the_file(header, values):
    length = header.data_offset + header.virtual_disk_size
    changed = replace(header, chunk_size=4096, **values)
    try:
        validate_header(changed, "x.fvd", length)
    except EngineError:
        return
    parts = geometry.sections(changed)
    assert all(part.end <= length and part.offset % 4096 == 0 for part in parts)
    assert list(geometry.overlaps(parts)) == []
    assert changed.bitmap_size * 8 * changed.block_size >= changed.base_img_size
    if changed.is_compact:
        assert changed.table_size // 4 * changed.chunk_size >= changed.virtual_disk_size
        assert changed.data_offset + changed.virtual_disk_size <= geometry.SIZE_MAX
