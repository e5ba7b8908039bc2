# SPDX-License-Identifier: Apache-2.0
"""The sizes and places chosen at create, and where chunks may lie."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvdengine import geometry
from fvdengine.geometry import Wanted
from fvdengine.units import GIB, MIB, TIB

sectors = st.integers(1, 1 << 40).map(lambda number: number * 512)


@pytest.mark.parametrize(
    ("base", "block"),
    [
        (512, 4096), (128 * GIB, 4096), (128 * GIB + 512, 8192), (1 * TIB, 32768),
        (16 * TIB, 512 * 1024), (64 * TIB, 2 * MIB), (1024 * TIB, 2 * MIB),
    ],
)  # fmt: skip
def test_block_size_is_the_smallest_with_a_small_bitmap(base, block):
    assert geometry.choose_block_size(base) == block


chunks = st.none() | st.sampled_from([4096, 12288, MIB, 5 * MIB])


@given(sectors, st.integers(0, 1 << 48), st.sampled_from([None, 4096, 65536, 2 * MIB]), chunks,
       st.booleans(), st.booleans())  # fmt: skip
def test_layout_is_aligned_disjoint_and_large_enough(size, base, block, chunk, compact, separate):
    layout = geometry.choose_layout(
        Wanted(size, base, block, None, compact, chunk, has_data_file=separate)
    )
    assert layout.base_img_size == min(-(-base // 512) * 512, size)
    sections = [
        (layout.bitmap_offset, layout.bitmap_size), (layout.journal_offset, layout.journal_size),
        (layout.table_offset, layout.table_size),
    ]  # fmt: skip
    assert bool(layout.bitmap_size) == bool(base)
    assert bool(layout.table_size) == compact
    assert bool(layout.journal_size) == (compact or bool(base))
    assert layout.bitmap_size * 8 * layout.block_size >= layout.base_img_size
    if compact:
        assert layout.table_size // 4 * layout.chunk_size >= size
    parts = [(0, 16384), *(part for part in sections if part[1])]
    if separate:
        assert layout.data_offset == 0
        assert layout.data_size == (0 if compact else size)
        assert layout.file_size == layout.metadata_end
    else:
        parts.append((layout.data_offset, size))
        assert layout.data_offset % MIB == 0
        assert layout.file_size == layout.data_offset + (0 if compact else size)
    for (offset, length), (following, _) in zip(parts, parts[1:], strict=False):
        assert offset + length <= following
        assert following % 4096 == 0
    assert layout.metadata_end == sum(parts[-1 if separate else -2])


def test_journal_can_be_left_out_or_asked_for():
    assert geometry.choose_layout(Wanted(MIB, MIB, journal_size=0)).journal_offset == 0
    layout = geometry.choose_layout(Wanted(MIB, MIB, journal_size=5000))
    assert (layout.journal_offset, layout.journal_size) == (20480, 8192)


def test_sections_of_a_header_are_sorted(header):
    names = [section.name for section in geometry.sections(header)]
    assert names == ["header", "bitmap", "journal", "data area"]
    assert list(geometry.overlaps(geometry.sections(header))) == []


def test_required_length_is_the_end_of_the_data(header):
    expected = header.data_offset + header.virtual_disk_size
    assert geometry.required_length(header) == expected


@pytest.fixture
def compact(header):
    """A compact header of 64 TiB whose table of 256 MiB ends at 768 MiB, where the data begin."""
    return replace(
        header, virtual_disk_size=64 * TIB, table_offset=512 * MIB, table_size=256 * MIB,
        chunk_size=MIB, data_offset=768 * MIB,
    )  # fmt: skip


def test_compact_image_needs_its_metadata_only(compact):
    names = [section.name for section in geometry.sections(compact)]
    assert names == ["header", "bitmap", "journal", "table"]
    assert geometry.required_length(compact) == 768 * MIB
    assert geometry.required_data_length(compact) == 0


def test_image_with_a_data_file_has_no_data_area(header):
    separate = replace(header, data_file="d", data_offset=0)
    assert [section.name for section in geometry.sections(separate)][-1] == "journal"
    assert geometry.required_data_length(separate) == header.virtual_disk_size


@pytest.mark.parametrize(
    ("table_size", "first"),
    [(256 * MIB, 0), (256 * MIB + 4096, 1), (257 * MIB, 1), (300 * MIB, 44)],
)
def test_table_that_grew_takes_the_first_places(compact, table_size, first):
    grown = replace(compact, table_size=table_size)
    assert geometry.first_place(grown) == first
    assert geometry.place_offset(grown, first) >= grown.table_offset + table_size
    assert geometry.first_place(replace(grown, data_file="d", data_offset=0)) == 0


@pytest.mark.parametrize(
    ("length", "end"),
    [(0, 0), (768 * MIB, 0), (769 * MIB - 1, 0), (769 * MIB, 1), (768 * MIB + 64 * TIB, 1 << 26),
     (1 << 62, (1 << 31) - 1), ((1 << 64) - 1, (1 << 31) - 1)],
)  # fmt: skip
def test_places_lie_wholly_inside_the_storage(compact, length, end):
    assert geometry.end_place(compact, length) == end


def test_addresses_do_not_overflow_where_chunks_are_huge(compact):
    huge = replace(compact, chunk_size=1 << 40)
    end = geometry.end_place(huge, (1 << 64) - 1)
    assert geometry.place_offset(huge, end) <= geometry.SIZE_MAX


def test_compact_image_is_used_up_to_its_highest_place(compact, header):
    assert geometry.used_length(compact, -1) == 768 * MIB
    assert geometry.used_length(compact, 2) == 771 * MIB
    assert geometry.used_length(replace(compact, table_size=257 * MIB), -1) == 769 * MIB
    separate = replace(compact, data_file="d", data_offset=0)
    assert geometry.used_length(separate, 2) == 768 * MIB
    assert geometry.used_length(header, -1) == geometry.required_length(header)
